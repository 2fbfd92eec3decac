"""Find and read the rows to compare; standard library only. What cannot be shown is named, with a reason."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynroute.contracts import InputError
from dynroute.records import BENCH_FILE, EVAL_FILE, RIGHT_FILE, ROUTES_FILE, TRAIN_FILE, base_name, read_eval
from dynroute.report.timing import of_row, read_times

Row = dict[str, Any]
CONFIG_FILE = "config.yaml"
TABLE_FILE, CONTROLS_FILE, TIMES_FILE, PAPERS_FILE = "table.csv", "controls.csv", "times.csv", "papers.csv"
REPORT_FILE = "routes_report.csv"
OWN_FILES = frozenset(
    {TABLE_FILE, CONTROLS_FILE, TIMES_FILE, PAPERS_FILE, REPORT_FILE}
)  # --out may be a results folder
RUN_FILES = frozenset({TRAIN_FILE, ROUTES_FILE, RIGHT_FILE, BENCH_FILE})
RIGHT_FOLDER = "right"  # beside CSVs that were copied out of runs: of each its right.csv, by its name
NEEDED = {"top1": 1.0, "macs_share": 1e6}  # the highest that is no mistake
BESIDE = (
    "parts",
    "variant",
    "trained_for",
    "routes_file",
    "right_file",
    "folder",
    "timed",
    "times",
)  # from files beside the rows


class LeftOut(NamedTuple):
    """A run or file that is not in the table, or not wholly, and why."""

    path: Path
    reason: str


def read(paths: Sequence[Path]) -> tuple[list[Row], list[LeftOut]]:
    """Test rows of run folders, folders of runs or of CSVs, single CSVs; one row per setting and seed.

    Raises InputError where a path does not exist, or where nothing at all can be shown.
    """
    found: list[tuple[Path, Row]] = []
    left_out: list[LeftOut] = []
    for file in dict.fromkeys(file for path in paths for file in _files(path)):
        try:
            rows = _test_rows(file)
        except InputError as error:
            left_out.append(LeftOut(_shown(file), reason_of(error, file)))
            continue
        timed = _timed(file.with_name(BENCH_FILE), left_out)
        for row in rows:
            row.update(timed=timed, times=of_row(row, timed))
        usable = [row for row in rows if all(_within(row[name], most) for name, most in NEEDED.items())]
        if len(usable) < len(rows):
            reason = f"{len(rows) - len(usable)} of {len(rows)} test rows have no {' or '.join(NEEDED)} that can be"
            left_out.append(LeftOut(_shown(file), reason))
        usable, orphans = _with_their_net(usable)
        if orphans:
            left_out.append(LeftOut(_shown(file), f"{orphans} controls without the row they were made from"))
        found += [(file, row) for row in usable]
    rows, repeats = _one_per_seed(found)
    left_out += repeats
    if not rows:
        raise InputError(_nothing(left_out))
    return rows, left_out


def identity(row: Row) -> str:
    """What the seeds of one experiment share. The config hash leaves out seed and name."""
    made = row["config_hash"] or base_name(row["run"])
    if row["flops_max"] is not None:
        made = f"{made}-max{row['flops_max']:g}"
    return made if row["checkpoint"] in ("", "last") else f"{made}-{row['checkpoint']}"


def _files(path: Path) -> Iterator[Path]:
    """The eval files that a path stands for; a run folder without one yields the name it would have."""
    if not path.exists():
        raise InputError(f"no such run or file: {path}{_nearest(path)}")
    if path.is_file():
        yield path
    elif _is_run(path):
        yield path / EVAL_FILE
    else:
        runs = [p / EVAL_FILE for p in sorted(path.iterdir()) if p.is_dir() and _is_run(p)]
        tables = [p for p in sorted(path.glob("*.csv")) if not _is_other(p)]
        yield from runs + tables or [path / EVAL_FILE]


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in (EVAL_FILE, TRAIN_FILE, CONFIG_FILE, "last.pt"))


def _is_other(file: Path) -> bool:
    """A CSV of a run or of a comparison that holds no rows of `eval`; the numbers of a picture lie beside its SVG."""
    return file.name in OWN_FILES | RUN_FILES or file.with_suffix(".svg").exists()


def _nearest(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _test_rows(file: Path) -> list[Row]:
    """The rows of split test; calibration rows took part in the fitting. Raises InputError on none."""
    if not file.exists():
        raise InputError(f"no {EVAL_FILE} yet: run `dynroute eval {file.parent}`")
    rows = read_eval(file)
    tested = [row for row in rows if row["split"] == "test"]
    if rows and not tested:
        raise InputError("only calibration rows, none of split test")
    if not rows:
        raise InputError("no rows")
    told = _told(file.with_name(CONFIG_FILE))
    routes, is_run = file.with_name(ROUTES_FILE), file.name == EVAL_FILE
    right = file.with_name(RIGHT_FILE) if is_run else file.parent / RIGHT_FOLDER / file.name
    beside = {
        "routes_file": str(routes) if routes.exists() else "",
        "right_file": str(right) if right.exists() else "",
        "folder": str(file.parent) if is_run else "",
    }
    return [{**row, **told, **beside} for row in tested]


def _timed(file: Path, left_out: list[LeftOut]) -> list[Row]:
    """The rows of a bench.csv, if there is one; none where it cannot be read, which is said in left_out."""
    if not file.exists():
        return []
    try:
        return read_times(file)
    except InputError as error:
        left_out.append(LeftOut(file, f"{reason_of(error, file)} (no times)"))
        return []


def _told(config: Path) -> Row:
    """What a run's own configuration tells beside its rows; empty where unknown. parts: into how many a block is cut.

    variant: the options of DMNN's ablation that are off, or "aig", as `recipes.VARIANTS` names them; or what of ours stands in
    the place of what its paper does: "flops" for the resource loss, "budget" for one net of all budgets.
    trained_for: router.target.
    """
    import yaml

    try:
        values = yaml.load(config.read_text(encoding="utf-8"), _loader())
        parts, router = values["backbone"]["parts"], values["router"]
        off = " ".join(name for name in ("category", "previous") if router.get(name) is False)
        budget, resource = router.get("budget"), router.get("resource")
        variant = "budget" if budget else resource if resource in ("aig", "flops") else off
        target = None if budget else router.get("target")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {"parts": "", "variant": "", "trained_for": ""}
    trained_for = f"{target:g}" if isinstance(target, int | float) else ""
    return {"parts": str(parts) if parts else "", "variant": variant, "trained_for": trained_for}


def _loader() -> Any:
    """A safe YAML loader, the one written in C where PyYAML has it: ten times as fast."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _with_their_net(rows: list[Row]) -> tuple[list[Row], int]:
    """The rows less those controls whose net's own row is not among them, and how many those are."""
    settings = {_setting(row) for row in rows if not row["control"]}
    kept = [row for row in rows if _setting(row) in settings]
    return kept, len(rows) - len(kept)


def _setting(row: Row) -> tuple[Any, ...]:
    return (*(row[k] for k in ("method", "backbone", "dataset", "flops_target", "seed")), identity(row))


def _one_per_seed(found: list[tuple[Path, Row]]) -> tuple[list[Row], list[LeftOut]]:
    """Keep one of the nets' own rows alike in setting and seed, with its controls: twice, they would pass for two seeds.

    The one trained for more epochs, if the other was stopped; else the last. Of rows that are the same throughout, the one
    with its routes at hand. A control of a row that is not kept goes with it.
    """
    kept: dict[tuple[Any, ...], tuple[Path, Row]] = {}
    repeats: dict[LeftOut, None] = {}
    for file, row in found:
        if row["control"]:
            continue
        key = _setting(row)
        same = key in kept and _numbers(kept[key][1]) == _numbers(row)
        if same and kept[key][1]["routes_file"] and not row["routes_file"]:
            continue
        if key in kept and (kept[key][1]["epochs"] or 0) > (row["epochs"] or 0):
            repeats[LeftOut(_shown(file), f"stopped early: {_shown(kept[key][0])} is the same for more epochs")] = None
            continue
        if key in kept and not same:
            reason = f"same configuration, seed and target as {_shown(file)}, which is shown in its place"
            repeats[LeftOut(_shown(kept[key][0]), reason)] = None
        kept[key] = (file, row)
    own = {(file, row["run"], _setting(row)): _numbers(row) for file, row in found if not row["control"]}
    controls: dict[tuple[Any, ...], Row] = {}
    for file, row in found:
        setting, key = _setting(row), (*_setting(row), row["control"])
        source, net = kept[setting]
        same = own.get((file, row["run"], setting)) == _numbers(net)
        if row["control"] and same and (key not in controls or file == source):
            controls[key] = row
    return [row for _, row in kept.values()] + list(controls.values()), list(repeats)


def _numbers(row: Row) -> str:
    """To tell rows apart by; text, since nan differs from itself. Less what was read beside the row."""
    return repr({name: value for name, value in row.items() if name not in BESIDE})


def _within(value: float | None, most: float) -> bool:
    return value is not None and 0 <= value <= most  # nan is not


def _shown(file: Path) -> Path:
    """A run goes by its folder."""
    return file.parent if file.name == EVAL_FILE and file.parent.name else file


def reason_of(error: InputError, file: Path) -> str:
    """The error without the path, which is shown beside it."""
    text = str(error).removeprefix(f"cannot read {file}: ").removeprefix(str(file)).lstrip(": ")
    return textwrap.shorten(text, 200, placeholder=" ...")


def _nothing(left_out: list[LeftOut]) -> str:
    if not left_out:
        return "nothing to compare: give one or more run folders or CSV files"
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return "nothing to compare: " + "; ".join(f"{path}: {reason}" for path, reason in left_out[:3]) + more
