"""What a data set is: its options, its description, and its splits, in memory or as files on disk.

Letters of this room: N images of a split, B images of a batch, H W height and width.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dynroute.contracts import InputError

# ImageNet's statistics for every RGB set, so that imported ImageNet and CIFAR weights fit.
RGB_MEAN = (0.485, 0.456, 0.406)
RGB_STD = (0.229, 0.224, 0.225)

FIXED = ("shapes", "cifar10", "cifar100", "imagenet")  # names that say which data it is; of others the path tells
CUT_SEED = 2024  # of the fixed order behind limits and the calibration cut; never the training seed


@dataclass
class DataOptions:
    """Which images to load and how."""

    name: str = "shapes"
    """Data set: shapes (made on the fly), cifar10, cifar100, imagenet, folder or npz."""
    path: str | None = None
    """File (npz) or folder (folder, imagenet; CIFAR: download folder, by default "data", or .npz file). imagenet and CIFAR are
    taken at their word: call other images folder or npz, whose own names the tables show."""
    calibration: float = 0.1
    """Share of the training images cut off for calibration, unless the data brings its own val split."""
    image_size: int = 0
    """Side in pixels to which images are resized; 0 is the data set's own (folder: 32, imagenet: 224)."""
    train_images: int = 0
    """Use only so many training images, calibration included; 0 is all (shapes: 10000). What is held back for calibration depends
    on all that are used: a run of another number has trained on some of it."""
    test_images: int = 0
    """Use only so many test images, and of a val split the data brings; 0 is all (shapes: 2000)."""
    workers: int = 0
    """Processes that decode images which do not fit into memory; 0 chooses by the number of cores."""
    superclasses: str = "auto"
    """Superclasses of the classes: auto (the data set's own; imagenet: 58 WordNet categories), none, folders (of nested class
    folders, train/SUPERCLASS/CLASS), or a CSV file of class,superclass rows."""
    augment: bool = True
    """Random crops and horizontal flips of the training images. Crops are shifts by an eighth of the side; of data.name=imagenet,
    which is for photographs, random resized crops."""
    flip: bool = True
    """Horizontal flips among them; false where left and right matter (digits, text, organs)."""

    @property
    def label(self) -> str:
        """What tables call the data: its name, and where that is a format, or a plug-in's, the file's or folder's name too."""
        if self.name in FIXED or not self.path:
            return self.name
        place = Path(self.path).absolute()
        own = re.sub(r"[^\w.+=-]", "-", place.stem if self.name == "npz" else place.name)
        return f"{self.name}-{own}"


@dataclass(frozen=True)
class DataSpec:
    """What a net and a table need to know of a data set. Images are image_size x image_size RGB.

    superclasses: how many groups of classes, 0 for none; superclass_of[k]: the group of class k, () for none.
    mean, std: of each channel, on the 0..1 scale. flip: mirrored images are still of their class.
    """

    name: str
    image_size: int
    classes: int
    class_names: tuple[str, ...]
    channels: int = 3  # always: gray is repeated to RGB
    superclasses: int = 0
    superclass_names: tuple[str, ...] = ()
    superclass_of: tuple[int, ...] = ()
    mean: tuple[float, float, float] = RGB_MEAN
    std: tuple[float, float, float] = RGB_STD
    flip: bool = True
    augment: bool = True


@dataclass
class Split:
    """Images in memory. images: uint8 (N, H, W, 3); labels, superclasses: int64 (N,); difficulty: (N,)."""

    images: Tensor
    labels: Tensor
    superclasses: Tensor | None = None
    difficulty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """The split of these rows, in this order."""
        columns = (self.images, self.labels, self.superclasses, self.difficulty)
        return Split(*(None if column is None else column[rows] for column in columns))  # type: ignore[arg-type]


@dataclass
class FileSplit:
    """Images on disk, decoded batch by batch. short_side: pixels, before the centre crop; None: stretched to a square, uncut."""

    paths: list[Path]
    labels: Tensor
    short_side: int | None
    superclasses: Tensor | None = None
    difficulty: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> FileSplit:
        """The split of these rows, in this order."""
        own = {name: getattr(self, name) for name in ("superclasses", "difficulty")}
        taken = {name: values[rows] for name, values in own.items() if values is not None}
        return replace(self, paths=[self.paths[row] for row in rows.tolist()], labels=self.labels[rows], **taken)


AnySplit = TypeVar("AnySplit", bound="Split | FileSplit")


@dataclass
class Dataset:
    """A data set in three splits. Nothing but the final numbers may look at test."""

    spec: DataSpec
    train: Split | FileSplit
    calibration: Split | FileSplit
    test: Split | FileSplit


def fair_order(labels: Tensor) -> Tensor:
    """A fixed shuffled order of the rows of which every prefix holds the classes in their proportions.

    It depends on the labels (N,) alone: same data, same order, whatever the training seed.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(CUT_SEED))
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    classes = labels[by_class]
    rank = torch.arange(len(labels)) - starts[classes]  # of the row within its class
    key = torch.empty(len(labels), dtype=torch.float64)
    key[by_class] = (rank.double() + 0.5) / counts[classes]
    return shuffled[torch.sort(key[shuffled], stable=True).indices]


def split_fingerprint(data: Dataset) -> str:
    """Number and labels, in order, of the training and the calibration split: mostly others once images were added or taken
    away, which changes what is held back.
    """
    labels = (data.train.labels, data.calibration.labels)
    return "-".join(f"{len(some)}.{zlib.crc32(some.cpu().numpy().tobytes()):08x}" for some in labels)


def limited(split: AnySplit, images: int) -> AnySplit:
    """A stratified part of so many images, in the split's order; 0 is all of it."""
    if not 0 < images < len(split):
        return split
    return split.take(fair_order(split.labels)[:images].sort().values)  # type: ignore[return-value]


def cut(split: AnySplit, share: float) -> tuple[AnySplit, AnySplit]:
    """(rest, calibration): a stratified share of the rows, by `fair_order`, so the same in every run."""
    if len(split) < 2:
        raise InputError(f"a calibration split needs at least 2 training images, not {len(split)}")
    order = fair_order(split.labels)
    count = min(max(round(share * len(split)), 1), len(split) - 1)
    rest, calibration = (split.take(rows.sort().values) for rows in (order[count:], order[:count]))
    return rest, calibration  # type: ignore[return-value]


def assemble(
    spec: DataSpec, options: DataOptions, train: AnySplit, test: AnySplit, val: AnySplit | None = None
) -> Dataset:
    """The three splits under the options' limits. val, if the data brings one, is the calibration split."""
    train, test = limited(train, options.train_images), limited(test, options.test_images)
    if val is None:
        train, val = cut(train, options.calibration)
        if len(train) < 2:  # BatchNorm cannot train on one
            raise InputError("calibration leaves 1 training image of 2; give 3 or more, or lower data.calibration")
    else:
        val = limited(val, options.test_images)
        if len(train) < 2:
            raise InputError("there is 1 training image: give 2 or more")
    return Dataset(spec, train, val, test)
