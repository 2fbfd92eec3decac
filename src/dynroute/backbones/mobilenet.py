"""MobileNetV2 (Sandler et al., 2018) at widths 1.0 and 1.4."""

from __future__ import annotations

from torch import nn

from dynroute.backbones.base import Backbone, BackboneOptions, initialise
from dynroute.contracts import InputError
from dynroute.cost import conv_macs
from dynroute.data import DataSpec
from dynroute.units import INVERTED, Place, even_split

EXPANSION = 6
# stage, output channels, blocks, stride of the first: rows 3 to 8 of the paper's table 2; stages by resolution are ours
ROWS = ((1, 24, 2, 2), (2, 32, 3, 2), (3, 64, 4, 2), (3, 96, 3, 1), (4, 160, 3, 2), (4, 320, 1, 1))
STEM, FIRST, LAST = (
    32,
    16,
    1280,
)  # channels of the first convolution, of the block that does not expand, of the last one


class MobileNetV2(Backbone):
    """MobileNetV2: every inverted residual that expands is one unit, cut in its expanded channels; torchvision's weights.

    The stem holds the first convolution and the first block, which has no expansion to cut; the head the last 1x1
    convolution and the classifier. multiple: of all channels, each rounded to eights.
    """

    def __init__(self, data: DataSpec, options: BackboneOptions, *, multiple: float = 1.0) -> None:
        super().__init__()
        start, first_out = eights(STEM * multiple), eights(FIRST * multiple)
        last = max(eights(LAST * multiple), LAST)
        make = options.kind(INVERTED)
        if options.width:
            raise InputError(f"backbone.width: {options.name} comes in one width only, so leave it at 0")
        if options.path_width or options.path_least:
            raise InputError(
                f"backbone.path_width and path_least: sub-blocks of {options.name} have equal parts of the expansion"
            )
        narrowest = first_out * EXPANSION
        if options.parts > narrowest:
            raise InputError(f"backbone.parts must not exceed {narrowest} for {options.name}, not {options.parts}")
        self.stem = nn.Sequential(
            nn.Conv2d(data.channels, start, 3, 2, 1, bias=False),
            nn.BatchNorm2d(start),
            nn.ReLU6(),
            nn.Conv2d(start, start, 3, 1, 1, groups=start, bias=False),
            nn.BatchNorm2d(start),
            nn.ReLU6(),
            nn.Conv2d(start, first_out, 1, bias=False),
            nn.BatchNorm2d(first_out),
        )
        size = (data.image_size + 1) // 2
        stem_macs = (
            conv_macs(size, 3, data.channels, start)
            + conv_macs(size, 3, start, start, groups=start)
            + conv_macs(size, 1, start, first_out)
        )
        channels = first_out
        for stage, base, blocks, stride in ROWS:
            out = eights(base * multiple)
            for i in range(blocks):
                name, sizes = f"features.{len(self.units) + 2}", even_split(channels * EXPANSION, options.parts)
                first = 1 if i else stride
                place = Place(name, channels, out, first, size, "B", stage, ROWS[-1][0])
                self.units.append(make(place, sizes))
                channels, size = out, place.out_size
        self.head = nn.Sequential(
            nn.Conv2d(channels, last, 1, bias=False),
            nn.BatchNorm2d(last),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(last, data.classes),
        )
        self.fixed_macs = stem_macs + conv_macs(size, 1, channels, last) + last * data.classes
        self.dense_macs = self.fixed_macs + sum(term.total for term in self.terms())
        self.apply(initialise)

    def plain(self) -> dict[str, nn.Module]:
        """Stem and head under torchvision's names."""
        stem, head = list(self.stem.children()), list(self.head.children())
        last = f"features.{len(self.units) + 2}"
        return {
            "features.0.0": stem[0],
            "features.0.1": stem[1],
            "features.1.conv.0.0": stem[3],
            "features.1.conv.0.1": stem[4],
            "features.1.conv.1": stem[6],
            "features.1.conv.2": stem[7],
            f"{last}.0": head[0],
            f"{last}.1": head[1],
            "classifier.1": head[6],
        }


def mobilenet_v2_140(data: DataSpec, options: BackboneOptions) -> Backbone:
    """MobileNetV2 with 1.4 times the channels."""
    return MobileNetV2(data, options, multiple=1.4)


def eights(channels: float) -> int:
    """The nearest multiple of 8, or the next one where that would take away more than a tenth (as the authors do)."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8
