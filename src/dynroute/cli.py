"""The command line: parses and calls. No logic, and torch is imported only inside the commands that need it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from dynroute import __version__
from dynroute.console import Progress, Status, print_curve, print_inspection, print_results, print_timings
from dynroute.contracts import InputError, OutOfReach

USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # click's UsageError, which newer Typers carry inside
MISSED = 3  # exit status where a FLOPs target was not reached
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
STOPPED = "stopped"
RESUME = "; `dynroute train ... --resume` goes on from the last finished epoch"
app = typer.Typer(
    name="dynroute",
    help="Train, evaluate and compare image classifiers that choose, per image, which parts of themselves to run.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="PATH", help="Where the data lie now (data.path) [default: where the run had them]."
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="D", help="cpu, cuda, ... [default: the configuration's].")
]
FlopsMax = Annotated[
    float | None,
    typer.Option("--flops-max", metavar="X", help="Share of the dense net's multiply-adds that no image may exceed."),
]
KnownTarget = Annotated[
    float | None,
    typer.Option(
        "--flops-target",
        metavar="X",
        help="Share of the dense net's multiply-adds, within the range that `eval` has calibrated.",
    ),
]
LatencyTarget = Annotated[
    float | None,
    typer.Option(
        "--latency-target",
        metavar="MS",
        help="Milliseconds that an image alone may take in the mean, as a FLOPs target: by the table that `dynroute bench` "
        "has made of this run on this machine, corrected by how fast the nets are now.",
    ),
]


class Split(StrEnum):
    """Splits that may be evaluated."""

    test = "test"
    calib = "calib"


class Checkpoint(StrEnum):
    """Checkpoints that may be evaluated."""

    last = "last"
    best = "best"


class Kind(StrEnum):
    """What can be listed."""

    routers = "routers"
    backbones = "backbones"
    datasets = "datasets"
    papers = "papers"
    experiments = "experiments"


class TrainCommand(typer.core.TyperCommand):
    """`train`, whose --help also explains every configuration key."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Append the keys; imported here because it needs the options dataclasses, and with them torch."""
        from dynroute.config import describe_fields

        formatter.write("\n" + describe_fields() + "\n")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train, evaluate and compare image classifiers that choose, per image, which parts of themselves to run."""
    if version:
        print(f"dynroute {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
    else:
        return
    raise typer.Exit


@app.command(cls=TrainCommand)
def train(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Configuration keys.")] = None,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of configuration keys.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder [default: runs/NAME].")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in that folder to the same result.")
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds", metavar="0,1,2", help="Train once for each seed, one after the other, into NAME-s0, NAME-s1, ..."
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and exit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build data and net, print their size, do not train.")
    ] = False,
) -> None:
    """Train a router; with nothing else, DMNN on the embedded shapes data in about a minute."""
    from dynroute import runs
    from dynroute.config import CONFIG_FILE, load_config

    numbers = parse_seeds(seeds) if seeds is not None else []
    if resume and not config and not overrides and out:
        config = (out.with_name(f"{out.name}-s{numbers[0]}") if numbers else out) / CONFIG_FILE
    settings = load_config(config, overrides)
    if print_config:
        print(settings.yaml(comments=True), end="")
        return
    if dry_run:
        net = runs.check(settings)
        print_inspection(runs.inspect(settings, net))
        return
    planned = runs.seeded(settings, numbers, out) if numbers else [(settings, out or Path("runs") / settings.name)]
    for each, folder in planned[1:]:  # before the first of them is trained for hours
        runs.check_folder(each, folder, resume)
    for each, folder in planned:
        title = f"training {each.router_name} on {each.data.name}, into {folder}"
        with Progress(title) as progress:
            runs.train(each, folder, resume=resume, begun=progress.begin, listener=progress.hear)
        print(f"done: dynroute eval {shlex.quote(str(folder))} --flops-target 0.5")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of a trained net.")],
    flops_target: Annotated[
        list[float] | None,
        typer.Option(
            "--flops-target",
            metavar="X",
            help="Share of the dense net's multiply-adds, 0 < X <= 1; repeatable.",
        ),
    ] = None,
    flops_max: FlopsMax = None,
    latency_target: LatencyTarget = None,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Ten targets across the reachable range; curve.csv, curve.png and curve.svg."),
    ] = False,
    split: Annotated[Split, typer.Option("--split", help="Which split the row is about.")] = Split.test,
    timed: Annotated[bool, typer.Option("--latency", help="Also measure milliseconds per image at batch 1.")] = False,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Add three rows made from the run's own routes on the same images: shuffled (handed to other images) and "
            "random (drawn unit by unit at the same rates), both charged for the router and so at the routed row's cost; "
            "most_common (one route for all images), a static net, not charged for a router.",
        ),
    ] = False,
    checkpoint: Annotated[
        Checkpoint,
        typer.Option("--checkpoint", help="last: end of the schedule; best: by accuracy on calibration."),
    ] = Checkpoint.last,
    data: DataPath = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run, at its trained point or at FLOPs targets fitted on the calibration split (exit status 3 if missed)."""
    check_budgets(flops_target or [], flops_max, latency_target)
    from dynroute import bench
    from dynroute.evaluation import Evaluator
    from dynroute.records import as_dict

    with Status(f"opening {run}") as status:
        evaluator = Evaluator.of(run, checkpoint.value, flops_max, device, data)
        targets: list[float | None] = [*(flops_target or [])]
        targets += [] if latency_target is None else [evaluator.share_at(latency_target)]
        if curve:
            status.say("looking for the reachable range")
            targets += evaluator.targets()
        targets = targets or [None]
        results, constant = [], 0
        for target in targets:
            status.say("evaluating" if target is None else f"fitting the price for {target:g} and evaluating")
            results.append(evaluator.measure(target, split.value, timed))
            if controls:
                status.say("evaluating controls")
                made = evaluator.controls(results[-1])
                results += made
                constant += not made
    rows = [as_dict(r.row) for r in results]
    drawn = write_curve(rows, run) if curve else {}
    if as_json:
        print(json.dumps({"rows": rows, **drawn}, indent=2))
    else:
        print_results(results)
        print_curve(drawn)
    for remark in evaluator.remarks:
        print(remark, file=sys.stderr)
    if constant:
        where = "" if constant == len(targets) else f" at {constant} of {len(targets)} settings"
        print(f"no controls{where}: every image takes the same route, there is nothing to shuffle", file=sys.stderr)
    for r in results:
        for line in bench.warnings(r.timed):
            print(line, file=sys.stderr)
    missed = [r for r in results if r.missed]
    for r in missed:
        low, high = r.reachable or (0.0, 1.0)
        line = f"target {r.row.flops_target} missed: reached {r.row.macs_share:.3f} on {r.row.split}"
        print(f"{line}; this net reaches {low:.3f} to {high:.3f} on calibration", file=sys.stderr)
    if missed:
        raise typer.Exit(MISSED)


@app.command()
def compare(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Run folders, folders of CSVs, or eval CSVs."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for tables, plots and page.")] = Path("comparison"),
    paper: Annotated[
        list[str] | None,
        typer.Option("--paper", metavar="TABLE", help="Add a paper's reported rows; repeatable, or all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put runs into one table and plot; reads their CSV files alone."""
    if not paths and not paper:
        raise InputError("nothing to compare: name runs, or --paper TABLE")
    from rich.console import Console

    from dynroute import report

    comparison = report.compare(paths or [], out, paper or [])
    if as_json:
        rows = json.loads(comparison.table.to_json(orient="records"))
        lines = json.loads(comparison.controls.to_json(orient="records"))
        left = [{"path": str(path), "reason": reason} for path, reason in comparison.left_out]
        papers = [table._asdict() for table in comparison.papers]
        files = [str(f) for f in comparison.files]
        answer = {"rows": rows, "controls": lines, "papers": papers, "left_out": left, "files": files}
        print(json.dumps(answer, indent=2))
        return
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width)
    if len(comparison.table):
        console.print(report.to_rich(comparison.table))
    if len(comparison.controls):
        common, lines = report.without_common(report.control_cells(comparison.controls))
        for part in report.fitting(lines, console.width):
            console.print(report.rich_table(part, f"Routed rows beside their controls, x: not beaten: {common}"))
    for table in comparison.papers:
        console.print(report.papers.to_rich(table))
        for line in report.papers.missing(table):
            print(f"  not yet: {line}")
    for path, reason in comparison.left_out:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    for path in comparison.files:
        print(path)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    target: KnownTarget = None,
    flops_max: FlopsMax = None,
    latency_target: LatencyTarget = None,
    as_json: Json = False,
) -> None:
    """Class, confidence, route and cost of images; needs the run folder alone, not its data."""
    from dataclasses import asdict

    from dynroute import prediction

    check_budgets([] if target is None else [target], flops_max, latency_target)
    if target is not None and latency_target is not None:
        raise InputError("--flops-target and --latency-target exclude each other: one image gets one budget")
    found = prediction.predict(run, images, target, flops_max, latency_target)
    if as_json:
        print(json.dumps({"rows": [asdict(p) for p in found]}, indent=2))
        return
    for p in found:
        print(f"{p.file}  {p.label}  {p.confidence:.3f}  {p.macs / 1e6:.2f} M  {p.share:.3f}  {p.route}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx", help="The file to write.")],
    target: KnownTarget = None,
    flops_max: FlopsMax = None,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="skipping: one image a call, which takes its own route and computes no more than that. static: one route "
            "for all, without the router, any number of images a call.",
        ),
    ] = "skipping",
    route: Annotated[
        str | None,
        typer.Option(
            "--route",
            metavar="ROUTE",
            help="static: that route, as in routes.csv [default: a static net's own; else the most common one of the "
            "calibration split, which `eval --split calib` finds].",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run as an ONNX file for other runtimes, checked against the net. Needs the extra `export`, no data."""
    from dataclasses import asdict

    from dynroute import deployment

    check_budgets([] if target is None else [target], flops_max)
    with Status(f"exporting {run}"):
        made = deployment.export(run, out, target, flops_max, form, route)
    if as_json:
        print(json.dumps(asdict(made), indent=2))
        return
    share = "trained point" if made.share is None else f"share {made.share:.3f}"
    checked = f"{made.checked} images, {made.routes} routes: logits within {made.apart:.1g} of the net's"
    print(f"{made.file}  {made.form}  {share}  {made.bytes / 1e6:.1f} MB  {checked}")


@app.command("bench")
def bench_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CONFIG", help="A run folder, or a YAML file (random weights).")
    ],
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            metavar="R",
            help="CONFIG: routes drawn at that rate, 0 <= R <= 1, as router.name=random draws them [default: each unit's "
            "drawn evenly from its legal ones]. The untrained router is asked all the same, so that its time counts.",
        ),
    ] = None,
    flops_target: Annotated[
        list[float] | None,
        typer.Option("--flops-target", metavar="X", help="RUN: time this target too, 0 < X <= 1; repeatable."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", metavar="N", help="Images in a call; repeatable [default: 1].")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", metavar="N", help="CPU threads; repeatable [default: 1].")
    ] = None,
    data: DataPath = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or bf16.")] = "fp32",
    clock: Annotated[
        str,
        typer.Option(
            "--clock",
            help="thread (processor time of one thread), wall, or auto: thread with one thread, else wall; events on CUDA.",
        ),
    ] = "auto",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="Time for each mode; 10 rounds at least.")
    ] = 5.0,
    memory: Annotated[
        float,
        typer.Option(
            "--memory",
            metavar="X",
            help="Bound of the narrow forms that the skipping run keeps, in times the weights of the net.",
        ),
    ] = 3.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Also the dense net by torch.compile, frozen.")] = False,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx", help="Also ONNX Runtime (dynroute[export]): the dense net and, at batch 1, the routed one."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a net: dense as PyTorch runs it and at its best, all parts on, masked, skipping; in turn, on the same images.

    Every round takes other images, so that routes vary as in use; the skipping run has met all of them (256, or two
    batches, of the test split) before the clock starts. Speed-ups are against dense_best. A run's rows go into its
    bench.csv. Exit status 3 where a target is missed.
    """
    check_budgets(flops_target or [])
    from dynroute import timing
    from dynroute.bench import warnings
    from dynroute.records import as_dict

    request = timing.Request(
        flops_target or [], rate, batch or [1], threads or [1], device, dtype, clock, seconds, compiled, onnx,
        data=data, memory=memory,
    )  # fmt: skip
    with Status(f"opening {source}") as status:
        timed = timing.bench_path(source, request, status.say)
    if as_json:
        print(json.dumps({"rows": [as_dict(row) for row in timed.rows]}, indent=2))
    else:
        print_timings(timed.rows)
    for line in (*timed.remarks, *warnings(timed.rows), *timed.missed):
        print(line, file=sys.stderr)
    if timed.missed:
        raise typer.Exit(MISSED)


@app.command("inspect")
def inspect_command(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="A YAML file or a run folder.")],
    as_json: Json = False,
) -> None:
    """Parameters, multiply-adds per unit, cheapest and dearest route. Needs no data where a run tells what it saw."""
    from dynroute import runs

    info = runs.inspect_path(source)
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        print_inspection(info)


@app.command("list")
def list_command(
    kind: Annotated[Kind | None, typer.Argument(help="What to list [default: everything].")] = None,
    as_json: Json = False,
) -> None:
    """Name the routers, backbones, data sets, papers' tables and experiments there are."""
    from dynroute import catalogue

    found = catalogue.listing(kind.value if kind else None)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, entries in found.items():
        print(f"{name}:")
        for entry, sentence in entries.items():
            print(f"  {entry:<16} {sentence}".rstrip())


def parse_seeds(text: str) -> list[int]:
    """The numbers of --seeds, each once. Raises InputError where one is no seed."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) <= 1_000_000_000 for word in words):
        raise InputError(
            f"--seeds takes whole numbers from 0 to 1000000000 with commas between, as 0,1,2, not {text!r}"
        )
    return list(dict.fromkeys(map(int, words)))


def check_budgets(targets: list[float], flops_max: float | None = None, latency_ms: float | None = None) -> None:
    """Raise InputError on a share or a time that is none."""
    shares = [("--flops-target", target) for target in targets]
    shares += [] if flops_max is None else [("--flops-max", flops_max)]
    for name, share in shares:
        if not 0 < share <= 1:
            raise InputError(f"{name} is a share of the dense net's multiply-adds, 0 < X <= 1, not {share}")
    if latency_ms is not None and not 0 < latency_ms < 1e9:
        raise InputError(f"--latency-target is a time in milliseconds, above 0, not {latency_ms}")


def write_curve(rows: list[dict[str, Any]], run: Path) -> dict[str, Any]:
    """The curve's files, and its area: mean top-1 over the range of shares reached (None where there is no range)."""
    from dynroute.report import curve

    own = [row for row in rows if not row["control"]]
    return {"area": curve.area(own), "files": [str(path) for path in curve.write(own, run)]}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Input errors are one line on stderr and status 2."""
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()
    command = (sys.argv[1:] if arguments is None else arguments)[:1]
    stopped = STOPPED + RESUME if command == ["train"] else STOPPED
    try:
        status: int = app(arguments, standalone_mode=False) or 0
        return _fail(stopped, status) if status == INTERRUPTED else status
    except USAGE_ERROR as error:
        return _fail(error.format_message(), 2)
    except InputError as error:
        return _fail(" ".join(str(error).split()), 2)
    except OutOfReach as error:
        return _fail(" ".join(str(error).split()), MISSED)
    except (KeyboardInterrupt, typer.Abort):  # newer Typers return the status instead
        return _fail(stopped, INTERRUPTED)
    except OSError as error:  # a folder that is a file, no permission, a full disk
        return _fail(f"cannot use {error.filename or 'the output'}: {error.strerror or error}", 2)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}", 2)
    except RuntimeError as error:
        if _no_memory(error):
            return _fail(f"not enough memory: {(str(error).strip() or 'no more is said').splitlines()[0]}", 2)
        if type(error).__name__ != "Diverged":  # named, so that torch is not imported to say it
            raise
        return _fail(str(error), 1)


def _no_memory(error: RuntimeError) -> bool:
    """Torch's own errors of this kind are RuntimeErrors, mostly without a class of their own."""
    said = str(error).lower()
    known = ("allocate memory", "not enough memory", "out of memory", "alloc_failed")
    return type(error).__name__ == "OutOfMemoryError" or any(words in said for words in known)


def nowhere() -> TextIO:
    """Stands for an output that the shell has closed (>&-)."""
    return Path(os.devnull).open("w", encoding="utf-8")


def _fail(message: str, status: int) -> int:
    print(f"dynroute: {message}", file=sys.stderr)
    return status
