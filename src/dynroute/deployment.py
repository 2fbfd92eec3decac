"""`dynroute export`: from a run folder to an ONNX file that needs neither dynroute nor PyTorch. Data are not needed.

N images, U units, G parts.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dynroute import __version__
from dynroute.assembly import fingerprint
from dynroute.checkpoints import LAST
from dynroute.contracts import InputError, unknown
from dynroute.data import DataSpec
from dynroute.export import (
    INPUT,
    OUTPUTS,
    Scaled,
    SkippingGraph,
    StaticGraph,
    Unavailable,
    onnx_bytes,
    possible_routes,
    session,
)
from dynroute.net import RoutedNet
from dynroute.prediction import Trained, open_run
from dynroute.provenance import commit
from dynroute.records import ROUTES_FILE, read_rows, route_text, write_file
from dynroute.routers import legal

GRAPHS = ("skipping", "static")
CHECKED = 32  # images, of as many routes as can be found, on which the file must agree with the net
PIXELS = 1 << 18  # of the images among which they are looked for
CLOSE = 1e-3  # of logits, whose spread is of the order of 10


@dataclass
class Exported:
    """What was written. share: of the dense net's multiply-adds, as expected on calibration (static: of its route; None:
    not known at the trained point). route: of a static graph. routes: different ones among the images that were checked.
    apart: largest difference of a logit from the net's.
    """

    file: str
    form: str
    flops_target: float | None
    flops_max: float | None
    share: float | None
    route: str
    bytes: int
    checked: int
    routes: int
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
    all, no router, any number of images). route: that one route, as in routes.csv, whatever its cost; None: the router's
    own where it has but one, else the most common one of the calibration split. The file is checked against the net
    before it is written. Raises InputError for a bad run, form, route or file name and for a net that cannot be exported,
    OutOfReach for a budget that cannot be met.
    """
    _check(file, form, route, target is not None or flops_max is not None)
    opened = open_run(run, target, flops_max)
    net, spec = opened.net, opened.spec
    scaled = Scaled(spec.mean, spec.std)
    text, share = "", opened.fit.share if opened.fit else None
    says = _says(run, opened, target, flops_max, form)
    with torch.no_grad():
        try:
            if form == "static":
                text = _one_route(run, net, target, flops_max) if route is None else route
                keep_UG = read_route(text, net)
                macs = float(net.cost(keep_UG[None])[0]) - net.cost.router
                share = macs / net.cost.dense
                x_NCHW = _images(spec)[:CHECKED]
                wanted = net(scaled(x_NCHW), keep_UG.expand(len(x_NCHW), -1, -1))
                says |= {"route": text, "macs": f"{macs:.0f}", "share": f"{share:.6f}"}
                content = onnx_bytes(StaticGraph(net, scaled, keep_UG), x_NCHW[:2], any_batch=True, says=says)
                calls = [x_NCHW]
            else:
                x_NCHW = _varied(net, scaled, _images(spec))
                wanted = net(scaled(x_NCHW))
                content = onnx_bytes(SkippingGraph(net, scaled), x_NCHW[:1], OUTPUTS, says=says)
                calls = list(x_NCHW.split(1))
            runtime = session(content)
            answers = [runtime.run(None, {INPUT: x.numpy()}) for x in calls]
        except Unavailable as reason:
            raise InputError(f"{run} cannot be exported: {reason}") from None
    logits_NK, *routed = (torch.cat([torch.from_numpy(out) for out in each]) for each in zip(*answers, strict=True))
    apart = float((logits_NK - wanted.logits_BK).abs().max())
    pairs = zip(routed, (wanted.trace.keep_BUG, wanted.macs_B), strict=False)  # a static graph gives logits alone
    same = all(torch.equal(mine.double(), own.double()) for mine, own in pairs)
    if not apart <= CLOSE or not same:
        what = f"logits differ by {apart:.2g}" if same else "it takes other routes"
        raise InputError(f"{run} cannot be exported: as ONNX {what}")
    write_file(file, lambda handle: handle.write(content))
    routes = len(wanted.trace.keep_BUG.unique(dim=0))
    return Exported(str(file), form, target, flops_max, share, text, len(content), len(x_NCHW), routes, apart)


def _check(file: Path, form: str, route: str | None, budget: bool) -> None:
    """Raise InputError on what can be known to be wrong before a net is opened."""
    if form not in GRAPHS:
        raise unknown("form", form, GRAPHS)
    if file.suffix != ".onnx":
        raise InputError(f"--out must be a file name that ends in .onnx, not {file}")
    if file.is_dir():
        raise InputError(f"--out {file} is a folder")
    if any(parent.exists() and not parent.is_dir() for parent in file.parents):
        raise InputError(f"--out {file} would lie in a file")
    if route is not None and form != "static":
        raise InputError("--route is for --form static: a skipping net chooses the route of each image")
    if route is not None and budget:
        raise InputError("--route excludes --flops-target and --flops-max: it has its own cost")


def _images(spec: DataSpec) -> Tensor:
    """Images of all kinds (N, C, H, W), values 0 to 1: noise of every grain, the coarse ones strongest, at any contrast."""
    size, drawing = spec.image_size, torch.Generator().manual_seed(0)
    count = max(CHECKED, PIXELS // size**2)
    x_NCHW = torch.zeros(count, spec.channels, size, size)
    for grain in range(size.bit_length()):
        side = 1 << grain
        noise = torch.randn(count, spec.channels, side, side, generator=drawing)
        strength = torch.rand(count, 1, 1, 1, generator=drawing) / side**0.5
        x_NCHW += strength * F.interpolate(noise, size=(size, size), mode="bilinear")
    contrast = torch.rand(count, 1, 1, 1, generator=drawing)
    return (0.5 + contrast * x_NCHW).clamp(0, 1)


def _varied(net: RoutedNet, scaled: Scaled, x_NCHW: Tensor) -> Tensor:
    """CHECKED of the images: first one of each route that they take."""
    keep_NUG = torch.cat([net(scaled(x)).trace.keep_BUG for x in x_NCHW.split(64)])
    routes = [tuple(row) for row in keep_NUG.flatten(1).int().tolist()]
    firsts = [routes.index(route) for route in dict.fromkeys(routes)]
    others = [i for i in range(len(routes)) if i not in set(firsts)]
    return x_NCHW[(firsts + others)[:CHECKED]]


def _one_route(run: Path, net: RoutedNet, target: float | None, flops_max: float | None) -> str:
    """The route of a static net; else the one that most images of the calibration split took, by the run's routes.csv.

    Of several the first in lexicographic order, as in the control of that name. Raises InputError.
    """
    only_RUG = possible_routes(net.router) if net.router.alike else None
    if only_RUG is not None and len(only_RUG) == 1:
        return route_text(only_RUG[0].int().tolist(), [spec.parts for spec in net.backbone.specs])
    path = run / ROUTES_FILE
    asked, most = ("" if share is None else f"{share:.12g}" for share in (target, flops_max))
    wanted = {"split": "calib", "flops_target": asked, "flops_max": most}
    rows = read_rows(path) if path.exists() else []
    if rows and not {"route", "checkpoint", *wanted} - {"flops_max"} <= rows[0].keys():
        raise InputError(f"{path} lacks columns: written by another version or program")
    rows = [row for row in rows if row["checkpoint"] == "last" and all(row.get(k, "") == v for k, v in wanted.items())]
    counts = Counter(row["route"] for row in rows)
    if not counts:
        words = [f"--flops-target {asked}"] * bool(asked) + [f"--flops-max {most}"] * bool(most)
        command = " ".join(["dynroute eval", str(run), "--split calib", *words])
        raise InputError(f"{path} does not know the most common route of the calibration split: {command}")
    return min(counts, key=lambda text: (-counts[text], text))


def read_route(text: str, net: RoutedNet) -> Tensor:
    """keep_UG of a route as files have it (`records.route_text`). Raises InputError for none of this net."""
    specs, units = net.backbone.specs, text.split("/")
    if [len(unit) for unit in units] != [spec.parts for spec in specs] or set(text) - set("01/"):
        like = "/".join("1" * spec.parts for spec in specs)
        raise InputError(f"{text!r} is no route of this net: one looks like {like}")
    keep_UG = torch.zeros(len(specs), max(spec.parts for spec in specs))
    for u, (unit, spec) in enumerate(zip(units, specs, strict=True)):
        keep_1G = torch.tensor([[float(bit) for bit in unit]])
        if not torch.equal(legal(keep_1G, spec), keep_1G):
            raise InputError(f"{text!r} is no route of this net: {spec.name} cannot keep {unit}")
        keep_UG[u, : spec.parts] = keep_1G[0]
    return keep_UG


def _says(run: Path, opened: Trained, target: float | None, flops_max: float | None, form: str) -> dict[str, str]:
    """What the file tells of itself."""
    config, spec, fit = opened.config, opened.spec, opened.fit
    shares = {"flops_target": target, "flops_max": flops_max, "share": fit.share if fit else None}
    return {
        "dynroute": __version__,
        "commit": commit(),
        "run": run.name,
        "checkpoint": fingerprint(run / LAST),
        "config_hash": config.hash(),
        "method": config.router_name,
        "backbone": config.backbone.name,
        "dataset": config.data.label,
        "form": form,
        "macs_dense": f"{opened.net.cost.dense:.0f}",
        **{name: "" if share is None else f"{share:.6g}" for name, share in shares.items()},
        "input": "NCHW, RGB, values 0 to 1; the normalisation is inside",
        "classes": json.dumps(spec.class_names),
    }
