"""Finds routers, backbones and data sets by name: the built-in dicts, then other packages' entry points.

A package adds to dynroute without touching it, in its pyproject.toml:

    [project.entry-points."dynroute.routers"]      # or dynroute.backbones, dynroute.datasets
    mine = "my_package.my_router:METHOD"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dynroute.backbones import BACKBONES
from dynroute.contracts import InputError, unknown
from dynroute.data import DATASETS
from dynroute.routers import ROUTERS, Method

BUILT_IN: dict[str, dict[str, Any]] = {"router": ROUTERS, "backbone": BACKBONES, "dataset": DATASETS}


def names(kind: str) -> list[str]:
    """All known names of a kind: router, backbone or dataset."""
    return [*BUILT_IN[kind], *(n for n in _added(kind) if n not in BUILT_IN[kind])]


def find(kind: str, name: str) -> Any:
    """The entry of that name. Raises InputError with the nearest valid name, or if a plug-in does not load."""
    if name in BUILT_IN[kind]:
        return BUILT_IN[kind][name]
    point = _added(kind).get(name)
    if point is None:
        raise unknown(kind, name, names(kind))
    try:
        found = point.load()
    except Exception as error:
        raise InputError(f"{kind} {name!r} of {point.value} does not load: {type(error).__name__}: {error}") from error
    if not (isinstance(found, Method) if kind == "router" else callable(found)):
        wanted = "a Method" if kind == "router" else "a function"
        raise InputError(f"{kind} {name!r} of {point.value} is not {wanted}: it is of type {type(found).__name__}")
    return found


def _added(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"dynroute.{kind}s")}
