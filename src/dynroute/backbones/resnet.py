"""ImageNet ResNets (He et al., 2016; the stride of a bottleneck in its 3x3 convolution, as torchvision has it), ResNeXts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import nn

from dynroute.backbones.base import FOLDS, Backbone, BackboneOptions, initialise
from dynroute.cost import conv_macs
from dynroute.data import DataSpec
from dynroute.units import (
    AGGREGATED,
    BASIC,
    BOTTLENECK,
    AggregatedBottleneck,
    BasicUnit,
    ChoiceUnit,
    GroupedBottleneck,
    PathBottleneck,
    Place,
)

Block = BasicUnit | GroupedBottleneck | PathBottleneck | ChoiceUnit | AggregatedBottleneck


class Layout(NamedTuple):
    """What a depth means. kinds: units by form. expansion: output channels by hidden ones. blocks: of each stage."""

    kinds: Mapping[str, Callable[..., Block]]
    expansion: int
    blocks: tuple[int, ...]


LAYOUTS = {
    18: Layout(BASIC, 1, (2, 2, 2, 2)),
    34: Layout(BASIC, 1, (3, 4, 6, 3)),
    50: Layout(BOTTLENECK, 4, (3, 4, 6, 3)),
    101: Layout(BOTTLENECK, 4, (3, 4, 23, 3)),
}


class ResNet(Backbone):
    """ImageNet ResNet: 7x7 stem and maxpool, basic or bottleneck blocks in four stages, torchvision's weights.

    Every block is one routable unit; its hidden channels are what is cut. Shortcuts project where shapes change.
    groups, each: of a ResNeXt, how many groups its 3x3 convolutions have and how many channels a group has in the first
    stage; its blocks are not cut. small: a 3x3 stem of stride 1 instead of the 7x7 one of stride 2, for small images.
    """

    def __init__(
        self,
        depth: int,
        data: DataSpec,
        options: BackboneOptions,
        *,
        groups: int = 0,
        each: int = 0,
        small: bool = False,
    ) -> None:
        super().__init__()
        layout = LAYOUTS[depth]
        make: Callable[..., Block] = options.kind(layout.kinds)
        if groups:
            make = partial(options.kind(AGGREGATED), groups=groups)
        width, kernel = options.wide(64), 3 if small else 7
        stride = 1 if small else 2
        self.stem = nn.Sequential(
            nn.Conv2d(data.channels, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        size = (data.image_size + stride - 1) // stride
        self.fixed_macs = conv_macs(size, kernel, data.channels, width)
        channels, size = width, (size + 1) // 2
        for stage, blocks in enumerate(layout.blocks):
            hidden = width << stage
            sizes = options.sizes(hidden, middle=layout.expansion > 1)
            if groups:
                sizes = [groups * (each * width // 64) << stage]
            for i in range(blocks):
                name, out, stride = f"layer{stage + 1}.{i}", hidden * layout.expansion, 2 if stage and not i else 1
                place = Place(name, channels, out, stride, size, "B", stage + 1, len(layout.blocks))
                unit = make(place, sizes)
                if isinstance(unit, PathBottleneck):
                    unit.fold = FOLDS[options.fold]
                self.units.append(unit)
                channels, size = out, place.out_size
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, data.classes))
        self.fixed_macs += channels * data.classes
        self.dense_macs = self.fixed_macs + sum(term.total for term in self.terms())
        self.apply(initialise)

    def plain(self) -> dict[str, nn.Module]:
        """Stem and head under torchvision's names."""
        return {"conv1": self.stem[0], "bn1": self.stem[1], "fc": self.head[2]}  # type: ignore[index]

    def renamed(self, name: str) -> str:
        """torchvision calls the shortcut downsample."""
        return name.replace(".downsample.", ".shortcut.")


def resnext(depth: int, groups: int, each: int, data: DataSpec, options: BackboneOptions) -> Backbone:
    """ResNeXt (Xie et al., 2017), whole blocks: a static net, the plain form of DMNN with all gates open."""
    return ResNet(depth, data, options, groups=groups, each=each)


def resnet50_cifar(data: DataSpec, options: BackboneOptions) -> Backbone:
    """ResNet-50 whose first stage sees 16 x 16 pixels of a 32-pixel image, 0.33 G as DMNN states for CIFAR; the stem is ours.

    3x3 convolution of stride 1, then the usual max-pooling.
    """
    return ResNet(50, data, options, small=True)
