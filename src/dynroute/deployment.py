"""`dynroute export`: from a run folder to an ONNX file that needs neither dynroute nor PyTorch. Data are not needed.

U units, G parts, K classes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynroute import __version__
from dynroute.contracts import InputError, unknown
from dynroute.data import DataSpec
from dynroute.export import INPUT, OUTPUTS, Scaled, SkippingGraph, StaticGraph, Unavailable, onnx_bytes, session
from dynroute.prediction import Opened, open_run
from dynroute.records import ROUTES_FILE, read_rows, write_file
from dynroute.routers import legal
from dynroute.runs import commit

FORMS = ("skipping", "static")
CHECKED = 8  # random images on which the file must agree with the net
CLOSE = 1e-3  # of logits, whose spread is of the order of 10


@dataclass
class Exported:
    """What was written. share: of the dense net's multiply-adds, as expected on calibration (static: of its route; None:
    not known at the trained point). apart: largest difference of a logit from the net's over the images that were checked.
    """

    file: str
    form: str
    flops_target: float | None
    share: float | None
    route: str
    bytes: int
    checked: int
    apart: float


def export(
    run: Path,
    file: Path,
    target: float | None = None,
    flops_max: float | None = None,
    form: str = "skipping",
    route: str | None = None,
) -> Exported:
    """Write the run as ONNX at the trained point, or at a target within what `eval` has calibrated.

    form: skipping (one image a call, routes by the router, what it leaves out is not computed) or static (one route for
    all, no router, any number of images). route: that one route, as in routes.csv; None: the most common one of the
    calibration split. The file is checked against the net before it is written. Raises InputError for a bad run, form,
    route or file name, and for a net that cannot be exported, OutOfReach for a budget that cannot be met.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if file.suffix != ".onnx":
        raise InputError(f"--out must be a file name that ends in .onnx, not {file}")
    if route is not None and form != "static":
        raise InputError("--route is for --form static: a skipping net chooses the route of each image")
    opened = open_run(run, target, flops_max)
    net, spec = opened.net, opened.spec
    scaled, says = Scaled(spec.mean, spec.std), _says(run, opened, target, form)
    x_NCHW = _images(spec)
    text, share = "", opened.fit.share if opened.fit else None
    with torch.no_grad():
        try:
            if form == "static":
                text = route or most_common(run, target, flops_max)
                keep_UG = read_route(text, opened)
                macs = float(net.cost(keep_UG[None])[0]) - net.cost.router
                share, says["route"], says["macs"] = macs / net.cost.dense, text, f"{macs:.0f}"
                wanted = net(scaled(x_NCHW), keep_UG.expand(CHECKED, -1, -1))
                content = onnx_bytes(StaticGraph(net, scaled, keep_UG), x_NCHW[:2], any_batch=True, says=says)
                calls = [x_NCHW]
            else:
                wanted = net(scaled(x_NCHW))
                content = onnx_bytes(SkippingGraph(net, scaled), x_NCHW[:1], OUTPUTS, says=says)
                calls = list(x_NCHW.split(1))
            runtime = session(content)
            answers = [runtime.run(None, {INPUT: x.numpy()}) for x in calls]
        except Unavailable as reason:
            raise InputError(f"{run} cannot be exported: {reason}") from None
    logits_NK, *routed = (torch.cat([torch.from_numpy(out) for out in each]) for each in zip(*answers, strict=True))
    apart = float((logits_NK - wanted.logits_BK).abs().max())
    same = all(
        torch.equal(a.float(), b.float()) for a, b in zip(routed, (wanted.trace.keep_BUG, wanted.macs_B), strict=False)
    )
    if not apart <= CLOSE or not same:
        what = f"logits differ by {apart:.2g}" if same else "it takes other routes"
        raise InputError(f"{run} cannot be exported: as ONNX {what}")
    write_file(file, lambda handle: handle.write(content))
    return Exported(str(file), form, target, share, text, len(content), CHECKED, apart)


def _images(spec: DataSpec) -> Tensor:
    """Images to compare two runs of a net on, from dark to bright: noise over noise of four times its grain."""
    drawing = torch.Generator().manual_seed(0)
    size = spec.image_size
    fine, coarse = (torch.rand(CHECKED, spec.channels, n, n, generator=drawing) for n in (size, -(-size // 4)))
    coarse = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :size, :size]
    return (fine / 3 + coarse * 2 / 3) * torch.linspace(0.2, 1, CHECKED)[:, None, None, None]


def most_common(run: Path, target: float | None, flops_max: float | None = None) -> str:
    """The route that most images of the calibration split took at a target, by the run's routes.csv. Raises InputError."""
    path = run / ROUTES_FILE
    asked, most = ("" if share is None else f"{share:.12g}" for share in (target, flops_max))
    wanted = {"split": "calib", "flops_target": asked, "flops_max": most, "checkpoint": "last"}
    rows = read_rows(path) if path.exists() else []
    routes = Counter(row["route"] for row in rows if all(row.get(k, "") == v for k, v in wanted.items()))
    if not routes:
        words = " ".join(
            [f"--flops-target {asked}"] * (target is not None) + [f"--flops-max {most}"] * (flops_max is not None)
        )
        raise InputError(f"which route is the most common? first: dynroute eval {run} --split calib {words}".rstrip())
    return max(routes, key=lambda route: (routes[route], route))


def read_route(text: str, opened: Opened) -> Tensor:
    """keep_UG of a route as routes.csv has it: a 0 or 1 a part, units between slashes. Raises InputError."""
    specs = opened.net.backbone.specs
    units = text.split("/")
    if [len(unit) for unit in units] != [spec.parts for spec in specs] or set(text) - set("01/"):
        like = "/".join("1" * spec.parts for spec in specs)
        raise InputError(f"{text!r} is no route of this net: one looks like {like}")
    keep_UG = torch.zeros(len(specs), max(spec.parts for spec in specs))
    for u, unit in enumerate(units):
        keep_UG[u, : len(unit)] = torch.tensor([float(bit) for bit in unit])
        if not torch.equal(legal(keep_UG[u : u + 1, : len(unit)], specs[u])[0], keep_UG[u, : len(unit)]):
            raise InputError(f"{text!r} is no route of this net: unit {u + 1} ({specs[u].name}) cannot keep {unit}")
    return keep_UG


def _says(run: Path, opened: Opened, target: float | None, form: str) -> dict[str, str]:
    """What the file tells of itself."""
    config, spec = opened.config, opened.spec
    return {
        "dynroute": __version__,
        "commit": commit(),
        "run": run.name,
        "method": config.router_name,
        "backbone": config.backbone.name,
        "dataset": config.data.name,
        "config_hash": config.hash(),
        "form": form,
        "flops_target": "" if target is None else f"{target:.12g}",
        "macs_dense": f"{opened.net.cost.dense:.0f}",
        "input": "RGB, 0 to 1; the net's own normalisation is inside",
        "classes": json.dumps(spec.class_names),
    }
