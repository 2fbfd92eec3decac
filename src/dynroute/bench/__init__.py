"""How long a net takes: dense, all parts on, masked and skipping, timed in turn in one run."""

from dynroute.bench.modes import (
    DTYPES,
    ONNX_SKIPPING,
    POOL,
    Benched,
    DenseNet,
    Plan,
    Point,
    bench,
    ideal_share,
    warnings,
)
from dynroute.bench.rounds import Case, Reading, Times, choose_clock, interleaved
from dynroute.bench.routes import Overruled, numbered, random_routes, uniform_routes

__all__ = [
    "DTYPES",
    "ONNX_SKIPPING",
    "POOL",
    "Benched",
    "Case",
    "DenseNet",
    "Overruled",
    "Plan",
    "Point",
    "Reading",
    "Times",
    "bench",
    "choose_clock",
    "ideal_share",
    "interleaved",
    "numbered",
    "random_routes",
    "uniform_routes",
    "warnings",
]
