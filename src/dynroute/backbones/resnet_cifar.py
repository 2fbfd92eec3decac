"""CIFAR ResNets of basic blocks (He et al., 2016, section 4.2): 6n+2 layers, three stages at 32, 16 and 8 pixels."""

from __future__ import annotations

from torch import nn

from dynroute.backbones.base import Backbone, BackboneOptions, initialise
from dynroute.cost import conv_macs
from dynroute.data import DataSpec
from dynroute.units import BASIC, Place


class CifarResNet(Backbone):
    """CIFAR ResNet: basic blocks in three stages.

    Every block is one routable unit; its hidden channels are what is cut.
    """

    def __init__(self, depth: int, data: DataSpec, options: BackboneOptions) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        width, size = options.wide(16), data.image_size
        self.stem = nn.Sequential(
            nn.Conv2d(data.channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stem_macs = conv_macs(size, 3, data.channels, width)
        channels = width
        for stage in range(3):
            for i in range(blocks):
                out, stride = width << stage, 2 if stage and not i else 1
                name = f"layer{stage + 1}.{i}"
                place = Place(name, channels, out, stride, size, options.shortcut, stage + 1, 3)
                self.units.append(BASIC[options.unit](place, options.sizes(out)))
                channels, size = out, place.out_size
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, data.classes))
        self.fixed_macs = stem_macs + channels * data.classes
        # what a unit's cost calls its total is the plain block: all parts together, or the widest of alternatives
        self.dense_macs = self.fixed_macs + sum(term.total for term in self.terms())
        self.apply(initialise)

    def plain(self) -> dict[str, nn.Module]:
        """Stem and head under the names of the usual CIFAR ResNet files."""
        stem, norm, linear = self.stem[0], self.stem[1], self.head[2]  # type: ignore[index]
        return {"conv1": stem, "bn1": norm, "linear": linear}

    def renamed(self, name: str) -> str:
        """Some files call the classifier fc."""
        return name.replace("fc.", "linear.", 1) if name.startswith("fc.") else name
