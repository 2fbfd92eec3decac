"""From a configuration or a checkpoint to a net, and from weights to where it starts: whatever stands before a run.

A net starts from a plain dense state dict, from a run of its own form, from two static runs (a cascade), or from chance.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from dynroute import plugins
from dynroute.backbones import Backbone, BackboneOptions, Cascade, make_backbone
from dynroute.checkpoints import LAST, load_checkpoint, load_tensors, load_weights
from dynroute.config import Config, from_text, load_config
from dynroute.contracts import InputError
from dynroute.data import Dataset, DataSpec, known_spec, load, split_fingerprint
from dynroute.fit import Teacher
from dynroute.net import RoutedNet
from dynroute.optim import amp_dtype
from dynroute.processors import processors
from dynroute.routers.static import StaticOptions
from dynroute.skipping import FastNet


def build(config: Config, spec: DataSpec) -> RoutedNet:
    """Backbone and router of a configuration, weights imported where it asks for them, seeded."""
    torch.manual_seed(config.top.seed)
    backbone = make_backbone(plugins.find("backbone", config.backbone.name), spec, config.backbone)
    if config.backbone.weights:
        _start(backbone, config.backbone)
    if isinstance(backbone, Cascade) and config.backbone.nets:
        for run, inner, width in zip(config.backbone.nets, backbone.nets, config.backbone.widths, strict=True):
            _take_over(inner, Path(run), width, config)
    router = config.method.router(backbone.specs, config.router, spec.superclasses)
    return RoutedNet(backbone, router).to(memory_format=torch.channels_last)


def _start(backbone: Backbone, options: BackboneOptions) -> None:
    """Fill a backbone from backbone.weights: by way of the plain dense net, its channels ranked anew;

    as it is from a run of the same form that has trained narrower widths, whose order of channels is learned.
    """
    path = _checkpoint(Path(str(options.weights)))
    content = load_tensors(path)
    if isinstance(content, dict) and "format" in content:
        source, config, _ = restore(path, router=False)
        apart = {key: getattr(options, key) for key in ("weights", "rank", "fold")}  # which say nothing of the form
        dense = config.router_name == "static" and config.router.width == 1.0
        if not dense and dataclasses.replace(config.backbone, **apart) == options:
            load_weights(backbone, source.backbone.state_dict(), path)
            return
    backbone.load_dense(dense_state(path), options.rank)


def _checkpoint(path: Path) -> Path:
    """The file of weights that a run folder or a path stands for."""
    return path / LAST if path.is_dir() else path


def make_teacher(config: Config, spec: DataSpec, device: torch.device) -> Teacher | None:
    """The net of optim.teacher, ready to be asked: a static run as it is, any other with all parts. Raises InputError.

    In bf16 training (optim.amp) its backbone is bf16 throughout, BatchNorms too; its logits are fp32.
    """
    name = config.optim.teacher
    if not name:
        return None
    if name == "start":
        if not config.backbone.weights:
            raise InputError("optim.teacher=start needs backbone.weights, the net to start from")
        name = config.backbone.weights
    path = _checkpoint(Path(name))
    content = load_tensors(path)
    if isinstance(content, dict) and "format" in content:
        net, trained, stored = restore(path, router=False)  # routes are given, or a static net's own
        taught = trained_on(stored, path)
        if taught.classes != spec.classes:
            raise InputError(f"optim.teacher: {path} knows {taught.classes} classes, the data have {spec.classes}")
        if taught.class_names != spec.class_names:
            raise InputError(f"optim.teacher: {path} was trained on other classes than those of the data")
        if taught.image_size != spec.image_size:
            raise InputError(
                f"optim.teacher: {path} was trained on {taught.image_size} pixels, the data have {spec.image_size}"
            )
        static = trained.router_name == "static"
    else:
        net = dense_twin(config, spec, weights=str(path))
        static = True
    kind = amp_dtype(config.optim.amp, device) or torch.float32
    net.backbone.to(kind)
    fast = FastNet(net.to(device))

    def asked(x_BCHW: torch.Tensor) -> torch.Tensor:
        return fast(x_BCHW.to(kind), None if static else net.dense_routes(len(x_BCHW))).logits_BK.float()

    return asked


def dense_twin(config: Config, spec: DataSpec, weights: str | None = None) -> RoutedNet:
    """The plain static net of a configuration's backbone; weights: of a plain state dict, None: random."""
    plain = dataclasses.replace(
        config.backbone, unit="channels", parts=1, widths=[], nets=[], weights=weights, fold="auto"
    )
    return build(dataclasses.replace(config, backbone=plain, router_name="static", router=StaticOptions()), spec)


def _take_over(net: Backbone, run: Path, width: float, config: Config) -> None:
    """Fill one net of a cascade from a trained static run. Raises InputError where it is another kind of run."""
    source, trained, _ = restore(run / LAST)
    if trained.router_name != "static":
        raise InputError(f"backbone.nets: {run} is a run of router.name={trained.router_name}, not of static")
    found, needed = (
        f"{c.backbone.name} of {c.backbone.parts} {unit} on {c.data.label} at width {w:g}"
        for c, unit, w in ((trained, trained.backbone.unit, trained.router.width), (config, "channels", width))
    )
    if found != needed:
        raise InputError(f"backbone.nets: {run} is {found}, this cascade needs {needed}")
    load_weights(net, source.backbone.state_dict(), run / LAST)


def dense_state(path: Path) -> dict[str, torch.Tensor]:
    """A plain dense state dict, from a file of one or from a checkpoint of this program. Raises InputError."""
    content = load_tensors(path)
    if isinstance(content, dict) and "format" in content:
        source = restore(path, router=False)[0].backbone
        return source.dense_state()
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise InputError(f"{path} holds no state dict of tensors")
    return content


def restore(path: Path, router: bool = True) -> tuple[RoutedNet, Config, dict[str, Any]]:
    """The trained net of a checkpoint, its configuration, and the checkpoint. Needs no data.

    router: false leaves the router as made, where only the backbone is wanted (a router of an older version may not fit).
    """
    content = load_checkpoint(path)
    trained = trained_as(content, path)
    spec = trained_on(content, path)
    net = build(unfilled(trained), spec)
    state = content["model"]
    if router:
        load_weights(net, state, path)
    else:
        own = "backbone."
        load_weights(net.backbone, {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}, path)
    return net, trained, content


def unfilled(config: Config) -> Config:
    """The configuration without weights to start from: of a net whose own are at hand."""
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None, nets=[]))


def trained_on(content: dict[str, Any], path: Path) -> DataSpec:
    """The description of the data that a checkpoint carries. Raises InputError where there is none."""
    try:
        names = ("superclass_of", "superclass_names", "class_names", "mean", "std")
        values: dict[str, Any] = {k: tuple(v) if k in names else v for k, v in content["meta"]["data"].items()}
        return DataSpec(**values)
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} does not say what it was trained on: written by another program") from None


def check_data(content: dict[str, Any], spec: DataSpec, config: Config, folder: Path) -> None:
    """Raise InputError where data are not those of the run: other classes or another image size."""
    stored = trained_on(content, folder)
    if (stored.image_size, stored.class_names) != (spec.image_size, spec.class_names):
        raise InputError(
            f"{config.data.label} has other classes or another image size now than {folder} was trained on"
        )


def same_images(content: dict[str, Any], data: Dataset) -> bool:
    """Whether data have the training images of the run, in the same split; older checkpoints do not say, and pass."""
    now = split_fingerprint(data)
    return bool(content["meta"].get("images", now) == now)


def trained_as(content: dict[str, Any], path: Path) -> Config:
    """The configuration that a checkpoint carries. Raises InputError where there is none."""
    try:
        return from_text(content["meta"]["config"], str(path))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} does not say what it was trained as: written by another program") from None


def inference_parameters(net: RoutedNet) -> int:
    """Parameters that a deployed net needs: what a router uses in training alone is dropped after it."""
    dropped = tuple(f"router.{name}." for name in net.router.train_only)
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith(dropped))


def fingerprint(path: Path) -> str:
    """Sixteen hex digits of a file's content: tells whether what was stored about a checkpoint is about this one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def prepare(config: Config) -> torch.device:
    """Set threads and pick the device. Raises InputError for a device that is not there."""
    torch.set_num_threads(config.top.threads or len(processors()))
    name = config.top.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device cannot do
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} is not usable here; cpu always is") from None
    return device


def on_device(config: Config, device: str | None) -> Config:
    """The configuration with another device; None: as it is."""
    return config if device is None else dataclasses.replace(config, top=dataclasses.replace(config.top, device=device))


def moved(config: Config, path: Path | None) -> Config:
    """The configuration with its data elsewhere; None: as it is. Raises InputError where nothing is, or nothing is read."""
    if path is None:
        return config
    if config.data.name == "shapes":
        raise InputError("--data: shapes are drawn, not read")
    if not path.exists():
        raise InputError(f"--data: there is no {path}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)))


def untrained(
    source: Path, overrides: list[str] | None = None, data_path: Path | None = None
) -> tuple[Config, RoutedNet, DataSpec]:
    """The net of a YAML file with random weights; its data is read only where its name does not tell enough."""
    config = moved(load_config(source, overrides), data_path)
    sized = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None, nets=[]))
    spec = known_spec(config.data) or dataset(config).spec
    return config, build(sized, spec), spec


def dataset(config: Config) -> Dataset:
    """The data of a configuration."""
    return load(config.data, make=plugins.find("dataset", config.data.name))
