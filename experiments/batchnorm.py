"""BatchNorm in a net of several widths: kept by width, or one for all? With trained statistics, or recalibrated ones?

    python experiments/batchnorm.py RUN [--recalibrate N] [--test N] [--out FILE.csv]

RUN: a run whose routable units are nested groups of channels, trained over its widths (`experiments/cifar10/widths.yaml`).
A row a variant, test top-1 at each uniform width and under mixed routes (the draws of the widths phase):
    own                  a BatchNorm for each width, as trained
    own_recalibrated     the same, statistics measured anew on training images under the very routes of the column
    shared_recalibrated  the widest's affine at every width, statistics measured anew likewise (by width where routes are mixed)
    shared               the widest's affine and statistics at every width
Recalibrated means all BatchNorms of the net, those too that every width shares in training. No net is trained with a shared
BatchNorm here: the two last rows tell what the trained weights lose without their own.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dynroute import plugins
from dynroute.assembly import prepare, restore
from dynroute.checkpoints import LAST
from dynroute.contracts import InputError
from dynroute.data import Dataset, limited, load, loader
from dynroute.measure import evaluate
from dynroute.net import RoutedNet
from dynroute.provenance import commit, machine
from dynroute.records import write_rows
from dynroute.routers import stacked
from dynroute.routers.qlearn import random_widths
from dynroute.units import STATISTICS, WidthNorm

VARIANTS = {  # name: (is the widest's BatchNorm used at every width, are statistics measured anew)
    "own": (False, False),
    "own_recalibrated": (False, True),
    "shared_recalibrated": (True, True),
    "shared": (True, False),
}
Draw = Callable[[int], Tensor]  # images -> keep_BUG


def columns(net: RoutedNet) -> dict[str, Draw]:
    """Routes of each column: every uniform width, and the draws of the widths phase."""
    specs = net.backbone.specs
    parts = specs[0].parts
    if any(spec.form != "nested" or spec.parts != parts for spec in specs):
        raise InputError("this needs units of equally many nested parts: backbone.unit=channels")

    def uniform(kept: int) -> Draw:
        keep_UG = stacked([(torch.arange(spec.parts) < kept).float() for spec in specs])
        return lambda images: keep_UG.expand(images, -1, -1)

    widths = {f"top1_width_{kept}_of_{parts}": uniform(kept) for kept in range(1, parts + 1)}
    return widths | {"top1_mixed": random_widths(specs)}


@torch.no_grad()
def share_widest(net: RoutedNet) -> None:
    """The widest's BatchNorm at every width."""
    for norm in (m for m in net.modules() if isinstance(m, WidthNorm)):
        for name in STATISTICS:
            values = getattr(norm, name)
            values.copy_(values[-1:].expand_as(values))


@torch.no_grad()
def recalibrate(net: RoutedNet, data: Dataset, images: int, draw: Draw) -> None:
    """Replace running statistics by their plain mean over augmented training minibatches under drawn routes."""
    norms = [m for m in net.backbone.modules() if isinstance(m, nn.BatchNorm2d | WidthNorm)]
    net.backbone.train()
    batches = loader(limited(data.train, images), data.spec, 128, train=True, seed=0, device=_device(net))
    for k, batch in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / k
        net(batch.images, draw(len(batch.labels)))
    net.eval()


def measured(net: RoutedNet, data: Dataset, test: int, draw: Draw) -> float:
    """Test top-1 under drawn routes, the same for every variant."""
    torch.manual_seed(1)
    part = limited(data.test, test) if test else data.test
    scores = evaluate(net, loader(part, data.spec, 256, train=False, device=_device(net)), routes_NUG=draw(len(part)))
    return float(scores.right_N.double().mean())


def _device(net: RoutedNet) -> torch.device:
    return next(net.parameters()).device


def main(words: list[str] | None = None) -> int:
    """Print a row a variant, and write them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--recalibrate", type=int, default=4000, help="training images [4000]")
    parser.add_argument("--test", type=int, default=0, help="test images [all]")
    parser.add_argument("--out", type=Path, help="CSV file")
    asked = parser.parse_args(words)
    try:
        trained, config, _ = restore(asked.run / LAST, router=False)
        device = prepare(config)
        data = load(config.data, make=plugins.find("dataset", config.data.name))
        rows = []
        for name, (shared, anew) in VARIANTS.items():
            row: dict[str, object] = {"variant": name}
            for column, draw in columns(trained).items():
                torch.manual_seed(0)
                net = copy.deepcopy(trained).to(device).eval()
                if shared:
                    share_widest(net)
                if anew:
                    recalibrate(net, data, asked.recalibrate, draw)
                row[column] = measured(net, data, asked.test, draw)
            images = asked.recalibrate if anew else 0
            row |= {"recalibrated_on": images, "n": min(asked.test or len(data.test), len(data.test))}
            row |= {"run": asked.run.name, "seed": config.top.seed, "commit": commit(), "machine": machine(device)}
            rows.append(row)
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        if asked.out:
            write_rows(asked.out, rows)
    except InputError as error:
        print(f"batchnorm.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
