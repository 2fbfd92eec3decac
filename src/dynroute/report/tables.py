"""Pool rows over seeds and set each beside the static nets of equal cost; `cells.py` puts the numbers into words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from dynroute.records import EVAL_COLUMNS, NUMBERS, base_name
from dynroute.report import controls
from dynroute.report.controls import STATIC, TOLERANCE, as_trained
from dynroute.report.read import BESIDE, LeftOut, Row, identity
from dynroute.report.timing import Clock, Taken

if TYPE_CHECKING:  # pandas takes a while to import, and most commands do not need it
    import pandas as pd

SETTING = ["method", "backbone", "dataset", "identity", "flops_target"]
GROUP = [*SETTING, "control"]
PLACE = ["dataset", "backbone"]  # rows are comparable within one
LATENCY_SETTING = ["latency_batch", "latency_threads", "latency_device", "machine"]
COLUMNS = (
    *(
        "method",
        "label",
        "control",
        "backbone",
        "dataset",
        "flops_target",
        "flops_max",
        "macs_mean",
        "macs_share",
        "macs_p5",
        "macs_p95",
    ),
    *("router_share", "top1", "top1_std", "top5", "n_seeds", "n", "reached", "static_top1", "vs_static"),
    *(
        "vs_static_low",
        "vs_static_high",
        "vs_static_interval",
        "latency_ms",
        "latency_clock",
        "speedup",
        "epochs",
        "params",
    ),
    *(
        "parts",
        "variant",
        "trained_for",
        "runs",
        "seeds",
        "commits",
        "machine",
        "config_hash",
        "torch",
        "weights",
        "precision",
    ),
)
MEANS = ("macs_mean", "macs_share", "macs_p5", "macs_p95", "router_share", "top1", "top5", "epochs")


class Tables(NamedTuple):
    """main: a line per method, setting and target, columns COLUMNS; lines: each beside its controls, see `controls.build`."""

    main: pd.DataFrame
    lines: pd.DataFrame


def build(rows: list[Row], left_out: list[LeftOut]) -> Tables:
    """The tables of rows that `read` found, pooled over seeds. A right.csv that cannot be read is added to left_out.

    Rows of the controls made from a line's own routes (column control) stand under it.
    top1_std: sample standard deviation over seeds, empty for one. reached: the share of every seed within 0.02 of the target.
    static_top1: top-1 of the narrower static nets of equal multiply-adds; vs_static: top1 less that, in points of a percent;
    vs_static_interval: paired (over the same test images) or independent.
    latency_ms: per image in the mean, of the smallest batch and fewest threads that were timed, as latency_clock says.
    """
    table = pool(rows)
    lines = controls.build(table.to_dict("records"), left_out)  # type: ignore[arg-type]
    near = controls.at_equal_cost(lines)
    columns = ["static_top1", "vs_static", "vs_static_low", "vs_static_high", "vs_static_interval"]
    table[columns] = near[["control_top1", "difference", "low", "high", "interval"]].set_axis(columns, axis=1)
    main = table.reindex(columns=list(COLUMNS)).astype({"n": "Int64", "params": "Int64"})
    return Tables(main, lines)


def pool(rows: list[Row]) -> pd.DataFrame:
    """Rows of one setting and several seeds as one, in the order in which they are shown."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[*EVAL_COLUMNS, *BESIDE]).astype(dict.fromkeys(NUMBERS, "float64"))
    frame["identity"] = [identity(row) for row in rows]
    frame = frame.sort_values(["seed", "run"], kind="stable")  # sums of numbers depend on their order
    groups = frame.groupby(GROUP, dropna=False, sort=True)
    table = pd.DataFrame([{**dict(zip(GROUP, key, strict=True)), **_pool(part)} for key, part in groups])
    table["label"] = labels(table)
    table["flops_max"] = table["flops_max"].astype("float64")
    table["as_trained"] = as_trained(table)
    table["other"] = table["method"] != STATIC  # sorts static first
    table["setting_share"] = table.groupby(SETTING, dropna=False)["macs_share"].transform("first")  # the net's own
    order = [*PLACE, "other", "method", "label", "setting_share", "flops_target", "identity", "control"]
    return table.sort_values(order, ignore_index=True)


def empty() -> Tables:
    """The tables of no runs."""
    import pandas as pd

    return Tables(pd.DataFrame(columns=list(COLUMNS)), pd.DataFrame(columns=list(controls.COLUMNS)))


def _pool(part: pd.DataFrame) -> dict[str, Any]:
    """One line of the table from the rows of its seeds."""
    target = part["flops_target"].iloc[0]
    asked = target == target and not part["control"].iloc[0]  # nan: no target; controls are not asked to meet one
    first = part.iloc[0]
    return {
        **{name: part[name].mean() for name in MEANS},
        "run": min(part["run"]),
        "top1_std": part["top1"].std(ddof=1),
        "n_seeds": len(part),
        "n": part["n"].min(),
        "params": part["params"].max(),
        **{name: first[name] for name in ("parts", "variant", "trained_for", "flops_max", "checkpoint")},
        "right_files": list(part["right_file"]),
        "reached": bool((abs(part["macs_share"] - target) <= TOLERANCE + 1e-9).all()) if asked else None,
        **_times(part),
        "seeds": _join(f"{seed:.0f}" for seed in sorted(part["seed"])),
        "runs": _join(part["run"]),
        "commits": _join(part["commit"]),
        **{name: _join(part[name]) for name in ("machine", "config_hash", "torch", "weights", "precision")},
    }


def _times(part: pd.DataFrame) -> dict[str, Any]:
    """times: the mean over seeds by clock, of clocks that all of them know; and the first of these for the main table.

    Rows of before clocks were written have their stored time, where it is of one machine: times of two have no mean.
    """
    seeds: list[dict[Clock, Taken]] = list(part["times"])
    clocks = [clock for clock in sorted(seeds[0]) if all(clock in times for times in seeds)]
    times = {
        clock: Taken(*(sum(x) / len(seeds) for x in zip(*(t[clock] for t in seeds), strict=True))) for clock in clocks
    }
    same = len(part[LATENCY_SETTING].drop_duplicates()) == 1
    ms = part["latency_ms_mean"].fillna(part["latency_ms_p50"])
    stored = Taken(*(values.mean() if same else float("nan") for values in (ms, part["speedup"])))
    taken = times[clocks[0]] if clocks else stored
    return {
        "times": times,
        "latency_ms": taken.ms,
        "speedup": taken.speedup,
        "latency_clock": str(clocks[0]) if clocks else "",
    }


def _join(words: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(word for word in words if word))


def labels(table: pd.DataFrame) -> list[str]:
    """The method, or where it was run in several configurations, the run's name less its seed."""
    places = [*PLACE, "method"]
    several = table.groupby(places)["identity"].transform("nunique") > 1
    first_run = table.groupby([*places, "identity"])["run"].transform("min").map(base_name)
    labels = first_run.where(several, table["method"])
    made, how = zip(*map(_told_apart, table["identity"]), strict=True) if len(table) else ((), ())
    owners = table.assign(label=labels, made=made).groupby([*places, "label"])["made"].transform("nunique")
    named = zip(labels, made, how, owners, strict=True)
    return [" ".join(filter(None, [label, own[:6] if count > 1 else "", rest])) for label, own, rest, count in named]


def _told_apart(identity: str) -> tuple[str, str]:
    """What made a row, and how it was evaluated where that is not as usual: "max 0.6", "best"."""
    made, limit, best = re.fullmatch(r"(.*?)(?:-max([\d.e+-]+?))?(?:-(best))?", identity, re.DOTALL).groups()  # type: ignore[union-attr]
    return made, " ".join(filter(None, [f"max {limit}" if limit else "", best or ""]))


def chord(costs: Iterable[float], top1s: Iterable[float]) -> tuple[list[float], list[float]]:
    """Costs and accuracies of static nets between which a routed row's control is read off: their frontier."""
    best = controls.frontier([controls.Point(cost, top1, {}) for cost, top1 in zip(costs, top1s, strict=True)])
    return [point.cost for point in best], [point.top1 for point in best]
