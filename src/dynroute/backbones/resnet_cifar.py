"""CIFAR ResNets of basic blocks (He et al., 2016, section 4.2): 6n+2 layers, three stages at 32, 16 and 8 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynroute.backbones.base import Backbone, BackboneOptions
from dynroute.contracts import InputError
from dynroute.cost import conv_macs
from dynroute.data import DataSpec
from dynroute.units import STATISTICS, UNITS, BasicUnit, GroupedBasic, PathBasic, even_split


class CifarResNet(Backbone):
    """CIFAR ResNet: basic blocks in three stages.

    Every block is one routable unit; its hidden channels are what is cut.
    """

    def __init__(self, depth: int, data: DataSpec, options: BackboneOptions) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        width, size = options.width, data.image_size
        self.stem = nn.Sequential(
            nn.Conv2d(data.channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stem_macs = conv_macs(size, 3, data.channels, width)
        channels = width
        for stage in range(3):
            for i in range(blocks):
                out, stride = width << stage, 2 if stage and not i else 1
                made = UNITS[options.unit](
                    f"layer{stage + 1}.{i}",
                    channels,
                    out,
                    stride,
                    even_split(out, options.parts),
                    in_size=size,
                    shortcut=options.shortcut,
                    stage=stage + 1,
                    stages=3,
                )
                self.units.append(made)
                channels, size = out, made.out_size
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, data.classes))
        self.fixed_macs = stem_macs + channels * data.classes
        # hidden channels of a cut block add up to those of the plain one, so all parts together are the dense net
        self.dense_macs = self.fixed_macs + sum(term.total for term in self.terms())
        self.apply(_initialise)

    @torch.no_grad()
    def load_dense(self, state: dict[str, Tensor]) -> None:
        """Import a plain CIFAR ResNet: conv1, bn1, layer{1,2,3}.{i}.{conv,bn}{1,2}, [shortcut,] linear or fc.

        Nested groups are the hidden channels ranked by their contribution, so that a prefix holds the most useful ones.
        """
        state = {k.removeprefix("module."): v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        left = set(state)

        def value(name: str, *shape: int) -> Tensor:
            if name not in state:
                raise InputError(f"backbone.weights: no {name!r} in the file: not a plain net of this depth")
            if state[name].shape != shape:
                got = tuple(state[name].shape)
                raise InputError(f"backbone.weights: {name} has shape {got}, this backbone needs {shape}")
            left.discard(name)
            return state[name]

        stem_conv, stem_norm, linear = self.stem[0], self.stem[1], self.head[2]  # type: ignore[index]
        _take(stem_conv, "conv1", ("weight",), value)
        _take(stem_norm, "bn1", STATISTICS, value)
        _take(linear, "linear" if "linear.weight" in state else "fc", ("weight", "bias"), value)
        for unit in self.routable:
            assert isinstance(unit, BasicUnit)
            _import_block(unit, unit.spec.name, value)
        if left:
            raise InputError(
                f"backbone.weights: {min(left)!r} has no place in this backbone: another depth or shortcut"
            )

    def dense_state(self) -> dict[str, Tensor]:
        """The plain net under the names that `load_dense` reads; only for blocks cut into channel groups."""
        stem, norm, linear = self.stem[0], self.stem[1], self.head[2]  # type: ignore[index]
        out = {"conv1.weight": stem.weight, "linear.weight": linear.weight, "linear.bias": linear.bias}
        out |= {f"bn1.{key}": getattr(norm, key) for key in STATISTICS}
        for unit in self.routable:
            if not isinstance(unit, GroupedBasic):
                return super().dense_state()
            name = unit.spec.name
            out |= {f"{name}.conv1.weight": unit.conv1.weight, f"{name}.conv2.weight": unit.conv2.weight}
            for key in STATISTICS:
                out |= {
                    f"{name}.bn1.{key}": getattr(unit.bn1, key),
                    f"{name}.bn2.{key}": getattr(unit.bn2, key)[-1],
                }
            if isinstance(unit.shortcut, nn.Sequential):
                out |= {f"{name}.shortcut.{k}": v for k, v in unit.shortcut.state_dict().items()}
        return {key: value.detach() for key, value in out.items()}


Value = Callable[..., Tensor]  # (name, *shape) -> the file's tensor of that name, checked to have that shape


def _take(module: nn.Module, name: str, keys: Sequence[str], value: Value) -> None:
    """Copy the file's tensors of one layer."""
    for key in keys:
        target = getattr(module, key)
        target.copy_(value(f"{name}.{key}", *target.shape))


def _import_block(unit: BasicUnit, name: str, value: Value) -> None:
    """One basic block: conv1/bn1 in ranked order; conv2/bn2 by the form of the unit."""
    hidden = sum(unit.sizes)
    first = value(f"{name}.conv1.weight", *unit.conv1.weight.shape)
    last = value(f"{name}.conv2.weight", unit.out_channels, hidden, 3, 3)
    norm = {key: value(f"{name}.bn1.{key}", hidden) for key in STATISTICS}
    order = contribution(last, norm["weight"], norm["bias"]).argsort(descending=True, stable=True)
    if isinstance(unit, PathBasic):  # sub-blocks get every N-th rank, so that they start equally good
        order = torch.cat([order[g :: len(unit.sizes)] for g in range(len(unit.sizes))])
    unit.conv1.weight.copy_(first[order])
    for key in STATISTICS:
        getattr(unit.bn1, key).copy_(norm[key][order])
    if isinstance(unit.shortcut, nn.Sequential):
        _take(unit.shortcut[0], f"{name}.shortcut.0", ("weight",), value)
        _take(unit.shortcut[1], f"{name}.shortcut.1", STATISTICS, value)
    if isinstance(unit, GroupedBasic):
        unit.conv2.weight.copy_(last[:, order])
        for key in STATISTICS:
            getattr(unit.bn2, key).copy_(value(f"{name}.bn2.{key}", unit.out_channels))  # the same for all widths
    elif isinstance(unit, PathBasic):
        _split_last(unit, name, last[:, order], value)


def _split_last(unit: PathBasic, name: str, last: Tensor, value: Value) -> None:
    """Each sub-block gets its part of conv2; mean and bias of bn2 are shared out evenly.

    With all sub-blocks open, the eval-mode net computes the dense net exactly.
    """
    parts = len(unit.sizes)
    for weight, conv, norm in zip(last.split(unit.sizes, 1), unit.conv2, unit.bn2, strict=True):
        conv.weight.copy_(weight)  # type: ignore[operator]
        _take(norm, f"{name}.bn2", STATISTICS, value)
        norm.running_mean.div_(parts)  # type: ignore[operator]
        norm.bias.div_(parts)  # type: ignore[operator]


def contribution(conv2: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """How much each hidden channel adds to a block's output: E[u^2] * |w_next|^2, shape (hidden,). Ours.

    u = ReLU(z) with z ~ N(beta, gamma^2) after BatchNorm, so E[u^2] is known without data. The papers rank by the norm
    of the kernel (conv1), which says nothing once a BatchNorm rescales it.
    """
    sigma = gamma.abs().clamp(min=1e-12)
    ratio = beta / sigma
    normal = torch.distributions.Normal(0.0, 1.0)
    density, mass = normal.log_prob(ratio).exp(), normal.cdf(ratio)
    second_moment = (beta.square() + sigma.square()) * mass + beta * sigma * density
    return second_moment * conv2.square().sum((0, 2, 3))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
