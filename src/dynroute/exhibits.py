"""What an evaluation leaves beside routes.csv for `compare` to show: names of classes and units, some images.

N images of the split, U units, G parts. `report` reads these files without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynroute.contracts import UnitSpec
from dynroute.data import DataSpec, FileSplit, Split, loader
from dynroute.measure import Scores
from dynroute.records import (
    CLASSES_FILE,
    IMAGES_FILE,
    IMAGES_FOLDER,
    UNITS_FILE,
    locked,
    read_rows,
    write_file,
    write_rows,
)

ENDS = 5  # images from each end of a class's costs
CLASSES = 10  # classes of which images are kept
SIDE = 64  # pixels; larger images are made smaller


def write_names(folder: Path, spec: DataSpec, units: list[UnitSpec]) -> None:
    """Write classes.csv (label, class, and superclass where there are some) and units.csv (a row a unit of the route)."""
    rows: list[dict[str, Any]] = [{"label": k, "class": name} for k, name in enumerate(spec.class_names)]
    for row, group in zip(rows, spec.superclass_of, strict=bool(spec.superclasses)):
        row |= {"superclass": group, "superclass_name": spec.superclass_names[group]}
    write_rows(folder / CLASSES_FILE, rows)
    names = ("name", "form", "parts", "stage")
    write_rows(folder / UNITS_FILE, [{"unit": u, **{k: getattr(s, k) for k in names}} for u, s in enumerate(units)])


def write_images(
    folder: Path, setting: dict[str, str], scores: Scores, split: Split | FileSplit, spec: DataSpec
) -> None:
    """Store the cheapest and the dearest test images of some classes as PNG files, listed in images.csv; uint8 as read.

    setting: split, flops_target, flops_max and checkpoint, as in routes.csv; other settings' rows stay, and files that no row
    names go. Nothing is added where all images cost the same.
    """
    chosen = ends(scores.label_N, scores.macs_N)
    places = [place for _, _, _, place in chosen]
    files = {place: f"{setting['split']}_{int(scores.index_N[place]):06d}.png" for place in places}
    rows = [
        {**setting, "label": label, "end": end, "rank": rank, "index": int(scores.index_N[place]), "file": files[place]}
        for label, end, rank, place in chosen
    ]
    pixels = _pixels(split.take(scores.index_N[list(files)]), spec)
    with locked(folder):
        path = folder / IMAGES_FILE
        old = read_rows(path) if path.exists() else []
        kept: list[dict[str, Any]] = [r for r in old if any(r.get(k, "") != v for k, v in setting.items())]
        if not kept and not rows:
            return
        for name, image in zip(files.values(), pixels, strict=True):
            _save(image, folder / IMAGES_FOLDER / name)
        write_rows(path, [*kept, *rows])
        named = {row["file"] for row in [*kept, *rows]}
        for file in (folder / IMAGES_FOLDER).glob("*_*.png"):
            if file.name not in named:
                file.unlink()


def ends(label_N: Tensor, macs_N: Tensor) -> list[tuple[int, str, int, int]]:
    """(label, cheapest or dearest, rank from that end, place in N) of the images to keep; none where all cost the same.

    Ours: ten classes, evenly over those whose images differ in cost, and five images from each end of a class, fewer where it
    has not ten; images of equal cost stand in the split's order, so that none is at both ends.
    """
    varied = [k for k in label_N.unique().tolist() if len(macs_N[label_N == k].unique()) > 1]
    if not varied:
        return []
    spaced = torch.linspace(0, len(varied) - 1, min(CLASSES, len(varied))).round().long().tolist()
    found: list[tuple[int, str, int, int]] = []
    for label in (varied[k] for k in spaced):
        places = (label_N == label).nonzero()[:, 0]
        ordered = places[torch.sort(macs_N[places], stable=True).indices].tolist()
        count = min(ENDS, len(ordered) // 2)
        for end, nearest in (("cheapest", ordered[:count]), ("dearest", ordered[::-1][:count])):
            found += [(label, end, rank, place) for rank, place in enumerate(nearest)]
    return found


def _pixels(split: Split | FileSplit, spec: DataSpec) -> list[np.ndarray[Any, Any]]:
    """The images as the net saw them, less the normalisation: uint8 (H, W, 3)."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    found: list[np.ndarray[Any, Any]] = []
    for batch in loader(split, spec, 64, train=False, workers=1) if len(split) else ():
        values = ((batch.images * std + mean) * 255).round().clamp(0, 255).byte()
        found += list(values.permute(0, 2, 3, 1).contiguous().numpy())
    return found


def _save(pixels: np.ndarray[Any, Any], path: Path) -> None:
    """One PNG, written in one step."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    write_file(path, lambda file: image.save(file, "PNG"))
