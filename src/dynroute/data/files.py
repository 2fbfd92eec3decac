"""Decoding image files: whole small splits into memory, big ones image by image in the loader's processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from dynroute.contracts import InputError
from dynroute.data.spec import DataSpec, FileSplit, Split
from dynroute.processors import processors

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}


def read_image(path: Path) -> Image.Image:
    """The image as 8-bit RGB: gray is repeated, alpha dropped, 16-bit gray scaled. InputError: a bad file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, once for each file
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip at 255
                    deep = np.asarray(image, dtype=np.int64).clip(0, 65535)
                    byte = image.mode == "I" and deep.max() < 256  # 32-bit gray of 8-bit values
                    return Image.fromarray((deep if byte else deep >> 8).astype(np.uint8)).convert("RGB")
                if image.mode == "F":
                    raise ValueError("gray in floating point, whose range it does not tell; save it as 8 or 16 bits")
                if image.mode == "P":  # a palette may carry transparency as bytes, which RGB alone cannot take
                    return image.convert("RGBA").convert("RGB")
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def centre(image: Image.Image, size: int, short_side: int | None) -> Image.Image:
    """The image with its short side resized to short_side pixels, then the square of `size` in its middle; see FileSplit."""
    if short_side is None:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    scale = short_side / min(image.size)
    width, height = (max(round(side * scale), short_side) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def into_memory(split: FileSplit, size: int) -> Split:
    """The decoded split, uint8 (N, size, size, 3), by a pool of threads: Pillow decodes outside the lock."""
    images = np.empty((len(split), size, size, 3), np.uint8)

    def decode(row: int) -> None:
        images[row] = np.asarray(centre(read_image(split.paths[row]), size, split.short_side))

    with ThreadPoolExecutor(min(len(processors()), 16)) as pool:
        list(pool.map(decode, range(len(split))))
    return Split(torch.from_numpy(images), split.labels)


class FileImages(TorchDataset):
    """Rows of a FileSplit as uint8 (H, W, 3). An unreadable file is returned as its InputError, not raised:
    a loader process would wrap it into a page of traceback."""

    def __init__(self, split: FileSplit, spec: DataSpec, augment: bool, seeds: tuple[int, int]) -> None:
        self.split, self.size, self.seeds = split, spec.image_size, seeds
        self.randomly = random_crop(spec) if augment else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Tensor | InputError:
        try:
            image = read_image(self.split.paths[row])
        except InputError as error:
            return error
        if self.randomly is None:
            image = centre(image, self.size, self.split.short_side)
        else:  # seeded by the row, so that the number of processes changes nothing
            with torch.random.fork_rng(devices=[]):
                state = np.random.SeedSequence([part % 2**64 for part in (*self.seeds, row)])
                torch.default_generator.manual_seed(int(state.generate_state(1)[0]))
                image = self.randomly(image)
        return torch.from_numpy(np.array(image))


def random_crop(spec: DataSpec) -> Callable[[Image.Image], Image.Image]:
    """The usual ImageNet augmentation: a random resized crop and, if the spec allows, a horizontal flip."""
    from torchvision import transforms

    flip = [transforms.RandomHorizontalFlip()] if spec.flip else []
    return transforms.Compose([transforms.RandomResizedCrop(spec.image_size), *flip])


def collate(images: list[Tensor | InputError]) -> Tensor | InputError:
    """The images stacked, or the first error among them."""
    errors = [image for image in images if isinstance(image, InputError)]
    return errors[0] if errors else torch.stack(images)  # type: ignore[arg-type]
