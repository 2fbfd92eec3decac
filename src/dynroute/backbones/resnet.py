"""ImageNet ResNets (He et al., 2016; the stride of a bottleneck in its 3x3 convolution, as torchvision has it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from dynroute.backbones.base import Backbone, BackboneOptions, initialise
from dynroute.cost import conv_macs
from dynroute.data import DataSpec
from dynroute.units import BASIC, BOTTLENECK, BasicUnit, ChoiceUnit, GroupedBottleneck


class Layout(NamedTuple):
    """What a depth means. kinds: units by form. expansion: output channels by hidden ones. blocks: of each stage."""

    kinds: Mapping[str, Callable[..., BasicUnit | GroupedBottleneck | ChoiceUnit]]
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
    """

    def __init__(self, depth: int, data: DataSpec, options: BackboneOptions) -> None:
        super().__init__()
        layout = LAYOUTS[depth]
        make, width = options.kind(layout.kinds), options.wide(64)
        self.stem = nn.Sequential(
            nn.Conv2d(data.channels, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        size = (data.image_size + 1) // 2
        self.fixed_macs = conv_macs(size, 7, data.channels, width)
        channels, size = width, (size + 1) // 2
        for stage, blocks in enumerate(layout.blocks):
            hidden = width << stage
            for i in range(blocks):
                made = make(
                    f"layer{stage + 1}.{i}",
                    channels,
                    hidden * layout.expansion,
                    2 if stage and not i else 1,
                    options.sizes(hidden),
                    in_size=size,
                    shortcut="B",
                    stage=stage + 1,
                    stages=len(layout.blocks),
                )
                self.units.append(made)
                channels, size = made.out_channels, made.out_size
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
