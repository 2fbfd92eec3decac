"""Classes, routes and costs of single images, by a trained run alone: its data are not needed.

B images, U units, G parts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dynroute.assembly import fingerprint, restore, trained_on
from dynroute.contracts import InputError
from dynroute.data import loader, pictures
from dynroute.fit import LAST
from dynroute.measure import TOLERANCE
from dynroute.records import read_budget
from dynroute.skipping import FastNet


@dataclass
class Prediction:
    """What the net says of one image. confidence: largest softmax probability. route: a bit a part, units between slashes.

    macs: multiply-adds, router included; share: of the dense net's.
    """

    file: str
    label: str
    confidence: float
    route: str
    macs: float
    share: float


def predict(run: Path, images: Sequence[Path], target: float | None = None) -> list[Prediction]:
    """Run the images through the really narrowed net at the trained point, or at a target that `eval` has calibrated.

    Raises InputError for a bad run or image, and for a target of which the run's budget.json knows no price.
    """
    path = run / LAST
    if not path.exists():
        raise InputError(f"{run} is not a run folder: it holds no {LAST}")
    net, config, content = restore(path)
    net.eval()
    if target is not None:
        net.router.price = _price(run, target)
    spec = trained_on(content, path)
    batches = loader(pictures(images, config.data.name, spec), spec, 64, train=False)
    fast, found = FastNet(net), []
    for batch in batches:
        out = fast(batch.images)
        best = torch.softmax(out.logits_BK.float(), 1).max(1)
        parts = [unit.parts for unit in net.backbone.specs]
        for i, row in enumerate(batch.index.tolist()):
            keep_UG = out.trace.keep_BUG[i].int().tolist()
            found.append(
                Prediction(
                    file=str(images[row]),
                    label=spec.class_names[int(best.indices[i])],
                    confidence=float(best.values[i]),
                    route="/".join("".join(map(str, keep[:n])) for keep, n in zip(keep_UG, parts, strict=True)),
                    macs=float(out.macs_B[i]),
                    share=float(out.macs_B[i]) / net.cost.dense,
                )
            )
    return found


def _price(run: Path, target: float) -> float:
    """The stored price whose share is nearest to the target."""
    settings = read_budget(run, fingerprint(run / LAST))
    price, share = min(settings.items(), key=lambda item: abs(item[1] - target), default=(0.0, -1.0))
    if abs(share - target) > TOLERANCE:
        raise InputError(
            f"{run} has no calibrated setting for {target:g} yet: dynroute eval {run} --flops-target {target:g}"
        )
    return price
