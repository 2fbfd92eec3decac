"""Result rows and their CSV files. Standard library only, so that tables can be made without torch."""

from __future__ import annotations

import csv
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from dynroute.contracts import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

EVAL_FILE, TRAIN_FILE, ROUTES_FILE, RIGHT_FILE = "eval.csv", "train.csv", "routes.csv", "right.csv"
BENCH_FILE, BUDGET_FILE, FORMS_FILE = "bench.csv", "budget.json", "forms.json"
CLASSES_FILE, UNITS_FILE, IMAGES_FILE, IMAGES_FOLDER = "classes.csv", "units.csv", "images.csv", "images"
UNNAMED = ("npz", "folder")  # what a user's own data were called before they went by their names
SETTING = ("split", "flops_target", "flops_max", "checkpoint")  # columns that tell evaluations of a run apart


@dataclass
class EvalRow:
    """One evaluation of one run at one setting. MACs are multiply-adds per image, router included.

    macs_share: macs_mean / macs_dense. share_calib: the share reached on the calibration split, where the price was
    fitted. flops_target: the asked share, None for the trained point. top1, top5: 0..1. loss: mean cross entropy.
    router_share: the router's MACs / macs_dense. routes: number of distinct routes. latency_*,
    speedup: of the skipping run (see `BenchRow`), where --latency asked for them.
    control: empty for the net itself, else the name of the control that was made from its routes (see `controls`).
    price_other, price_part: another price for that part of the images (see `contracts.Setting`). share_low, share_high: 95 %
    interval of the share to expect of new images, from calibration. precision: that the run was trained in, both where it was
    resumed on another processor. flops_max: the share that no image may exceed, if any.
    """

    run: str
    method: str
    backbone: str
    dataset: str
    seed: int
    split: str
    flops_target: float | None
    price: float
    share_calib: float | None
    macs_mean: float
    macs_p5: float
    macs_p95: float
    macs_dense: float
    macs_share: float
    router_share: float
    top1: float
    top5: float
    loss: float
    n: int
    routes: int
    params: int
    epochs: float
    checkpoint: str = "last"
    control: str = ""
    price_other: float | None = None
    price_part: float | None = None
    share_low: float | None = None
    share_high: float | None = None
    flops_max: float | None = None
    weights: str = ""
    precision: str = ""
    latency_ms_p50: float | None = None
    latency_ms_mean: float | None = None
    speedup: float | None = None
    latency_batch: int | None = None
    latency_threads: int | None = None
    latency_device: str = ""
    machine: str = ""
    commit: str = ""
    config_hash: str = ""
    torch: str = ""


@dataclass
class BenchRow:
    """How long one form of a net took at one setting. Times are milliseconds by `clock`; all rows of one batch size and
    thread count were timed in turn, on the same images.

    mode: dense (as PyTorch runs it), dense_best (the fastest of the forms of the dense net, named in `form`), compiled,
    onnxruntime (both dense), onnx_skipping (the routed net there), all_on (the routed net's executor with every part on),
    masked, skipping.
    routes: who chose them: router, or random or uniform draws. flops_target, flops_max, rate: of the setting, empty if none.
    latency_ms_*: per image; call_ms_p50: of the whole batch; wall_ms_p50: per image, by the wall's clock.
    images_per_s: from the mean time. speedup: dense_best's mean time / this mean time.
    macs_mean: multiply-adds per image of the images run, as routed; macs_share: of the dense net's. ideal_share: speed-up over
    all_on as a share of the ratio of their multiply-adds. router_ms: all decisions of an image, run by themselves.
    clock: thread (processor time of the one thread), wall or cuda (events). affinity: processors this process may use.
    """

    run: str
    method: str
    backbone: str
    dataset: str
    mode: str
    form: str = ""
    routes: str = ""
    flops_target: float | None = None
    flops_max: float | None = None
    checkpoint: str = "last"
    rate: float | None = None
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    dtype: str = "fp32"
    latency_ms_p50: float = 0.0
    latency_ms_p95: float = 0.0
    call_ms_p50: float = 0.0
    wall_ms_p50: float = 0.0
    images_per_s: float = 0.0
    speedup: float | None = None
    macs_mean: float = 0.0
    macs_share: float = 0.0
    ideal_share: float | None = None
    router_ms: float | None = None
    clock: str = ""
    rounds: int = 0
    affinity: str = ""
    machine: str = ""
    commit: str = ""
    config_hash: str = ""
    torch: str = ""


def usual_clock(device: str, threads: int) -> str:
    """The clock that is chosen where none is asked for: that of the thread where one does all the work."""
    return "cuda" if device.startswith("cuda") else "thread" if threads == 1 else "wall"


BENCH_COLUMNS = tuple(f.name for f in fields(BenchRow))
BENCH_KEY = ("mode", "flops_target", "flops_max", "checkpoint", "rate", "batch", "threads", "device", "dtype", "clock")
EVAL_COLUMNS = tuple(f.name for f in fields(EvalRow))
LATER = frozenset(
    {"control", "price_other", "price_part", "share_low", "share_high", "flops_max", "latency_ms_mean", "precision"}
)  # columns that older files lack; there they are empty
NUMBERS = frozenset(f.name for f in fields(EvalRow) if "float" in str(f.type) or "int" in str(f.type))


def as_dict(row: EvalRow | BenchRow) -> dict[str, Any]:
    """The row as a plain dict, in column order."""
    return asdict(row)


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace the file in one step: a reader sees the old one or the new, never a half of it. Makes its folder.

    An OSError names the file, not the temporary one.
    """
    try:
        _write_file(path, write)
    except OSError as error:
        if error.filename and not Path(error.filename).name.startswith(f".{path.name}."):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def check_writable(folder: Path) -> None:
    """Raise InputError where no file can be made in a folder: better before an hour's work than after it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None


def _write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while a file in it is read, changed and replaced, so that of two programs neither's rows are lost.

    Where the system has no such locks (Windows) nothing is held. Makes the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which lets go of it


def route_text(keep_UG: Sequence[Sequence[int]], parts_U: Sequence[int]) -> str:
    """A route as files have it: a 0 or 1 a part, units between slashes. keep_UG: padded; parts_U: how many are the unit's own."""
    return "/".join("".join(map(str, keep[:parts])) for keep, parts in zip(keep_UG, parts_U, strict=True))


def right_text(right: Iterable[bool]) -> str:
    """Which images were answered rightly, as right.csv has it: four images a hexadecimal digit, the first in its highest bit."""
    bits = "".join("1" if each else "0" for each in right)
    bits += "0" * (-len(bits) % 4)
    return f"{int(bits, 2):0{len(bits) // 4}x}" if bits else ""


def right_of(text: str, images: int) -> list[int]:
    """0 or 1 for each image, from `right_text`. Raises ValueError where it is not of so many images."""
    if images < 1 or len(text) != -(-images // 4):
        raise ValueError(f"{len(text)} digits for {images} images")
    return [int(bit) for bit in f"{int(text, 16):0{4 * len(text)}b}"[:images]]


def write_text(path: Path, text: str) -> None:
    """`write_file` of a text."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV, atomically. Columns: as given, else all keys in the order first seen. None becomes empty."""
    rows = list(rows)
    names = list(columns) if columns else list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())


def read_text(path: Path) -> str:
    """The text of a CSV written by `write_rows`. Raises InputError on a missing or torn file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not text.endswith("\n"):
        raise InputError(f"{path} ends in the middle of a line: half-written or not a CSV of dynroute")
    return text


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV written by `write_rows`; every cell a string. Raises InputError on a missing, torn or foreign file."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path)), restkey="", restval=None))
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV: {error}") from None
    if any("" in row or None in row.values() for row in rows):
        raise InputError(f"{path} has lines that do not fit its header")
    return rows


def read_eval(path: Path) -> list[dict[str, Any]]:
    """Read an eval.csv: numbers as float, empty cells as None. Raises InputError where a column is missing or no number."""
    rows = read_rows(path)
    missing = [c for c in EVAL_COLUMNS if rows and c not in rows[0] and c not in LATER]
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(missing)}: written by another version or program")
    return [{c: _value(path, c, row.get(c, "")) for c in EVAL_COLUMNS} for row in rows]


def merge_eval(path: Path, row: EvalRow) -> None:
    """Add a row to an eval.csv in place of the one of the same split, target, limit, checkpoint and control.

    So a repeated call adds nothing. Rows of before a user's own data had a name (npz, folder) take it and its hash over.
    Where the net's own row has changed, the controls made from the old one go too; where it has not, a time measured on the
    same machine stays with it.
    """
    with locked(path.parent):
        _merge_eval(path, row)


def _merge_eval(path: Path, row: EvalRow) -> None:
    old = read_rows(path) if path.exists() else []
    new = {k: _cell(v) for k, v in as_dict(row).items()}
    old = [{k: r.get(k, "") for k in EVAL_COLUMNS} | {"checkpoint": r.get("checkpoint") or "last"} for r in old]
    there = [r for r in old if all(r[k] == new[k] for k in SETTING)]
    changed = any(not r["control"] and any(r[k] != new[k] for k in ("macs_mean", "top1", "n")) for r in there)
    replaced = there if changed and not row.control else [r for r in there if r["control"] == row.control]
    timed = [r for r in replaced if r["latency_ms_p50"] and r["machine"] == new["machine"]]
    if timed and not changed and not new["latency_ms_p50"]:
        new |= {k: timed[0][k] for k in EVAL_COLUMNS if k.startswith("latency_") or k == "speedup"}
    named = {k: new[k] for k in ("dataset", "config_hash")}
    kept = [r for r in old if r not in replaced]
    kept = [r | named if r["dataset"] in UNNAMED and new["dataset"].startswith(f"{r['dataset']}-") else r for r in kept]
    write_rows(path, [*kept, new], EVAL_COLUMNS)


def image_setting(split: str, target: float | None, most: float | None, checkpoint: str) -> dict[str, str]:
    """The cells under SETTING of the rows for single images. most: the share that no image may exceed."""
    return dict(zip(SETTING, (split, _cell(target), _cell(most), checkpoint), strict=True))


def merge_bench(path: Path, rows: Sequence[BenchRow]) -> None:
    """Add rows to a bench.csv in place of those of the same mode, setting, checkpoint, batch, threads, device, type and clock."""
    with locked(path.parent):
        _merge_bench(path, rows)


def _merge_bench(path: Path, rows: Sequence[BenchRow]) -> None:
    new = [{k: _cell(v) for k, v in as_dict(row).items()} for row in rows]
    replaced = {tuple(row[k] for k in BENCH_KEY) for row in new}
    old = [{k: row.get(k, "") for k in BENCH_COLUMNS} for row in (read_rows(path) if path.exists() else [])]
    old = [row | {"checkpoint": row["checkpoint"] or "last"} for row in old]
    kept = [row for row in old if tuple(row[k] for k in BENCH_KEY) not in replaced]
    write_rows(path, [*kept, *new], BENCH_COLUMNS)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(path: Path, column: str, text: str) -> Any:
    if column not in NUMBERS:
        return text
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{path}: {column} is {text!r}, not a number") from None


def base_name(run: str) -> str:
    """The name of a run or of its folder without its seed: `dmnn-seed3` and `dmnn_s3` are both `dmnn`."""
    return re.sub(r"[-_](seed|s)\d+$", "", run)


def nearest(folder: Path) -> str:
    """What follows "there is no such folder": the most similar name beside it, if there is one."""
    import difflib

    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    return f"; did you mean {folder.parent / near[0]}?" if near else ""
