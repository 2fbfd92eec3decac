"""What is shown while and after a command runs: spinner, progress bars, tables. Standard output is for results alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynroute.fit import Step


def print_curve(drawn: dict[str, Any]) -> None:
    """Area and files, where a curve was asked for."""
    if drawn.get("area") is not None:
        print(f"mean top-1 over the range (area under the curve / its width): {100 * drawn['area']:.2f} %")
    for path in drawn.get("files", []):
        print(path)


class Status:
    """A spinner on stderr where that is a terminal; else nothing, so that pipes and logs stay clean."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.spinner: Any = None

    def __enter__(self) -> Status:
        if sys.stderr.isatty():
            from rich.console import Console

            self.spinner = Console(stderr=True).status(self.text)
            self.spinner.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.spinner:
            self.spinner.stop()

    def say(self, text: str) -> None:
        """What is going on now."""
        if self.spinner:
            self.spinner.update(text)


class Progress:
    """Rich bars on a terminal; elsewhere a plain line for each epoch."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[loss]}"),
            )
            self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=None, loss="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self) -> None:
        """Say what is trained; not before it is known to be possible, so that what is refused gives one line."""
        self._say(self.title)

    def hear(self, step: Step) -> None:
        """A minibatch is done; a row ends an epoch."""
        name = f"{step.phase} {step.epoch}/{step.epochs}"
        if self.bar:
            done, total = (step.epoch - 1) * step.steps + step.step, step.epochs * step.steps
            self.bar.update(self.task, description=name, completed=done, total=total, loss=f"loss {step.loss:.3f}")
        if step.row:
            row = step.row
            learned = f"loss {row['loss']:.3f}, calibration top-1 {row['calib_top1']:.3f}"
            routed = f"share {row['calib_share']:.3f}"
            if row["calib_routes"] > 1 or step.remarks:  # a static net has nothing to watch
                fixed = f"{row['calib_always_on']} parts always on, {row['calib_never_on']} never"
                routed += f", {row['calib_executed']:.3f} of the parts run, {row['calib_routes']} routes"
                routed += f", entropy {row['calib_entropy']:.2f}, {fixed}"
            self._say(f"{name}: {learned}, {routed}, {row['images_per_s']:.0f} img/s")
        for remark in step.remarks:
            self._say(f"{name}: note: {remark}")

    def _say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, markup=False, soft_wrap=True)  # a folder's name may hold brackets
        else:
            print(text)
        sys.stdout.flush()


def print_results(results: list[Any]) -> None:
    """Evaluated rows as a table."""
    from rich.console import Console
    from rich.table import Table

    heads = (
        "target",
        "FLOPs (multiply-adds)",
        "share",
        "expected, 95 %",
        "p5-p95",
        "router",
        "top-1 %",
        "top-5 %",
        "routes",
        "n",
    )
    table = Table(title=f"{results[0].row.run} ({results[0].row.split})")
    timed = results[0].row.latency_ms_p50 is not None
    for head in (*heads, *(("mean ms", "speed-up") if timed else ())):
        table.add_column(head, justify="right", no_wrap=True)
    for r in results:
        row = r.row
        cells = [
            row.control or ("trained" if row.flops_target is None else f"{row.flops_target:.2f}"),
            f"{row.macs_mean / 1e6:.2f} M",
            f"{row.macs_share:.3f}{' missed' if r.missed else ''}",
            "" if row.share_calib is None else f"{row.share_calib:.3f} ({row.share_low:.3f}-{row.share_high:.3f})",
            f"{row.macs_p5 / 1e6:.2f}-{row.macs_p95 / 1e6:.2f} M",
            f"{100 * row.router_share:.2f} %",
            f"{100 * row.top1:.2f}",
            f"{100 * row.top5:.2f}",
            str(row.routes),
            str(row.n),
        ]
        clocked = row.latency_ms_p50 is not None  # controls are not
        table.add_row(*cells, *([f"{row.latency_ms_mean:.2f}", f"{row.speedup:.2f}x"] if clocked else []))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_timings(rows: list[Any]) -> None:
    """Timed rows as a table, a section for each batch size and thread count."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first.run} ({first.device}, {first.dtype}, {first.clock} clock, {first.machine})")
    heads = ("ms/image", "p95", "images/s", "speed-up", "FLOPs", "of ideal", "router ms", "rounds")
    for head in ("batch", "threads", "mode", "setting", *heads):
        table.add_column(head, justify="left" if head in ("mode", "setting") else "right", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        where = f"target {row.flops_target:g}" if row.flops_target is not None else row.routes
        if row.rate is not None:
            where = f"random at {row.rate:g}"
        table.add_row(
            str(row.batch),
            str(row.threads),
            f"dense_best: {row.form}" if row.mode == "dense_best" else row.mode,
            {"router": "trained"}.get(where, where),
            f"{row.latency_ms_p50:.3g}",
            f"{row.latency_ms_p95:.3g}",
            f"{row.images_per_s:.4g}",
            "" if row.speedup is None else f"{row.speedup:.2f}x",
            f"{row.macs_share:.3f}",
            "" if row.ideal_share is None else f"{100 * row.ideal_share:.0f} %",
            "" if row.router_ms is None else f"{row.router_ms:.3g}",
            str(row.rounds),
            end_section=after is not None and (after.batch, after.threads) != (row.batch, row.threads),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_inspection(info: dict[str, Any]) -> None:
    """A net's size and cost as lines."""
    print(f"{info['name']}: {info['method']} on {info['backbone']}, {info['dataset']}")
    print(f"parameters            {info['params']:,} (router {info['params_router']:,})")
    print(f"FLOPs (multiply-adds) dense {info['macs_dense']:,.0f}; stem and head {info['macs_fixed']:,.0f}")
    print(
        f"router                {info['macs_router']:,.0f} ({100 * info['macs_router'] / info['macs_dense']:.2f} % of dense)"
    )
    print(f"share                 cheapest route {info['share_cheapest']:.3f}, dearest {info['share_dearest']:.3f}")
    print(f"{'unit':<12} {'form':<8} {'parts':>5} {'multiply-adds':>14} {'parameters':>11}")
    for u in info["units"]:
        print(f"{u['name']:<12} {u['form']:<8} {u['parts']:>5} {u['macs']:>14,.0f} {u['params']:>11,}")
