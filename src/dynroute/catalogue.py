"""What `dynroute list` names: methods, nets, data sets, the papers' tables, and the experiments at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynroute import plugins, report
from dynroute.contracts import InputError
from dynroute.routers import Method

KINDS = {"routers": "router", "backbones": "backbone", "datasets": "dataset"}
EXPERIMENTS = Path("experiments")


def listing(kind: str | None = None) -> dict[str, dict[str, str]]:
    """Names with a sentence each, by kind; all kinds if none is given."""
    out: dict[str, dict[str, str]] = {}
    for plural, singular in KINDS.items():
        out[plural] = {name: _about(singular, name) for name in plugins.names(singular)}
    out["papers"] = report.paper_tables()
    out["experiments"] = {str(path): _first_comment(path) for path in sorted(EXPERIMENTS.rglob("*.yaml"))}
    if kind == "experiments" and not out[kind]:
        raise InputError(
            f"no {EXPERIMENTS}/ here: the configurations of the papers' tables are in dynroute's repository"
        )
    return {kind: out[kind]} if kind else out


def _about(kind: str, name: str) -> str:
    """A sentence; of a plug-in that does not load, why not: it must not hide the others."""
    try:
        return _sentence(plugins.find(kind, name))
    except InputError as error:
        return f"({error})"


def _sentence(entry: Any) -> str:
    """A method's own sentence, else the first line of the entry's docstring."""
    if isinstance(entry, Method):
        return entry.about
    entry = getattr(entry, "func", entry)  # of a partial
    return (entry.__doc__ or "").strip().split("\n")[0]


def _first_comment(path: Path) -> str:
    try:
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return first.removeprefix("#").strip() if first.startswith("#") else ""
