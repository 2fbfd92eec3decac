"""Plain chains of 3x3 convolutions: VGG (Simonyan and Zisserman, 2015) and the nets of RNP (Lin et al., 2017).

The first convolution is never pruned (RNP): it is the stem. Every later one is a routable unit that reads the one before.
The classifier always runs in full, whatever the last unit kept (ours): stem and classifier are fixed costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynroute.backbones.base import Backbone, BackboneOptions
from dynroute.contracts import InputError
from dynroute.cost import conv_macs
from dynroute.data import DataSpec
from dynroute.units import ConvUnit, even_split

FOUR = ((1, 1), (2, 2))
SIXTEEN = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))


class Chain(Backbone):
    """A chain of 3x3 convolutions with bias and ReLU, 2x2 max-pooling after each stage, and a classifier.

    own: the net's own width. stages: channels of each convolution, two or more of them in the first stage; hidden: sizes of
    the classifier's hidden layers, with ReLU and Dropout; both as multiples of the width. pixels: height (= width) to which
    the last feature map is averaged before it is flattened; None: as it comes. norm: a BatchNorm after every convolution.
    Raises InputError for units other than channels and for images too small to be pooled that often.
    """

    def __init__(
        self,
        data: DataSpec,
        options: BackboneOptions,
        *,
        own: int,
        stages: Sequence[Sequence[int]],
        hidden: Sequence[int] = (),
        pixels: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        _check(options, data, len(stages))
        width, size = options.wide(own), data.image_size
        plan = [(stage, m * width, i == len(s)) for stage, s in enumerate(stages, 1) for i, m in enumerate(s, 1)]
        channels = plan[0][1]
        batch_norm = [nn.BatchNorm2d(channels)] if norm else []
        self.stem = nn.Sequential(nn.Conv2d(data.channels, channels, 3, 1, 1), *batch_norm, nn.ReLU())
        stem_macs = conv_macs(size, 3, data.channels, channels)
        index, read = len(self.stem), list[int]()  # index: of torchvision's list of layers
        for u, (stage, out, pool) in enumerate(plan[1:]):
            unit = ConvUnit(
                f"features.{index}",
                channels,
                even_split(out, options.parts),
                size,
                reads=u - 1 if u else None,
                sizes_in=read,
                norm=norm,
                pool=pool,
                stage=stage,
                stages=len(stages),
            )
            self.units.append(unit)
            channels, size, read = out, unit.out_size, unit.sizes
            index += 2 + norm + pool
        side = pixels or size
        linear = [channels * side * side, *(m * width for m in hidden), data.classes]
        averaged = [nn.AdaptiveAvgPool2d(pixels)] if pixels else []
        self.head = nn.Sequential(*averaged, nn.Flatten(), _classifier(linear))
        self.fixed_macs = stem_macs + sum(a * b for a, b in itertools.pairwise(linear))
        self.dense_macs = self.fixed_macs + sum(term.total for term in self.terms())
        self.apply(_initialise)

    def plain(self) -> dict[str, nn.Module]:
        """Stem and classifier under torchvision's names."""
        stem = {f"features.{i}": layer for i, layer in enumerate(self.stem.children())}
        linear = {f"classifier.{i}": layer for i, layer in enumerate(self.head[-1])}  # type: ignore[index]
        return {name: layer for name, layer in (stem | linear).items() if hasattr(layer, "weight")}

    def renamed(self, name: str) -> str:
        """BatchNorms are listed as layers of their own in torchvision; here they belong to their convolutions."""
        layer, dot, key = name.rpartition(".")
        return f"{self._norms().get(layer, layer)}{dot}{key}"

    @torch.no_grad()
    def load_dense(self, state: dict[str, Tensor], rank: str = "auto") -> None:
        """Take over the weights of a plain chain under torchvision's names, then put each unit's channels in order.

        Outputs of a layer and inputs of the next one, the classifier's included, move together. Raises InputError.
        """
        super().load_dense(state, rank)
        chain = self._chain()
        readers = [*(unit.conv for unit in chain[1:]), self.head[-1][0]]  # type: ignore[index]
        for unit, reader in zip(chain, readers, strict=True):
            unit.reorder(rank, reader)

    def dense_state(self) -> dict[str, Tensor]:
        """The plain chain's state dict under torchvision's names."""
        theirs = {ours: name for name, ours in self._norms().items()}
        parts = ((*name.rpartition("."), value) for name, value in super().dense_state().items())
        return {f"{theirs.get(layer, layer)}.{key}": value for layer, _, key, value in parts}

    def _chain(self) -> list[ConvUnit]:
        return [unit for unit in self.routable if isinstance(unit, ConvUnit)]

    def _norms(self) -> dict[str, str]:
        """Torchvision's names of the units' BatchNorms, and ours."""
        names = [unit.spec.name for unit in self._chain() if unit.norm is not None]
        return {f"features.{int(name.removeprefix('features.')) + 1}": f"{name}.norm" for name in names}


def conv4(data: DataSpec, options: BackboneOptions, norm: bool = False) -> Backbone:
    """RNP's CIFAR net of four convolutions, 24.5 M at 32 pixels (_bn: with BatchNorm).

    32, 32, pool, 64, 64, pool, linear classifier: the authors state the 24.5 M, not the widths; these are our reading, which
    gives 24.52 M. Whether they used BatchNorm is not said either, so there are both.
    """
    return Chain(data, options, own=32, stages=FOUR, norm=norm)


def vgg16_cifar(data: DataSpec, options: BackboneOptions, norm: bool = False) -> Backbone:
    """VGG-16 as in the CIFAR code of RNP's authors, 512 hidden units in the classifier, 313 M at 32 pixels (_bn: ours)."""
    return Chain(data, options, own=64, stages=SIXTEEN, hidden=(8,), pixels=1, norm=norm)


def vgg16(data: DataSpec, options: BackboneOptions, norm: bool = False) -> Backbone:
    """VGG-16 for 224-pixel images, 15.5 G; takes torchvision's weights (_bn: with BatchNorm)."""
    return Chain(data, options, own=64, stages=SIXTEEN, hidden=(64, 64), pixels=7, norm=norm)


def _check(options: BackboneOptions, data: DataSpec, stages: int) -> None:
    if options.unit != "channels":
        raise InputError(
            f"{options.name} is a chain without shortcuts, whose layers can be cut into channels only: "
            f"backbone.unit={options.unit} needs another backbone (or a router that takes channels)"
        )
    if data.image_size < 1 << stages:
        raise InputError(f"{options.name} needs images of at least {1 << stages} pixels, not {data.image_size}")


def _classifier(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes, with ReLU and Dropout in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout()]
    return nn.Sequential(*layers[:-2])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
