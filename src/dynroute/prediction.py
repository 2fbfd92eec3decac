"""Classes, routes and costs of single images, by a trained run alone: its data are not needed.

B images, U units, G parts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dynroute.assembly import fingerprint, restore, trained_on
from dynroute.calibration import Fit, read_budget, share_for_latency
from dynroute.checkpoints import LAST
from dynroute.config import Config
from dynroute.contracts import InputError
from dynroute.data import DataSpec, loader, pictures
from dynroute.latency import latency_table
from dynroute.net import RoutedNet
from dynroute.provenance import environment
from dynroute.records import FORMS_FILE, route_text
from dynroute.skipping import fast_net, load_forms


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


def predict(
    run: Path,
    images: Sequence[Path],
    target: float | None = None,
    flops_max: float | None = None,
    latency_ms: float | None = None,
) -> list[Prediction]:
    """Run the images through the really narrowed net at the trained point, or at a target within what `eval` has calibrated.

    flops_max: share of the dense net's multiply-adds that no image may exceed. latency_ms: a target as the time of an image
    alone, which the run's bench.csv turns into a share. Raises InputError for a bad run or image and
    where the run's budget.json knows no setting, OutOfReach for a target or limit that no setting can meet.
    """
    opened = open_run(run, target, flops_max, latency_ms)
    net, spec = opened.net, opened.spec
    batches = loader(pictures(images, opened.config.data.name, spec), spec, 64, train=False)
    fast, found = fast_net(net), list[Prediction]()
    fast.forms = load_forms(run / FORMS_FILE, fingerprint(run / LAST), environment(), len(net.backbone.specs))
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
                    route=route_text(keep_UG, parts),
                    macs=float(out.macs_B[i]),
                    share=float(out.macs_B[i]) / net.cost.dense,
                )
            )
    return found


@dataclass
class Trained:
    """A trained run without its data: the net in eval(), its dial and limit set. fit: of the target; None: the trained point."""

    net: RoutedNet
    config: Config
    spec: DataSpec
    fit: Fit | None


def open_run(
    run: Path, target: float | None = None, flops_max: float | None = None, latency_ms: float | None = None
) -> Trained:
    """The net of a run folder at a target. Raises as `predict` does."""
    path = run / LAST
    if not path.exists():
        raise InputError(f"{run} is not a run folder: it holds no {LAST}")
    net, config, content = restore(path)
    net.eval()
    if flops_max is not None:
        net.set_limit(flops_max)
    spec = trained_on(content, path)
    if latency_ms is not None:
        target = share_for_latency(latency_table(run, net, config, spec, torch.device("cpu")), latency_ms)
    fit = None if target is None else _fit(run, target, flops_max)
    if fit is not None:
        net.router.setting = fit.setting
    return Trained(net, config, spec, fit)


def _fit(run: Path, target: float, flops_max: float | None) -> Fit:
    """What meets the target by the run's stored calibration, mixed from its neighbours where it was not asked for before."""
    known = read_budget(run, fingerprint(run / LAST), flops_max)
    if known is None or len(known.points) < 2:
        words = f"--flops-target {target:g}" + ("" if flops_max is None else f" --flops-max {flops_max:g}")
        raise InputError(f"{run} has no calibrated setting for {target:g} yet: dynroute eval {run} {words}")
    return known.within_reach(target)
