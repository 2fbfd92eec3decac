"""From a configuration to a run folder, and what a net costs before it is trained."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dynroute import __version__
from dynroute.assembly import (
    build,
    check_data,
    dataset,
    inference_parameters,
    make_teacher,
    prepare,
    restore,
    same_images,
    trained_as,
    unfilled,
    untrained,
)
from dynroute.checkpoints import LAST, load_checkpoint
from dynroute.config import CONFIG_FILE, Config
from dynroute.contracts import InputError
from dynroute.data import split_fingerprint
from dynroute.fit import Listener, Step, fit
from dynroute.net import RoutedNet
from dynroute.provenance import commit, machine
from dynroute.records import nearest, write_text

LOG_FILE = "log.txt"


def train(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    begun: Callable[[], None] = lambda: None,
    listener: Listener = lambda step: None,
) -> RoutedNet:
    """Train a configuration into a run folder. Raises InputError if the folder holds a run and resume is not asked for.

    begun: called once all that is asked for has been read and found to be right.
    """
    content = check_folder(config, folder, resume)
    device = prepare(config)
    data = dataset(config)
    if content:
        check_data(content, data.spec, config, folder)
        if not same_images(content, data):
            raise InputError(
                f"{config.data.label} has other training images than {folder} began with: --resume needs the same ones"
            )
    net = build(unfilled(config) if content else config, data.spec).to(device)
    teacher = make_teacher(config, data.spec, device)
    phases = list(config.method.phases(net, config.router))  # before anything is written: they may refuse
    write_text(folder / CONFIG_FILE, config.yaml(comments=True))
    log = _log(folder)
    begun()
    log.info("dynroute %s torch %s %s commit %s", __version__, torch.__version__, machine(device), commit())
    log.info("%s: %s on %s, config %s", config.name, config.router_name, config.data.label, config.hash())

    def heard(step: Step) -> None:
        if step.row:
            log.info(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in step.row.items()))
        for remark in step.remarks:
            log.info("note: %s", remark)
        listener(step)

    meta = {
        "config": config.yaml(),
        "data": dataclasses.asdict(data.spec),
        "images": split_fingerprint(data),
        "epochs": sum(p.epochs for p in phases),
    }
    workers = config.data.workers
    try:
        fit(
            net, data, phases, config.optim, folder,
            seed=config.top.seed, workers=workers, meta=meta, resume=resume, listener=heard, teacher=teacher,
        )  # fmt: skip
    except Exception as error:
        log.info("stopped: %s", error)
        raise
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers.clear()
    return net


def check_folder(config: Config, folder: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint that training would go on from, if any. Raises InputError where it cannot train into that folder."""
    if (folder / LAST).exists():
        return _resumable(config, folder, resume)
    if folder.exists() and any(file.name not in (CONFIG_FILE, LOG_FILE) for file in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no run: choose another name or --out")
    return None


def seeded(config: Config, seeds: list[int], out: Path | None = None) -> list[tuple[Config, Path]]:
    """The configuration once for each seed, and sibling run folders that end in -s0, -s1, ...: of `out`, or of runs/NAME."""
    made = []
    for seed in seeds:
        name = re.sub(r"-s\d+$", "", config.top.name)
        top = dataclasses.replace(config.top, seed=seed, name=f"{name}-s{seed}" if name else "")
        own = dataclasses.replace(config, top=top)
        made.append((own, out.with_name(f"{out.name}-s{seed}") if out else Path("runs") / own.name))
    return made


def _resumable(config: Config, folder: Path, resume: bool) -> dict[str, Any]:
    """The checkpoint to go on from."""
    if not resume:
        raise InputError(
            f"{folder} already holds a run: add --resume to go on with it, or choose another name or --out"
        )
    content = load_checkpoint(folder / LAST)
    stored = trained_as(content, folder / LAST)
    if any(getter(stored) != getter(config) for getter in (Config.hash, Config.origins, lambda c: c.top.seed)):
        raise InputError(
            f"{folder} was trained with another configuration: --resume needs the same one (see {CONFIG_FILE})"
        )
    return content


def _log(folder: Path) -> logging.Logger:
    log = logging.getLogger(f"dynroute.{folder.resolve()}")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    return log


def check(config: Config) -> RoutedNet:
    """Build everything that training would, data included, and return the net."""
    device = prepare(config)
    spec = dataset(config).spec
    net = build(config, spec)
    make_teacher(config, spec, device)
    list(config.method.phases(net, config.router))  # which may refuse
    return net


def inspect_path(source: Path) -> dict[str, Any]:
    """`inspect` of a run folder, or of a YAML file; the weights that it starts from are not read: they change no cost."""
    if source.is_dir():
        net, config, _ = restore(source / LAST)
        return inspect(config, net)
    if not source.exists():
        raise InputError(f"{source} is neither a configuration nor a run folder{nearest(source)}")
    config, net, _ = untrained(source)
    return inspect(config, net)


def inspect(config: Config, net: RoutedNet) -> dict[str, Any]:
    """Parameters, multiply-adds per unit, cheapest and dearest route, as plain values."""
    low, high = net.span()
    units = [
        {
            "name": unit.spec.name,
            "form": unit.spec.form,
            "parts": unit.spec.parts,
            "macs": unit.cost_terms().total,
            "macs_always": unit.cost_terms().always,
            "macs_by_part": list(unit.cost_terms().by_part_G),
            "macs_by_pair": unit.cost_terms().by_pair_HG,
            "params": sum(p.numel() for p in unit.parameters()),
        }
        for unit in net.backbone.routable
    ]
    return {
        "name": config.name,
        "method": config.router_name,
        "backbone": config.backbone.name,
        "dataset": config.data.label,
        "params": inference_parameters(net),
        "params_router": inference_parameters(net) - sum(p.numel() for p in net.backbone.parameters()),
        "macs_dense": net.cost.dense,
        "macs_fixed": net.backbone.fixed_macs,
        "macs_router": net.cost.router,
        "share_cheapest": low,
        "share_dearest": high,
        "units": units,
    }
