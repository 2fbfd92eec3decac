"""Images as arrays in one .npz file, under MedMNIST's keys.

    train_images, test_images, [val_images]      uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)
    train_labels, test_labels, [val_labels]      integers 0..K-1, (N,) or (N, 1)
    [train_superclasses, test_superclasses, val_superclasses]   the same form
    [class_names, superclass_names]

val_images, where there are any, are the calibration split.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dynroute.contracts import InputError
from dynroute.data.files import one_line
from dynroute.data.spec import DataOptions, Dataset, DataSpec, Split, assemble

Arrays = dict[str, NDArray]
HIGHEST = 2**31 - 1  # of a label
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    UnpicklingError,
)


def npz(options: DataOptions, seed: int = 0) -> Dataset:
    """The file at options.path. Non-square images become squares of their longer side; seed is not used."""
    if options.path is None:
        raise InputError("data.name=npz needs data.path: an .npz file with train_images, train_labels, ...")
    path = Path(options.path)
    arrays = read_arrays(path)
    splits = read_splits(path, arrays)
    size = options.image_size or max(splits["train"].images.shape[1:3])
    spec = describe(path, arrays, splits, options.name, size)
    return fitted(spec, options, splits)


def fitted(spec: DataSpec, options: DataOptions, splits: dict[str, Split]) -> Dataset:
    """The data set of these splits, limited and then resized to the spec's image size."""
    dataset = assemble(spec, options, splits["train"], splits["test"], splits.get("val"))
    for split in (dataset.train, dataset.calibration, dataset.test):
        assert isinstance(split, Split)
        split.images = resized(split.images, spec.image_size)
    return dataset


def read_arrays(path: Path) -> Arrays:
    """All arrays of the file; pickled objects are refused, since opening them runs whatever they carry."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not an .npz archive, or not all of it")
    key = "the file"
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {}
            for key in archive.files:
                arrays[key] = archive[key]
            return arrays
    except (*UNREADABLE, AttributeError, TypeError) as error:  # the last two: an .npy array has no .files
        raise InputError(f"{path}: cannot read {key} as part of an .npz archive ({one_line(error)})") from error


def read_splits(path: Path, arrays: Arrays) -> dict[str, Split]:
    """train, test and, if there, val, each checked by itself."""
    names = ["train", "test"] + (["val"] if "val_images" in arrays else [])
    return {name: read_split(path, arrays, name) for name in names}


def read_split(path: Path, arrays: Arrays, name: str) -> Split:
    """One split, its arrays checked. Raises InputError that names file and array."""
    for key in (f"{name}_images", f"{name}_labels"):
        if key not in arrays:
            raise InputError(f"{path}: no array {key!r} inside (it has: {', '.join(sorted(arrays)) or 'none'})")
    images = read_images(path, f"{name}_images", arrays[f"{name}_images"])
    labels = read_integers(path, f"{name}_labels", arrays[f"{name}_labels"], len(images))
    key = f"{name}_superclasses"
    return Split(images, labels, read_integers(path, key, arrays[key], len(images)) if key in arrays else None)


def read_images(path: Path, key: str, array: NDArray) -> Tensor:
    """uint8 (N, H, W, 3)."""
    if array.dtype != np.uint8:
        raise InputError(f"{path}: {key} must be uint8, not {array.dtype}")
    if not (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))):
        raise InputError(f"{path}: {key} must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), not {array.shape}")
    if array.size == 0:
        raise InputError(f"{path}: {key} is empty")
    images = torch.from_numpy(array if array.ndim == 4 else array[..., None])
    return images.expand(-1, -1, -1, 3)  # a view: gray takes no more memory as RGB


def read_integers(path: Path, key: str, array: NDArray, count: int) -> Tensor:
    """int64 (N,), none negative."""
    if array.ndim == 2 and array.shape[1] > 1:
        raise InputError(f"{path}: {key} has {array.shape[1]} columns; several labels for one image are unsupported")
    if array.dtype.kind not in "iu":
        raise InputError(f"{path}: {key} must be integers, not {array.dtype}")
    if array.shape not in ((count,), (count, 1)):
        raise InputError(f"{path}: {key} has shape {array.shape}, but there are {count} images")
    if array.min() < 0 or array.max() > HIGHEST:
        odd = f"a negative value, {array.min()}" if array.min() < 0 else f"a value above {HIGHEST}, {array.max()}"
        raise InputError(f"{path}: {key} has {odd}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def describe(path: Path, arrays: Arrays, splits: dict[str, Split], name: str, size: int) -> DataSpec:
    """The spec that the arrays imply. Raises InputError where the splits, names and superclasses disagree."""
    train = splits["train"]
    classes, class_names = counted(path, "class_names", arrays, train.labels)
    for part in splits:
        within(path, f"{part}_labels", splits[part].labels, classes)
    if train.superclasses is None:
        return DataSpec(name, size, classes, class_names)
    superclasses, superclass_names = counted(path, "superclass_names", arrays, train.superclasses)
    superclass_of = torch.zeros(classes, dtype=torch.int64)
    superclass_of[train.labels] = train.superclasses
    for part, split in splits.items():
        if split.superclasses is None:
            raise InputError(f"{path}: no array '{part}_superclasses' inside, though train_superclasses is there")
        odd = (superclass_of[split.labels] != split.superclasses).nonzero()
        if len(odd):
            raise InputError(f"{path}: {part}_superclasses: class {split.labels[odd[0, 0]]} is in two superclasses")
    return DataSpec(
        name,
        size,
        classes,
        class_names,
        superclasses=superclasses,
        superclass_names=superclass_names,
        superclass_of=tuple(superclass_of.tolist()),
    )


def counted(path: Path, key: str, arrays: Arrays, values: Tensor) -> tuple[int, tuple[str, ...]]:
    """How many classes (or superclasses) and their names: the file's, or the numbers as words."""
    top = int(values.max()) + 1
    if top > max(len(values), 2):
        raise InputError(f"{path}: the training labels go up to {top - 1}, with only {len(values)} images")
    what = {"class_names": ("train_labels", "class"), "superclass_names": ("train_superclasses", "superclass")}[key]
    if top < 2:
        raise InputError(f"{path}: {what[0]} holds one {what[1]} only; at least two are needed")
    if key not in arrays:
        none = (values.bincount(minlength=top) == 0).nonzero().flatten().tolist()
        if none:
            raise InputError(
                f"{path}: {what[0]} goes up to {top - 1} and has no image of {what[1]} {none[0]}; count from 0 without gaps, or "
                f"name them all in an array {key}"
            )
        return top, tuple(str(k) for k in range(top))
    names = tuple(str(name) for name in arrays[key].reshape(-1))
    if len(names) < top:
        raise InputError(f"{path}: {key} has {len(names)} names, but the training labels go up to {top - 1}")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: {key} names two of them alike")
    return len(names), names


def within(path: Path, key: str, labels: Tensor, classes: int) -> None:
    """Raises InputError where a label lies beyond the classes."""
    if int(labels.max()) >= classes:
        raise InputError(f"{path}: {key} goes up to {int(labels.max())}, but there are only {classes} classes")


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (N, H, W, 3) as (N, size, size, 3): bilinear, antialiased, a thousand images at a time."""
    if images.shape[1:3] == (size, size):
        return images
    parts = [
        F.interpolate(part.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
        for part in images.split(1000)
    ]
    return torch.cat(parts).contiguous()
