"""One unit of the fast run: a minibatch whose images keep different parts.

The images of a minibatch stand in some order; neighbours of one pattern are a run and go through its program together, on a
view of the feature map, without being copied. A sum with the shortcut is done in place. So a unit costs one gather where
images are put in order by pattern (small maps), and none where they are not (large maps).
B images, C channels, H W height and width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynroute.skipping.cache import Key, Program, Programs
from dynroute.skipping.kernels import CALL, COPY, READ, Conv
from dynroute.skipping.lowering import Straight, Summed, straight, whole

VIEWS, SORTED, MASKED = "views", "sorted", "masked"  # forms of a unit: as described above, or everything computed


class Run(NamedTuple):
    """Images first to last (not included) of the order, all of one pattern."""

    first: int
    last: int
    key: Any


def runs_of(keys: Sequence[Any]) -> list[Run]:
    """Neighbours of one pattern together."""
    found, place = [], 0
    for key, same in groupby(keys):
        count = sum(1 for _ in same)
        found.append(Run(place, place + count, key))
        place += count
    return found


def gathered(x_BCHW: Tensor, index: Sequence[int]) -> Tensor:
    """Some images, in this order. Through the NHWC view: indexing a channels_last tensor would fall back to NCHW."""
    picked = torch.tensor(index, device=x_BCHW.device)
    return x_BCHW.permute(0, 2, 3, 1).index_select(0, picked).permute(0, 3, 1, 2)


class Scratch(threading.local):
    """Two stretches of memory for each thread, into which images are gathered in turn; they grow with the largest map.

    Memory that is new to the process costs more time than copying into it: the system clears it page by page.
    """

    def __init__(self) -> None:
        self.stretches: list[Tensor] = []

    def gathered(self, x_BCHW: Tensor, index: Sequence[int]) -> Tensor:
        """As `gathered`; good until the call after the next. x may be what the last call returned."""
        rows_BHWC = x_BCHW.permute(0, 2, 3, 1)
        size = len(index) * rows_BHWC[0].numel()
        like = [s for s in self.stretches if s.dtype == x_BCHW.dtype and s.device == x_BCHW.device]
        read = x_BCHW.untyped_storage().data_ptr()
        place = next((i for i, s in enumerate(like) if s.untyped_storage().data_ptr() != read), len(like))
        if place == len(like) or like[place].numel() < size:
            like[place : place + 1] = [x_BCHW.new_empty(size)]
        self.stretches = like[:2]
        out_BHWC = like[place][:size].view(len(index), *rows_BHWC.shape[1:])
        torch.index_select(rows_BHWC, 0, torch.tensor(index, device=x_BCHW.device), out=out_BHWC)
        return out_BHWC.permute(0, 3, 1, 2)


def copying_pays(saved_calls: int, weights: float, moved: int) -> bool:
    """Whether fewer calls, each of which reads so many bytes of weights, are worth a copy of so many bytes."""
    return saved_calls * (CALL + weights / READ) > 2 * moved / COPY


class FastUnit:
    """The programs of one unit, run over a minibatch.

    weights: bytes of a program's weights in the mean. rectified: whether no value of its output is negative, as far as is known.
    """

    def __init__(self, programs: Programs, weights: float) -> None:
        self.programs, self.weights, self.rectified = programs, weights, False
        self.shortcut: Straight | None = None  # one for all patterns, run once on the whole minibatch

    def order(self, keys: Sequence[Key], x_BCHW: Tensor, form: str | None) -> list[int] | None:
        """The images by pattern, where they are to be copied into that order (by form, else where it pays); else None."""
        if len(keys) == 1:
            return None
        saved = len(runs_of(keys)) - len(set(keys))
        pays = copying_pays(3 * saved, self.weights / 3, x_BCHW.nbytes) or not x_BCHW.is_cpu  # where calls are dear
        if saved and (form == SORTED if form else pays):
            return sorted(range(len(keys)), key=lambda image: keys[image].own)
        return None

    def __call__(self, x_BCHW: Tensor, keys: Sequence[Key], mine: bool, positive: bool) -> Tensor:
        """The unit's output, images in the order of x. keys: the pattern of each.

        mine: x may be overwritten. positive: no value of x is negative, so a ReLU of x itself need not run.
        """
        runs = runs_of(keys)
        return self.run(x_BCHW, runs, [self.programs.of(run.key) for run in runs], mine, positive)

    def run(
        self, x_BCHW: Tensor, runs: Sequence[Run], programs: Sequence[Sequence[Program]], mine: bool, positive: bool
    ) -> Tensor:
        """The same with the programs of each run at hand."""
        sums = [found[0] for found in programs if isinstance(found[0], Summed)]
        if not sums:
            parts = [whole(found[0])(x_BCHW[r.first : r.last]) for r, found in zip(runs, programs, strict=True)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        shortcut, self.rectified = sums[0].shortcut, sums[0].relu
        base_BCHW = self._base(x_BCHW, shortcut, mine)
        positive = positive and shortcut is None
        for run, found in zip(runs, programs, strict=True):
            one = slice(None) if len(runs) == 1 else slice(run.first, run.last)
            if isinstance(found[0], Summed):
                add(x_BCHW[one], base_BCHW[one], found, positive)  # type: ignore[arg-type]
            else:
                base_BCHW[one] = whole(found[0])(x_BCHW[one])
        return base_BCHW

    def _base(self, x_BCHW: Tensor, shortcut: nn.Module | None, mine: bool) -> Tensor:
        """The shortcut's output, to which bodies are added."""
        if shortcut is None:
            return x_BCHW if mine else x_BCHW.clone()
        if self.shortcut is None:
            self.shortcut = straight(shortcut, self.programs.packed)
        return self.shortcut(x_BCHW).contiguous(memory_format=torch.channels_last)


def add(x_NCHW: Tensor, base_NCHW: Tensor, programs: Sequence[Summed], positive: bool) -> None:
    """base += each body of x, then ReLU; in place. x and base may be the same: all bodies read before any is added."""
    bodies, relu = [program.body for program in programs if program.body is not None], programs[0].relu
    if bodies and all(isinstance(body.steps[-1], Conv) and body.head.fresh for body in bodies):
        hidden = [body.head(x_NCHW) for body in bodies]
        for i, (body, u_NCHW) in enumerate(zip(bodies, hidden, strict=True)):
            body.steps[-1].add_to(base_NCHW, u_NCHW, relu and i == len(bodies) - 1)  # type: ignore[attr-defined]
        return
    for y_NCHW in [body(x_NCHW) for body in bodies]:
        base_NCHW.add_(y_NCHW)
    if relu and (bodies or not positive):
        base_NCHW.relu_()
