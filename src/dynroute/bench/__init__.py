"""How long a net takes: dense, all parts on, masked and skipping, timed in turn in one run."""

from dynroute.bench.modes import (
    DTYPES,
    POOL,
    DenseNet,
    Overruled,
    Plan,
    Setting,
    bench,
    executor,
    ideal_share,
    numbered,
    uniform_routes,
    warnings,
)
from dynroute.bench.rounds import Case, Reading, Times, choose_clock, interleaved

__all__ = [
    "DTYPES",
    "POOL",
    "Case",
    "DenseNet",
    "Overruled",
    "Plan",
    "Reading",
    "Setting",
    "Times",
    "bench",
    "choose_clock",
    "executor",
    "ideal_share",
    "interleaved",
    "numbered",
    "uniform_routes",
    "warnings",
]
