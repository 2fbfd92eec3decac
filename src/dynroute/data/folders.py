"""Image folders: train/CLASS/*.png with val/ or test/ beside train/, as ImageNet's are laid out.

test/ is the test split; without one, val/ is. With both, val/ is the calibration split. With data.superclasses=folders the
class folders lie one level deeper, in folders of their superclasses, and classes are called SUPERCLASS/CLASS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dynroute.contracts import InputError
from dynroute.data.files import SUFFIXES, into_memory
from dynroute.data.spec import DataOptions, Dataset, DataSpec, FileSplit, assemble
from dynroute.data.superclasses import FOLDERS

IN_MEMORY_BYTES = 512 * 2**20  # decoded; sets above this stay on disk


def folder(options: DataOptions, seed: int = 0) -> Dataset:
    """Class folders under options.path, resized to 32 pixels unless told otherwise, then centre-cropped.

    Decoded into memory up to `IN_MEMORY_BYTES`, else left on disk as FileSplits. seed is not used.
    """
    size = options.image_size or 32
    return read(options, size, short_side=size)


def imagenet(options: DataOptions, seed: int = 0) -> Dataset:
    """train/ and val/ of class folders (wnids): short side to 256, then the middle 224 pixels. Always left on disk, since random
    resized crops want the whole picture."""
    size = options.image_size or 224
    return read(options, size, imagenet_side(size))


def imagenet_side(size: int) -> int:
    """The short side to which an ImageNet picture is resized before the middle `size` pixels are cut out."""
    return round(size * 256 / 224)


def pictures(paths: Sequence[Path], name: str, spec: DataSpec) -> FileSplit:
    """Image files to be seen as the test images of the data set of that name; labels are 0."""
    side = {"imagenet": imagenet_side(spec.image_size), "npz": None}.get(name, spec.image_size)
    return FileSplit(list(paths), torch.zeros(len(paths), dtype=torch.long), side)


def read(options: DataOptions, size: int, short_side: int) -> Dataset:
    """The folder's splits. Raises InputError for missing or empty folders, classes that train/ lacks."""
    if options.path is None:
        raise InputError(f"data.name={options.name} needs data.path: a folder with train/ and val/ or test/ inside")
    root = Path(options.path)
    if not (root / "train").is_dir():
        raise InputError(f"{root}: no folder train/ inside")
    nested = options.superclasses == FOLDERS
    names = class_names(root / "train", nested)
    if len(names) < 2:
        raise InputError(f"{root / 'train'}: at least two class folders are needed, not {len(names)}")
    there = [name for name in ("test", "val") if (root / name).is_dir()]
    if not there:
        raise InputError(f"{root}: no folder val/ or test/ inside")
    spec = DataSpec(options.name, size, len(names), names)
    train, test, *val = (listed(root / part, names, short_side, nested) for part in ("train", *there))
    on_disk = assemble(spec, options, train, test, *val)
    parts = [part for part in (on_disk.train, on_disk.calibration, on_disk.test) if isinstance(part, FileSplit)]
    if options.name == "imagenet" or sum(len(part) for part in parts) * size * size * 3 > IN_MEMORY_BYTES:
        return on_disk
    return Dataset(spec, *(into_memory(part, size) for part in parts))


def class_names(folder: Path, nested: bool = False) -> tuple[str, ...]:
    """The sorted names of the class folders; hidden ones are passed over. nested: SUPERCLASS/CLASS."""
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    return tuple(f"{name}/{own}" for name in names for own in class_names(folder / name)) if nested else tuple(names)


def is_picture(file: Path) -> bool:
    """By its ending; hidden files are passed over, as hidden folders are."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def listed(folder: Path, names: tuple[str, ...], short_side: int, nested: bool = False) -> FileSplit:
    """All image files below a split's class folders. A class may be missing, but not unknown or empty."""
    paths: list[Path] = []
    labels: list[int] = []
    for place in (folder, *(f for f in folder.iterdir() if nested and f.is_dir())):
        loose = next((f for f in sorted(place.iterdir()) if is_picture(f)), None)
        if loose:
            raise InputError(f"{loose}: an image outside the class folders, so of no class")
    for name in class_names(folder, nested):
        if name not in names:
            raise InputError(f"{folder / name}: train/ has no class {name!r}")
        files = sorted(f for f in (folder / name).rglob("*") if is_picture(f))
        if not files:
            raise InputError(f"{folder / name}: no images in this class folder")
        paths += files
        labels += [names.index(name)] * len(files)
    if not paths:
        raise InputError(f"{folder}: no class folders inside")
    return FileSplit(paths, torch.tensor(labels), short_side)
