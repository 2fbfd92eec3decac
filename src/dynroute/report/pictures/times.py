"""The milliseconds of evaluated rows: out of bench.csv beside the run, else as `eval --latency` left them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynroute.contracts import InputError
from dynroute.records import EVAL_FILE, read_rows
from dynroute.report.pictures.style import series_name
from dynroute.report.read import LeftOut, Row, identity, reason_of
from dynroute.report.tables import PLACE, labels

if TYPE_CHECKING:
    import pandas as pd

BENCH_FILE = "bench.csv"
CLOCK = ["batch", "threads", "device", "dtype", "machine"]  # times are comparable within one of these
TIME_COLUMNS = [*PLACE, *CLOCK, "series", "flops_target", "latency_ms_p50", "speedup", "top1", "n_seeds", "source"]


def time_points(rows: Sequence[Row], left_out: list[LeftOut]) -> pd.DataFrame:
    """The numbers behind accuracy against latency: means over the seeds that were timed alike. Controls are left out."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    frame["identity"] = [identity(row) for row in rows]
    frame["label"] = labels(frame)
    named = zip(rows, frame["identity"], frame["label"], strict=True)
    own = [{**row, "identity": made, "label": label} for row, made, label in named if not row["control"]]
    folders = dict.fromkeys(row["folder"] for row in own if row["folder"])
    bench = {folder: read_bench(Path(folder) / BENCH_FILE, left_out) for folder in folders}
    timed = [time for row in own for time in _timed(row, bench.get(row["folder"], []))]
    places = [*PLACE, *CLOCK, "series", "method", "flops_target", "identity", "source"]
    if not timed:
        return pd.DataFrame(columns=[*TIME_COLUMNS, "method"])
    groups = pd.DataFrame(timed).groupby(places, dropna=False)
    pooled = groups[["latency_ms_p50", "speedup", "top1"]].mean().join(groups.size().rename("n_seeds")).reset_index()
    return pooled[[*TIME_COLUMNS, "method"]]


def _timed(row: Row, bench: Sequence[Row]) -> list[Row]:
    """What is known of the time of one row: those of bench.csv at its target, else its own columns, if any."""
    own = {k: row[k] for k in (*PLACE, "method", "identity", "flops_target", "top1")}
    own["series"] = series_name(row["method"], row["label"])
    found = [time for time in bench if time["flops_target"] == _written(row["flops_target"])]
    if not found and row["latency_ms_p50"] is not None:
        clock = {k: _written(row[f"latency_{k}"]) for k in ("batch", "threads", "device")}
        times = {k: row[k] for k in ("latency_ms_p50", "speedup", "machine")}
        found = [{**clock, **times, "dtype": "fp32", "source": EVAL_FILE}]
    return [{**time, **own} for time in found]


def _written(value: Any) -> str:
    """As in a CSV."""
    if value is None:
        return ""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def read_bench(path: Path, left_out: list[LeftOut]) -> list[Row]:
    """The rows of a bench.csv that skip under the run's own router; none, and a word in left_out, where it cannot be read."""
    if not path.exists():
        return []
    try:
        rows = [row for row in read_rows(path) if row["mode"] == "skipping" and row.get("routes", "") in ("", "router")]
        return [
            {
                **{k: row.get(k, "") for k in CLOCK},
                "dtype": row.get("dtype") or "fp32",
                "flops_target": row["flops_target"],
                "latency_ms_p50": float(row["latency_ms_p50"]),
                "speedup": float(row["speedup"]) if row.get("speedup") else None,
                "source": BENCH_FILE,
            }
            for row in rows
        ]
    except (InputError, KeyError, ValueError) as error:
        reason = reason_of(error, path) if isinstance(error, InputError) else f"is not a table of times ({error!r})"
        left_out.append(LeftOut(path, f"{reason} (no latency)"))
        return []
