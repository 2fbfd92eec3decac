"""Narrow modules by pattern, kept within a bound of memory: slicing and packing weights at every call costs more than the net.

A pattern is what an image keeps of a unit, and of the unit which that one reads. G parts, H parts of the unit read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from dynroute.skipping.blocks import Blocks, tiles
from dynroute.skipping.kernels import CALL, RATE, READ
from dynroute.skipping.lowering import Narrowed, Straight, Summed, lower, widened
from dynroute.units import ConvUnit, Unit

Program = Straight | Summed | Narrowed
LOOK_AGAIN = 16  # a pattern that found no room is considered again after being asked for so often;
BETTER = 1.25  # times as much asked for per byte as what it would take the place of;
ASIDE = 2.0  # weights of a unit that are set aside for its pieces (by pairs of parts), or for its blocks and its full width;
FADE = 1 << 14  # patterns asked for after which what was asked before counts half (all ours)


class Key(NamedTuple):
    """unit: its index. own: its kept parts, G bools. above: those of the unit read, H bools, or None."""

    unit: int
    own: tuple[bool, ...]
    above: tuple[bool, ...] | None


class Programs:
    """What the fast run executes for each pattern, at most `limit` bytes of weights.

    A pattern for which there is no room is run in pieces where patterns are sums (`in_pieces`), in a chain in blocks or, where
    that is faster, by the program of the full width (`in_blocks`); for all of these room is set aside. Else it runs with
    everything computed, by the plain unit: making it anew at every call would cost more than any of these. It takes the
    place of kept ones that are asked for less often per byte. Ours.
    """

    def __init__(self, units: Sequence[Unit], limit: float, packed: bool) -> None:
        self.units, self.limit, self.packed = units, limit, packed
        self.kept: dict[Key, Program] = {}
        self.pieces: dict[Key, Program] = {}  # and the full widths of layers in blocks
        self.cut: dict[int, Blocks] = {}  # by unit
        self.instead: dict[Key, list[Program]] = {}  # of patterns without room, as long as they have none
        self.asked: Counter[Key] = Counter()
        self.sizes: dict[Key, int] = {}
        aside = ASIDE * sum(_weights(unit) for unit in units if in_pieces(unit) or in_blocks(unit))
        room = aside <= limit
        self.in_pieces = [room and in_pieces(unit) for unit in units]
        self.in_blocks = [room and in_blocks(unit) for unit in units]
        self.set_aside = aside if room else 0.0
        self.used, self.calls = 0, 0
        self.lock = Lock()

    @property
    def bytes(self) -> int:
        """Memory of all that is kept."""
        cut = sum(blocks.bytes for blocks in self.cut.values())
        return cut + sum(size(p) for found in (self.kept, self.pieces) for p in found.values())

    def of(self, key: Key) -> list[Program]:
        """The program of a pattern, or the programs whose sum it is. Several threads may ask."""
        with self.lock:
            self.asked[key] += 1
            self.calls += 1
            if self.calls % FADE == 0:
                self._fade()
            found = self.kept.get(key)
            return self._made(key) if found is None else [found]

    def blocks(self, u: int) -> Blocks:
        """A layer of a chain in blocks; only where `in_blocks` says so. Several threads may ask."""
        with self.lock:
            return self._cut(u)

    def crowded(self) -> list[str]:
        """The names of units some of whose patterns have found no room and run with everything computed."""
        short = {key.unit for key in self.instead if not (self.in_pieces[key.unit] or self.in_blocks[key.unit])}
        return [self.units[u].spec.name for u in sorted(short)]

    def _fade(self) -> None:
        """Count what was asked so far half, and forget what is hardly asked for."""
        self.asked = Counter({key: count // 2 for key, count in self.asked.items() if count > 1 or key in self.kept})
        self.sizes = {key: size for key, size in self.sizes.items() if key in self.asked}
        self.instead = {key: found for key, found in self.instead.items() if key in self.asked}

    def _made(self, key: Key) -> list[Program]:
        if self.in_pieces[key.unit] and len(parts := self._parted(key)) == 1:
            return [self._piece(parts[0])]
        if self.in_blocks[key.unit] and everything(key):
            return [self._piece(key)]
        if self.asked[key] % LOOK_AGAIN == 1:
            fresh = None if key in self.sizes else self._lowered(key)
            if fresh is not None:
                self.sizes[key] = size(fresh)
            if self._room(key):
                return [self._keep(key, fresh or self._lowered(key))]
        instead = self.instead.get(key)
        if instead is None:
            if self.in_pieces[key.unit]:
                instead = [self._piece(part) for part in self._parted(key)]
            elif self.in_blocks[key.unit]:
                instead = [self._without_room(key)]
            else:
                instead = [unnarrowed(self.units[key.unit], key)]
            self.instead[key] = instead
        return instead

    def _without_room(self, key: Key) -> Program:
        """A pattern of a layer of a chain in blocks, or from zeros for what is not read by the program of the full width."""
        unit = self.units[key.unit]
        assert isinstance(unit, ConvUnit) and key.above is not None
        own, above = sum(key.own), sum(key.above)
        outputs, inputs = sum(unit.sizes[:own]), sum(unit.sizes_in[:above])
        every, width = sum(unit.sizes), sum(unit.sizes_in)
        calls = len(tiles(unit.sizes[:own])) * len(tiles(unit.sizes_in[:above]))
        full = _weights(unit) * (1 / READ + unit.in_size**2 / 4 / RATE)  # seconds of one image: to read and to multiply
        if calls * CALL + full * outputs / every * inputs / width < CALL + full:
            blocks = self._cut(key.unit)
            return Narrowed(
                Straight([lambda x_NCHW: blocks.alike(x_NCHW, own, above)]), slice(0, inputs), every - outputs
            )
        program = self._piece(key._replace(own=(True,) * len(key.own), above=(True,) * len(key.above)))
        assert isinstance(program, Narrowed)
        run = program.body

        def covered(x_NCHW: Tensor) -> Tensor:
            out_NCHW = run(widened(x_NCHW, width - inputs))[:, :outputs]
            return out_NCHW.contiguous(memory_format=torch.channels_last)

        return Narrowed(Straight([covered]), slice(0, inputs), every - outputs)

    def _cut(self, u: int) -> Blocks:
        unit = self.units[u]
        assert isinstance(unit, ConvUnit)
        if u not in self.cut:
            self.cut[u] = Blocks(unit, self.packed)
        return self.cut[u]

    def _parted(self, key: Key) -> list[Key]:
        """The pattern in pieces, at most two neighbouring parts each."""
        pairs = range(0, len(key.own), 2)
        pieces = [key._replace(own=tuple(on and g // 2 == p // 2 for g, on in enumerate(key.own))) for p in pairs]
        return [piece for piece in pieces if any(piece.own)] or [key]

    def _piece(self, key: Key) -> Program:
        if key not in self.pieces:
            self.pieces[key] = self._lowered(key)
        return self.pieces[key]

    def _keep(self, key: Key, program: Program) -> Program:
        """Store it, room being there."""
        self.instead.pop(key, None)
        self.kept[key], self.sizes[key] = program, size(program)
        self.used += self.sizes[key]
        return program

    def _room(self, key: Key) -> bool:
        """Whether there is room, made at the cost of patterns that are asked for less per byte."""
        need = self.sizes[key]
        free = self.limit - self.set_aside - self.used
        victims: list[Key] = []
        for other in sorted(self.kept, key=self._worth):
            if free >= need or BETTER * self._worth(other) >= self._worth(key):
                break
            victims.append(other)
            free += self.sizes[other]
        if free < need:
            return False
        for other in victims:
            self._drop(other)
        return True

    def _worth(self, key: Key) -> float:
        return self.asked[key] / max(self.sizes[key], 1)

    def _drop(self, key: Key) -> None:
        del self.kept[key]
        self.used -= self.sizes[key]

    def _lowered(self, key: Key) -> Program:
        return lower(self.units[key.unit].narrow(key.own, key.above), self.packed)


def unnarrowed(unit: Unit, key: Key) -> Program:
    """A pattern with everything computed: nothing is made for it, and nothing saved."""

    def of(keep: tuple[bool, ...], x_NCHW: Tensor) -> Tensor:
        return torch.tensor(keep, dtype=x_NCHW.dtype, device=x_NCHW.device).expand(len(x_NCHW), -1)

    if not isinstance(unit, ConvUnit):
        return Straight([lambda x_NCHW: unit(x_NCHW, of(key.own, x_NCHW))])
    kept, width = sum(unit.sizes[: sum(key.own)]), unit.spec.in_channels
    inputs = width if key.above is None else sum(unit.sizes_in[: sum(key.above)])

    def layer(x_NCHW: Tensor) -> Tensor:
        above = () if key.above is None else (of(key.above, x_NCHW),)
        out_NCHW: Tensor = unit(widened(x_NCHW, width - inputs), of(key.own, x_NCHW), *above)
        return out_NCHW[:, :kept].contiguous(memory_format=torch.channels_last)

    return Narrowed(Straight([layer]), slice(0, inputs), sum(unit.sizes) - kept)


def in_pieces(unit: Unit) -> bool:
    """Whether patterns of the unit may be run as sums of smaller ones: with two parts there is nothing to be won."""
    return unit.additive and unit.spec.parts > 2


def in_blocks(unit: Unit) -> bool:
    """Whether the unit is a layer of a chain that is a sum over what it reads."""
    return isinstance(unit, ConvUnit) and unit.reads is not None and unit.norm is None


def everything(key: Key) -> bool:
    """Whether the pattern keeps and reads all parts."""
    return all(key.own) and all(key.above or ())


def size(program: Program) -> int:
    """Bytes of weights of one program; a shortcut belongs to all patterns and is not counted."""
    body = program if isinstance(program, Straight) else program.body
    return 0 if body is None else body.bytes


def _weights(unit: Unit) -> int:
    return 4 * sum(p.numel() for p in unit.parameters())
