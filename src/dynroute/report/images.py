"""A table with a row for each image of a run at a setting: routes.csv."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynroute.contracts import InputError
from dynroute.records import SETTING, image_setting, read_text
from dynroute.report.read import Row

if TYPE_CHECKING:
    import pandas as pd

LATER = ("flops_max",)  # columns that older files lack: empty there


def setting_of(row: Row) -> tuple[str, ...]:
    """The values of SETTING that the test images of a row of eval.csv have."""
    target, most = (None if x != x else x for x in (row["flops_target"], row["flops_max"]))  # nan: none
    return tuple(image_setting("test", target, most, row["checkpoint"] or "last").values())


def read_images(file: Path, columns: Mapping[str, str], optional: Mapping[str, str] | None = None) -> pd.DataFrame:
    """These columns, by name and type, and those of SETTING as text. optional: columns that need not be there.

    Raises InputError on a missing, torn or foreign file.
    """
    import pandas as pd

    text = read_text(file)
    head = text.split("\n", 1)[0].split(",")
    missing = [name for name in (*SETTING, *columns) if name not in head and name not in LATER]
    if missing:
        raise InputError(f"{file} lacks the columns {', '.join(missing)}: written by another version or program")
    if text.count(",") != text.count("\n") * (len(head) - 1):  # no cell of ours is quoted
        raise InputError(f"{file} has lines that do not fit its header")
    wanted = {**dict.fromkeys(SETTING, "str"), **columns, **(optional or {})}
    kinds = {name: kind for name, kind in wanted.items() if name in head}
    gaps = {name: [""] for name, kind in kinds.items() if kind == "float64"}
    try:
        table = pd.read_csv(io.StringIO(text), usecols=list(kinds), keep_default_na=False, na_values=gaps, dtype=kinds)
    except ValueError as error:  # pandas' ParserError is one
        raise InputError(f"{file} is not a table of images: {error}") from None
    return table.assign(**{name: "" for name in LATER if name not in head})
