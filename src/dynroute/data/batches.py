"""Minibatches of a split. A training epoch depends on (seed, epoch) alone, so a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from dynroute.contracts import Batch, InputError
from dynroute.data.files import FileImages, collate
from dynroute.data.spec import DataSpec, FileSplit, Split
from dynroute.processors import processors

SHIFTED = "folder"  # data whose crops do not depend on whether they have room in memory


@dataclass
class Loader:
    """A sized iterable of `Batch`; iterating again gives the same batches again."""

    split: Split | FileSplit
    spec: DataSpec
    batch_size: int
    train: bool
    seed: int
    epoch: int
    device: torch.device | str
    workers: int

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest >= (2 if self.train else 1))

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        count = len(self.split)
        order = torch.randperm(count, generator=generator) if self.train else torch.arange(count)
        rows = order.split(self.batch_size)[: len(self)]
        read = self._from_memory if isinstance(self.split, Split) else self._from_files
        for rows_B, images_BHWC in read(rows, generator):
            superclasses = None if self.split.superclasses is None else self.split.superclasses[rows_B]
            batch = Batch(images_BHWC, self.split.labels[rows_B], superclasses, rows_B).to(self.device)
            yield batch._replace(images=normalise(batch.images, self.spec))

    def _from_memory(self, rows: tuple[Tensor, ...], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self.split, Split)
        for rows_B in rows:
            images_BHWC = self.split.images[rows_B].to(self.device)
            if self.train and self.spec.augment:
                images_BHWC = augment(images_BHWC, images_BHWC.shape[1] // 8, self.spec.flip, generator)
            yield rows_B, images_BHWC

    def _from_files(self, rows: tuple[Tensor, ...], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(self.split, FileSplit)
        augmented = self.train and self.spec.augment
        shifted = augmented and self.spec.name == SHIFTED
        images = FileImages(self.split, self.spec, augmented and not shifted, (self.seed, self.epoch))
        stream = DataLoader(
            images,
            batch_sampler=[rows_B.tolist() for rows_B in rows],
            num_workers=min(self.workers or min(len(processors()), 8), len(rows)),
            collate_fn=collate,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for rows_B, images_BHWC in zip(rows, stream, strict=True):
            if isinstance(images_BHWC, InputError):
                raise images_BHWC
            if shifted:
                images_BHWC = augment(images_BHWC, images_BHWC.shape[1] // 8, self.spec.flip, generator)
            yield rows_B, images_BHWC


def loader(
    split: Split | FileSplit,
    spec: DataSpec,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Loader:
    """Batches of normalised float32 images (B, 3, H, W), channels_last, on the device; index: split rows.

    train: shuffled and, if spec.augment, cropped and flipped at random, all from (seed, epoch); a last batch
    of one image is dropped, as BatchNorm cannot train on it. Otherwise all images, in order, nothing random.
    Images in memory, and those of data.name=folder wherever they lie, are padded by image_size // 8 zeros and cropped; other
    files get a random resized crop.
    workers: processes for a FileSplit, 0 = automatic. Raises InputError for a bad batch size or image file.
    """
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")
    return Loader(split, spec, batch_size, train, seed, epoch, device, workers)


def mixed_seed(*parts: int) -> int:
    """One seed from several integers, well mixed: (1, 0) and (0, 1) have nothing in common."""
    return int(np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def normalise(images_BHWC: Tensor, spec: DataSpec) -> Tensor:
    """(x / 255 - mean) / std as float32 (B, C, H, W) in channels_last; images_BHWC: uint8."""
    mean = torch.tensor(spec.mean, device=images_BHWC.device) * 255
    std = torch.tensor(spec.std, device=images_BHWC.device) * 255
    images_BCHW = images_BHWC.float().sub_(mean).div_(std).permute(0, 3, 1, 2)
    return images_BCHW.contiguous(memory_format=torch.channels_last)


def augment(images_BHWC: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `padding` pixels, zeros flowing in, and mirrored with probability one half.

    The whole batch at once, on its device; the draws are made on the CPU, so that every device sees the same.
    """
    count, height, width, _ = images_BHWC.shape
    device = images_BHWC.device
    draws = torch.randint(2 * padding + 1, (2, count), generator=generator).to(device)
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
    if flip:
        images_BHWC = torch.where(mirrored[:, None, None, None], images_BHWC.flip(2), images_BHWC)
    padded = F.pad(images_BHWC, (0, 0, padding, padding, padding, padding))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)  # a view: no copies
    return windows[torch.arange(count, device=device), draws[0], draws[1]]
