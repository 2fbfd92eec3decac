"""The cheapest and the dearest images of a class, out of the thumbnails that `eval` stores. Each run at one target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.contracts import InputError
from dynroute.records import IMAGES_FILE, IMAGES_FOLDER, SETTING, read_rows
from dynroute.report.images import LATER, setting_of
from dynroute.report.pictures.style import Picture, finish, headings, panels, shortened
from dynroute.report.read import LeftOut, reason_of
from dynroute.report.routed import Routed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes

    Pixels = npt.NDArray[np.uint8]

NEEDED = ("split", "flops_target", "checkpoint", "label", "end", "rank", "index", "file")
ENDS = ("cheapest", "dearest")
WORDS = (
    "The cheapest and the dearest images of a class",
    "Test images that cost least (left) and most (right) among those of their class; beside them the span of what they cost, "
    "in % of the dense net's FLOPs. Of many classes ten, evenly over those whose images differ in cost.",
)


def listed(routed: Routed, left_out: list[LeftOut]) -> pd.DataFrame:
    """The run's stored images at its setting, with what they cost; empty where there are none, or none that can be read."""
    import pandas as pd

    file = routed.folder / IMAGES_FILE
    empty = pd.DataFrame(columns=[*NEEDED, "share"])
    if not file.exists():
        return empty
    wanted = dict(zip(SETTING, setting_of(routed.row), strict=True))
    try:
        rows = [
            row
            for row in read_rows(file)
            if all((row.get(k, "") if k in LATER else row[k]) == v for k, v in wanted.items())
        ]
        table = pd.DataFrame(rows, columns=list(NEEDED)).astype({"label": int, "rank": int, "index": int})
    except (InputError, KeyError, ValueError) as error:
        reason = reason_of(error, file) if isinstance(error, InputError) else "is not a list of images"
        left_out.append(LeftOut(file, f"{reason} (no images)"))
        return empty
    cost = routed.images.set_index("index")[["share", "macs", "predicted"]]
    return table.join(cost, on="index", how="inner")


def image_grid(runs: Sequence[tuple[Routed, pd.DataFrame]], out: Path) -> Picture:
    """Fig. 6 of DMNN: for each class a line, its cheapest images left, its dearest right. runs: with what `listed` gives."""
    import pandas as pd

    figure, axes = panels([0.34 * table["label"].nunique() for _, table in runs], 5.4, labels=0.7)
    titles = headings([routed for routed, _ in runs])
    for ax, (routed, table), title in zip(axes, runs, titles, strict=True):
        ax.set_title(title, pad=16)
        _grid(ax, routed, table)
    columns = ["run", "flops_target", "label", "end", "rank", "index", "predicted", "macs", "share", "file"]
    data = pd.concat([table.assign(run=r.label, flops_target=r.row["flops_target"]) for r, table in runs])
    return finish(figure, data[columns], "image_grid", WORDS, out)


def _grid(ax: Axes, routed: Routed, table: pd.DataFrame) -> None:
    """One picture for all images, in units of a thumbnail."""
    import numpy as np

    folder = routed.folder / IMAGES_FOLDER
    pixels = {file: _read(folder / file) for file in table["file"].unique()}
    side = max((image.shape[0] for image in pixels.values() if image is not None), default=32)
    labels = sorted(table["label"].unique())
    each = int(table["rank"].max()) + 1
    gap, across = 1.6, 2 * each + 1.6
    canvas = np.full((len(labels) * side, round(across * side), 3), 255, np.uint8)
    for label, end, rank, file in table[["label", "end", "rank", "file"]].itertuples(index=False):
        image = pixels[file]
        if image is None:
            continue
        left = round((rank if end == ENDS[0] else each + gap + rank) * side)
        top = labels.index(label) * side
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    ax.imshow(canvas, extent=(0, across, len(labels), 0), interpolation="none")
    for label, part in table.groupby("label"):
        for end, spent in part.groupby("end"):
            right = each + 0.1 if end == ENDS[0] else across + 0.1
            low, high = 100 * spent["share"].min(), 100 * spent["share"].max()
            text = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} - {high:.0f}"
            ax.text(right, labels.index(label) + 0.5, text, va="center", fontsize=8, clip_on=False)
    for end, x in zip(ENDS, (0.0, each + gap), strict=True):
        ax.text(x, -0.15, f"{end}, % of FLOPs", fontsize=8, va="bottom")
    names = [routed.classes.get(int(label), f"class {label}") for label in labels]
    ax.set_yticks([y + 0.5 for y in range(len(labels))], shortened(names, 18), fontsize=8)
    ax.set_xticks([])
    ax.set_xlim(0, across + 1.6)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _read(path: Path) -> Pixels | None:
    """A stored image; None where it is not there or no image, which leaves its place white."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError):
        return None
