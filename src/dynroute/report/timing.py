"""What a run's bench.csv tells: milliseconds of its rows, by the clock they were timed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynroute.contracts import InputError
from dynroute.records import read_rows, usual_clock

Row = dict[str, Any]
OWN = ("skipping", "masked")  # forms of the net itself; the others compute the dense net or all parts
DENSE = ("dense", "dense_best", "compiled", "onnxruntime")  # forms in which a full static net is timed too
NUMBERS = ("flops_target", "flops_max", "rate", "batch", "threads", "latency_ms_p50", "macs_share")
LATER = {
    "flops_max": "",
    "checkpoint": "last",
    "rate": "",
    "dtype": "fp32",
    "images_per_s": "",
    "speedup": "",
    "ideal_share": "",
    "clock": "",
}  # what stands in for a column
NEEDED = ("mode", "flops_target", "batch", "threads", "device", "latency_ms_p50", "macs_share", "machine")
FULL = 0.99  # share of the dense net's multiply-adds from which a static net is the dense net


CLOCKS = {"thread": "of processor time", "wall": "by the wall's clock", "cuda": "by CUDA's events"}


class Clock(NamedTuple):
    """What two times must share to be compared; they are per image. clock: of the thread, the wall's or cuda's; "": unknown."""

    batch: int
    threads: int
    device: str
    dtype: str
    machine: str
    clock: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        clock = CLOCKS.get(self.clock, self.clock)
        told = (f"batch {self.batch}", threads, self.device, self.dtype, self.machine)
        return ", ".join(filter(None, (f"ms {clock}".strip(), *told)))


class Taken(NamedTuple):
    """A time. ms: of an image in the mean, or the median where no mean is stored. speedup: over the best dense form, or nan."""

    ms: float
    speedup: float


def read_times(file: Path) -> list[Row]:
    """The rows of a bench.csv, numbers as float, empty ones as None. Raises InputError on a torn or foreign file."""
    rows = read_rows(file)
    missing = [name for name in NEEDED if rows and name not in rows[0]]
    if missing:
        raise InputError(f"{file} lacks the columns {', '.join(missing)}: written by another version or program")
    return [_typed({**LATER, **row}, file) for row in rows]


def of_row(row: Mapping[str, Any], timed: Iterable[Row]) -> dict[Clock, Taken]:
    """Milliseconds per image of an eval row, by clock: of the forms in which its own net was timed the fastest.

    A static net at full width is the dense net, and so has its forms too. The time that `eval --latency` left in the row counts.
    """
    full = row["method"] == "static" and row["macs_share"] > FULL
    found: dict[Clock, Taken] = {}
    for time in timed:
        own = time["mode"] in OWN and time["rate"] is None and _setting(time) == _setting(row)
        if own or (full and time["mode"] in DENSE):
            taken, clock = _taken(time), clock_of(time)
            found[clock] = min(found.get(clock, taken), taken)
    if row["latency_ms_p50"] is not None and row["latency_batch"] and row["latency_threads"]:
        sizes = int(row["latency_batch"]), int(row["latency_threads"])
        device = row["latency_device"]
        clock = Clock(*sizes, device, "fp32", row["machine"], usual_clock(device, sizes[1]))
        found.setdefault(clock, _taken(row))
    return found


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["flops_target"], row["flops_max"], row["checkpoint"] or "last"


def _taken(row: Mapping[str, Any]) -> Taken:
    mean = row.get("latency_ms_mean") or (
        1e3 / row["images_per_s"] if row.get("images_per_s") else row["latency_ms_p50"]
    )
    return Taken(mean, float("nan") if row["speedup"] is None else row["speedup"])


def clock_of(time: Row) -> Clock:
    """The clock of a row of `read_times`."""
    return Clock(
        int(time["batch"]), int(time["threads"]), time["device"], time["dtype"], time["machine"], time["clock"]
    )


def _typed(row: Mapping[str, str], file: Path) -> Row:
    try:
        numbers = {
            name: float(row[name]) if row[name] else None
            for name in (*NUMBERS, "images_per_s", "speedup", "ideal_share")
        }
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    if any(numbers[name] is None for name in ("batch", "threads", "latency_ms_p50")):
        raise InputError(f"{file}: a row without batch, threads or latency_ms_p50")
    return {**row, **numbers}
