"""The forms that `FastNet.warm_up` found fastest, kept in a file beside the checkpoint they were measured with."""

from __future__ import annotations

import json
from pathlib import Path

from dynroute.contracts import InputError
from dynroute.records import write_text
from dynroute.skipping.unit import MASKED, SORTED, VIEWS

Forms = dict[int, list[str]]  # by size of the minibatch: of each unit
FORMAT = 1
NEAR = 2  # forms hold for minibatches of up to twice or half the size at which they were measured (ours)


def forms_for(forms: Forms, images: int) -> list[str] | None:
    """The forms measured at the size nearest to this one, if that is near enough."""
    size = min(forms, key=lambda size: max(size / images, images / size), default=None)
    return forms[size] if size and max(size / images, images / size) <= NEAR else None


def save_forms(file: Path, checkpoint: str, place: str, forms: Forms) -> None:
    """Add them to the file; forms of another checkpoint or place that stand there go.

    checkpoint: its fingerprint; place: processor and PyTorch, since what is fastest is another thing elsewhere.
    """
    try:
        old = _read(file, checkpoint, place)
    except InputError:
        old = {}
    sizes = {str(size): names for size, names in sorted({**old, **forms}.items())}
    content = {"format": FORMAT, "checkpoint": checkpoint, "place": place, "forms": sizes}
    write_text(file, json.dumps(content, indent=1) + "\n")


def load_forms(file: Path, checkpoint: str, place: str, units: int) -> Forms:
    """What the file holds for this checkpoint and place; nothing if there is no file. Raises InputError for a broken file."""
    forms = _read(file, checkpoint, place)
    if any(len(names) != units for names in forms.values()):
        raise InputError(f"{file} is of a net of other units; delete it")
    return forms


def _read(file: Path, checkpoint: str, place: str) -> Forms:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["format"], content["checkpoint"], content["place"]) != (FORMAT, checkpoint, place):
            return {}
        forms = {int(size): list(map(str, names)) for size, names in content["forms"].items()}
        if any(size < 1 or set(names) - {VIEWS, SORTED, MASKED} for size, names in forms.items()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(f"{file} is not a table of forms ({type(error).__name__}); delete it") from None
    return forms
