"""The shared vocabulary of every room. Imports nothing of this package.

Letters, used as suffixes of tensor names in all files:
    B images   U routable units   G parts of a unit   A actions   C channels   H W height, width   K classes

One tensor says everything that a method decides: keep_BUG in {0, 1}, image by unit by part.
A MAC is one multiply-add, counted once. A share is a part of the dense net's MACs. A route is one image's keep_UG.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # so that rooms without torch may import this file
    from torch import Tensor

Form = Literal["nested", "choice", "free"]


class InputError(ValueError):
    """What the user gave is wrong; the message is the one line that is shown, and the exit status is 2."""


class OutOfReach(ValueError):
    """A budget that no route of the net can meet; the message is the one line that is shown, and the exit status is 3."""


@dataclass(frozen=True)
class Setting:
    """Where a router's dial stands: the price for all images, or where part > 0 another one for that part of them.

    Which images are in that part is decided by a hash of each, so the same image always gets the same price. Where a dial
    jumps from one mean cost to another, the router's own scores do not tell the images apart; two prices meet what lies between.
    """

    price: float = 0.0
    other: float = 0.0
    part: float = 0.0


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is not there: says the nearest valid choice and lists all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}{hint} (choices: {', '.join(known) or 'none'})")


def spread(width: float, parts: int, u: int) -> int:
    """How many of unit u's parts run where a share `width` of all parts should, u counted from 0. Ours.

    A width between two whole numbers of parts is spread over the units: unit u keeps floor((u+1) w) - floor(u w) parts,
    w = width * parts, so that any mean share can be had to within one part of one unit.
    """
    wanted = width * parts + 1e-9
    return int((u + 1) * wanted) - int(u * wanted)


@dataclass(frozen=True)
class UnitSpec:
    """What a router may know of one routable unit.

    form: which keeps are legal. "nested": a prefix of the parts; "choice": exactly one part; "free": any subset.
    skippable: the unit has a shortcut, so keeping nothing is legal.
    part_shares: each part's share of the unit's own MACs when all parts run; sums to 1 for "nested" and "free". For
    "choice" each alternative's share of the dearest one's MACs.
    stage, stages: 1-based stage of the net and how many stages there are (DMNN weights its losses by stage).
    """

    name: str
    in_channels: int
    parts: int
    form: Form
    skippable: bool
    part_shares: tuple[float, ...]
    stage: int = 1
    stages: int = 1


class Decision(NamedTuple):
    """One unit's decision. keep_BG may carry a straight-through gradient; notes go to the loss."""

    keep_BG: Tensor
    notes: dict[str, Tensor]


class Trace(NamedTuple):
    """All decisions of a forward pass; notes are stacked over units: (B, U, ...)."""

    keep_BUG: Tensor
    notes: dict[str, Tensor]


class Output(NamedTuple):
    """What a routed net returns. macs_B: multiply-adds of each image, router included."""

    logits_BK: Tensor
    trace: Trace
    macs_B: Tensor


class Advice(NamedTuple):
    """What a dense teacher says of a minibatch (Hinton et al., 2015). weight: its part of the classification loss."""

    logits_BK: Tensor
    weight: float
    temperature: float


class Batch(NamedTuple):
    """One minibatch. images: (B, C, H, W) float, normalised; superclasses: (B,) int64 or None; index: rows of the split.

    advice: of the teacher, where training has one.
    """

    images: Tensor
    labels: Tensor
    superclasses: Tensor | None
    index: Tensor  # type: ignore[assignment]  # a field of that name hides tuple.index, which no one needs
    advice: Advice | None = None

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""
        there = {"device": device, "non_blocking": True}
        superclasses = None if self.superclasses is None else self.superclasses.to(**there)
        return Batch(
            self.images.to(**there), self.labels.to(**there), superclasses, self.index.to(**there), self.advice
        )

    def repeated(self, times: int) -> Batch:
        """The batch so many times over, copy after copy, advice included."""
        superclasses = None if self.superclasses is None else self.superclasses.repeat(times)
        advice = self.advice and self.advice._replace(logits_BK=self.advice.logits_BK.repeat(times, 1))
        images = self.images.repeat(times, 1, 1, 1)
        return Batch(images, self.labels.repeat(times), superclasses, self.index.repeat(times), advice)
