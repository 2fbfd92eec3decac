"""Milliseconds of a run: the table in its bench.csv, as this machine measured it, and how fast the dense net is now."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from dynroute.assembly import dense_twin
from dynroute.bench import Plan, bench, choose_clock
from dynroute.config import Config
from dynroute.contracts import InputError
from dynroute.data import DataSpec
from dynroute.net import RoutedNet
from dynroute.provenance import bench_labels, machine
from dynroute.records import BENCH_FILE, read_rows


def latency_table(
    folder: Path, net: RoutedNet, config: Config, spec: DataSpec, device: torch.device
) -> list[tuple[float, float]]:
    """Shares of the dense net's multiply-adds, and the milliseconds that an image alone takes at each in the mean.

    The rows of the run's bench.csv that this machine measured at batch 1 with as many threads as now, by how they compare
    with the dense net of the same rounds, and how fast that is now: machines have good and bad hours. Raises InputError
    where there are none.
    """
    path, threads = folder / BENCH_FILE, torch.get_num_threads()
    wanted = {
        "mode": "skipping",
        "batch": "1",
        "threads": str(threads),
        "device": str(device),
        "dtype": "fp32",
        "machine": machine(device),
        "checkpoint": "last",
    }
    rows = read_rows(path) if path.exists() else []
    rows = [row for row in rows if not row.get("flops_max")]  # of the net without a limit on each image
    if rows and not {"mode", "macs_share", "images_per_s"} <= rows[0].keys():
        raise InputError(f"{path} is not a latency table: columns mode, macs_share and images_per_s are missing")
    usual = _matching(rows, {"clock": choose_clock("auto", threads, device)[0]})
    if len(_matching(usual, wanted | {"routes": "router"})) > 1:  # else of another clock
        rows = usual
    own = _matching(rows, wanted | {"routes": "router"})
    if len(own) < 2:
        command = f"dynroute bench {folder} --flops-target 0.4 --flops-target 0.8 --batch 1 --threads {threads}"
        raise InputError(f"{path} has no two skipping rows of this machine at batch 1, threads {threads}: {command}")
    compared = [_above_0(row, "speedup", path) for row in own if row.get("speedup")]
    if len(compared) == len(own):
        forms = {row.get("form", "") for row in _matching(rows, wanted | {"mode": "dense_best"})}
        now = dense_speed(net, config, spec, device, {"compiled"} & forms)
        times = [1e3 / (now * faster) for faster in compared]
    else:  # a table of another make, without a dense net beside it
        times = [1e3 / _above_0(row, "images_per_s", path) for row in own]
    return [(_above_0(row, "macs_share", path), time) for row, time in zip(own, times, strict=True)]


def _matching(rows: Sequence[dict[str, str]], wanted: dict[str, str]) -> list[dict[str, str]]:
    """The rows with these values, or with none, in these columns."""
    return [row for row in rows if all(row.get(key) in (value, "", None) for key, value in wanted.items())]


def _above_0(row: dict[str, str], column: str, path: Path) -> float:
    """A measured number. Raises InputError for anything but a finite one above 0."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{path}: {column} must be a number above 0, not {row[column]!r}")
    return value


def dense_speed(
    net: RoutedNet, config: Config, spec: DataSpec, device: torch.device, modes: Collection[str] = ()
) -> float:
    """Images a second of the plain dense net in its fastest form, one at a time, now, with as many threads as torch is set to.

    modes: other forms that count too, as `compiled`.
    """
    drawing = torch.Generator().manual_seed(0)
    images_NCHW = torch.randn(8, spec.channels, spec.image_size, spec.image_size, generator=drawing).to(device)
    dense = dense_twin(config, spec).backbone.to(device)
    plan = Plan(seconds=1.0, modes=frozenset({"dense", *modes}))
    rows = bench(net, dense, images_NCHW, [], plan, bench_labels(config, device)).rows
    return next(row.images_per_s for row in rows if row.mode == "dense_best")
