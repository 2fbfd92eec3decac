"""Several pieces of work timed in turn, round by round, so that whatever drifts on a machine hits all of them alike.

R rounds. Nothing here knows of nets.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from dynroute.contracts import InputError
from dynroute.records import usual_clock

LEAST = 10  # rounds at least, however long one takes
WARM = 3  # rounds before the first that counts


class Reading(NamedTuple):
    """One call. seconds: by the clock that is asked for; wall: that passed; result: what the call returned."""

    seconds: float
    wall: float
    result: Any


Work = Callable[[], Any]
Clock = Callable[[Work], Reading]


class Case(NamedTuple):
    """prepare: from the number of the round to the work that is timed; itself it is not. read: a figure of the result."""

    prepare: Callable[[int], Work]
    read: Callable[[Any], float] = lambda result: 0.0


@dataclass
class Times:
    """What the rounds gave. seconds_R: by the clock; wall_R: passed; figure_R: `read` of each result."""

    seconds_R: list[float] = field(default_factory=list)
    wall_R: list[float] = field(default_factory=list)
    figure_R: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean seconds of a call."""
        return sum(self.seconds_R) / len(self.seconds_R)

    def at(self, quantile: float) -> float:
        """A quantile of the seconds of a call, between neighbours by proportion."""
        return at(self.seconds_R, quantile)


def at(values: list[float], quantile: float) -> float:
    """A quantile of some values."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(quantile))


def interleaved(
    cases: Mapping[str, Case], clock: Clock, seconds: float, least: int = LEAST, warm: int = WARM
) -> dict[str, Times]:
    """Every case once a round, in an order drawn anew for each, until the mean case has had `seconds` of wall time.

    warm: rounds before, not counted. The garbage collector rests meanwhile, as in timeit.
    """
    names, found = list(cases), {name: Times() for name in cases}
    order, spent, turn = random.Random(0), 0.0, -warm
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while turn < least or spent < seconds * len(names):
            order.shuffle(names)
            for name in names:
                reading = clock(cases[name].prepare(turn))
                if turn < 0:
                    continue
                times = found[name]
                times.seconds_R.append(reading.seconds)
                times.wall_R.append(reading.wall)
                times.figure_R.append(cases[name].read(reading.result))
                spent += reading.wall
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return found


def thread_clock(work: Work) -> Reading:
    """Processor time of this thread: not disturbed by what else the machine does, blind to other threads' work."""
    wall, start = time.perf_counter(), time.thread_time()
    result = work()
    return Reading(time.thread_time() - start, time.perf_counter() - wall, result)


def wall_clock(work: Work) -> Reading:
    """The time that passes."""
    start = time.perf_counter()
    result = work()
    passed = time.perf_counter() - start
    return Reading(passed, passed, result)


def cuda_clock(device: torch.device) -> Clock:
    """Time between two events on the device's stream, gaps in which it waits for the host included."""

    def measured(work: Work) -> Reading:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            wall = time.perf_counter()
            begin.record()
            result = work()
            end.record()
            end.synchronize()
            return Reading(begin.elapsed_time(end) / 1e3, time.perf_counter() - wall, result)

    return measured


def choose_clock(name: str, threads: int, device: torch.device) -> tuple[str, Clock]:
    """A clock and its name. auto: of the thread where one does all the work, events on CUDA, else the wall's.

    Raises InputError where the thread's clock would not see all the work.
    """
    usual = usual_clock(device.type, threads)
    if name == "thread" != usual:
        sees = f"does not see what {device} does" if usual == "cuda" else f"sees one thread, not {threads}"
        raise InputError(f"--clock thread {sees}; auto and wall do")
    chosen = usual if name == "auto" else name
    return chosen, {"thread": thread_clock, "wall": wall_clock}.get(chosen) or cuda_clock(device)
