"""FastNet: the same weights and routes as the masked net, with convolutions that are really smaller or absent.

Each pattern of a unit has its narrow program, BatchNorm folded, activation and sum fused, made once and kept (`cache`). A
minibatch goes through a unit pattern by pattern (`unit`, `chain`); several threads take images apart from one another.
B images, U units, G parts.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import NamedTuple

import torch
from torch import Tensor

from dynroute.contracts import Output, Setting, Trace
from dynroute.net import RoutedNet, stack
from dynroute.routers import Router
from dynroute.skipping.cache import Key, Program, Programs
from dynroute.skipping.chain import FastLayer, Slab, entire, pixel_means, pooled
from dynroute.skipping.forms import Forms, forms_for
from dynroute.skipping.lowering import straight
from dynroute.skipping.unit import MASKED, SORTED, VIEWS, FastUnit, Run, Scratch, gathered
from dynroute.units import ConvUnit, Place, Unit

MEMORY = 3.0  # times the weights of the net
CACHED = 2**24  # bytes of the largest map of images that go through together, on a processor (ours, measured)
VERSION = operator.attrgetter("_version")  # of a tensor: counts changes in place


class Fixed(NamedTuple):
    """The one route of a net that decides nothing. programs: of each unit; keep_1UG and macs_1 as one image has them."""

    setting: Setting
    keys: list[Key]
    programs: list[list[Program]]
    keep_1UG: Tensor
    macs_1: Tensor


class FastNet:
    """Inference with a trained RoutedNet; the same logits to rounding.

    memory: bound of all narrow programs together, in weights of the net. threads: minibatches are shared out over so many,
    each of which computes alone; one image is not. packed: whether private oneDNN calls may be used where they work.
    Weights are copied in other forms, router included. Each call looks whether they have changed in place since (not through
    `.data`, and not tensors that others replace), and if so all of it is made anew; the dial and the limit are always those
    of the net's router. The net is put into eval().
    """

    def __init__(self, net: RoutedNet, memory: float = MEMORY, threads: int = 1, packed: bool = True) -> None:
        self.net, self.threads, self.memory, self.packed = net.eval(), threads, memory, packed
        self.plain = net.backbone.routable
        self.chain = all(isinstance(unit, ConvUnit) for unit in self.plain)
        places = [place for unit in self.plain if isinstance(place := getattr(unit, "place", None), Place)]
        maps = [(p.in_channels * p.in_size**2, p.out_channels * p.out_size**2) for p in places]
        self.largest = 4 * max(map(max, maps), default=0)  # bytes of one image's largest map, where known
        self.pool: ThreadPoolExecutor | None = None
        self.scratch = Scratch()
        self.forms: Forms = {}  # as measured by `warm_up`, or loaded
        self._take()

    def _take(self) -> None:
        """Everything that is made of weights."""
        every = (*self.net.parameters(), *self.net.buffers())
        self.tensors = [t for t in every if not t.is_inference()]  # inference tensors never change
        self.version, backbone = self._version(), self.net.backbone
        weights = 4 * sum(p.numel() for p in backbone.parameters())
        self.programs = Programs(self.plain, self.memory * weights, self.packed)
        self.stem, self.head = straight(backbone.stem, self.packed), straight(backbone.head, self.packed)
        halves = [2.0 * sum(p.numel() for p in unit.parameters()) for unit in self.plain]
        self.units = [FastUnit(self.programs, weights) for weights in halves]
        self.layers = [FastLayer(self.programs, unit) for unit in self.plain if isinstance(unit, ConvUnit)]
        self.router = self.net.router.deployed()
        self.fixed: Fixed | None = None

    def _version(self) -> tuple[int, torch.dtype, torch.device]:
        """Another one after every change of weights or buffers in place (a step, a checkpoint loaded), of type or device."""
        first = next(self.net.parameters())
        return sum(map(VERSION, self.tensors)), first.dtype, first.device

    def _ready(self) -> None:
        """Weights, dial and limit as they are now."""
        if self.net.training:
            self.net.eval()
        if self._version() != self.version:
            self._take()
        self.router.setting, self.router.limit = self.net.router.setting, self.net.router.limit

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, keep_BUG: Tensor | None = None) -> Output:
        """Logits, decisions and cost of each image; keep_BUG: these routes instead of the router's."""
        self._ready()
        share = -(-len(x_BCHW) // self.threads)
        if share == len(x_BCHW):
            return self._run(x_BCHW, keep_BUG)
        return joined(list(self._workers().map(self._apart, *split(x_BCHW, keep_BUG, share))))

    def _run(self, x_BCHW: Tensor, keep_BUG: Tensor | None) -> Output:
        """One minibatch on this thread."""
        piece = self.piece(len(x_BCHW))
        if piece == len(x_BCHW):
            return self._together(x_BCHW, keep_BUG)
        return joined(list(map(self._together, *split(x_BCHW, keep_BUG, piece))))

    def piece(self, images: int) -> int:
        """How many of a thread's images go through the net together: equal pieces whose largest map stays in the cache.

        All of them on an accelerator, and in a chain, whose large weights many images should share.
        """
        if images < 2 or self.chain or not self.largest or not next(self.net.backbone.parameters()).is_cpu:
            return images
        pieces = -(-images // max(CACHED // self.largest, 1))
        return -(-images // pieces)

    def _together(self, x_BCHW: Tensor, keep_BUG: Tensor | None) -> Output:
        """Images that go through the net unit by unit."""
        if keep_BUG is None and self._alike():
            return self._one_route(x_BCHW)
        routes = Routes(self.plain, self.router, x_BCHW, keep_BUG)
        x_BCHW = self.stem(x_BCHW.contiguous(memory_format=torch.channels_last))
        x_BCHW = (self._chain if self.chain else self._blocks)(x_BCHW, routes)
        trace = stack(routes.keeps, [{} for _ in routes.keeps])
        return Output(self.head(x_BCHW), trace, self.net.cost(trace.keep_BUG))

    def _alike(self) -> bool:
        """Whether all images take one route, whatever they are."""
        return self.router.alike and not self.router.setting.part and self.router.limit is None

    def _one_route(self, x_BCHW: Tensor) -> Output:
        """One minibatch of a net that decides nothing: no look-ups, no counting."""
        images, setting = len(x_BCHW), self.router.setting
        fixed = self.fixed
        if fixed is None or fixed.setting != setting:
            routes = Routes(self.plain, self.router, x_BCHW[:1], None)
            keys = [routes.decide(u, lambda: x_BCHW[:1])[0] for u in range(len(self.plain))]
            keep_1UG = stack(routes.keeps, [{} for _ in routes.keeps]).keep_BUG
            programs = [self.programs.of(key) for key in keys]
            self.fixed = fixed = Fixed(setting, keys, programs, keep_1UG, self.net.cost(keep_1UG))
        x_BCHW = self.stem(x_BCHW.contiguous(memory_format=torch.channels_last))
        if self.chain:
            slabs = [Slab(list(range(images)), x_BCHW, None)]
            for layer, key, found in zip(self.layers, fixed.keys, fixed.programs, strict=True):
                slabs = layer(slabs, [key] * images, found)
            x_BCHW = entire(slabs, images, sum(self.layers[-1].unit.sizes))
        else:
            mine, positive = self.stem.fresh, False
            for unit, key, program in zip(self.units, fixed.keys, fixed.programs, strict=True):
                out_BCHW = unit.run(x_BCHW, [Run(0, images, key)], [program], mine, positive)
                mine, positive, x_BCHW = mine or out_BCHW is not x_BCHW, unit.rectified, out_BCHW
        trace = Trace(fixed.keep_1UG.expand(images, -1, -1), {})
        return Output(self.head(x_BCHW), trace, fixed.macs_1.expand(images))

    def _blocks(self, x_BCHW: Tensor, routes: Routes) -> Tensor:
        """The units, images in whatever order they are in; the feature maps in the first order."""
        mine, positive = self.stem.fresh, False
        forms = forms_for(self.forms, len(x_BCHW))
        for u in range(len(self.units)):
            keys = routes.decide(u, partial(routes.shown, x_BCHW))
            out_BCHW = self._unit(u, x_BCHW, keys, routes, forms[u] if forms else None, mine, positive)
            mine, positive = mine or out_BCHW is not x_BCHW, self.units[u].rectified
            x_BCHW = out_BCHW
        return x_BCHW if routes.order is None else gathered(x_BCHW, routes.back())

    def _unit(
        self, u: int, x_BCHW: Tensor, keys: list[Key], routes: Routes, form: str | None, mine: bool, positive: bool
    ) -> Tensor:
        """One unit in one of its forms; None: as it seems to pay."""
        if form == MASKED:
            unit = self.plain[u]
            sides = (
                [[key.own for key in keys]] if unit.reads is None else [[k.own for k in keys], [k.above for k in keys]]
            )
            out_BCHW: Tensor = unit(x_BCHW, *(torch.tensor(s, dtype=x_BCHW.dtype, device=x_BCHW.device) for s in sides))
            return out_BCHW
        index = self.units[u].order(keys, x_BCHW, form)
        if index is not None:
            x_BCHW, mine = self.scratch.gathered(x_BCHW, index), True
            routes.reorder(index)
            keys = [keys[i] for i in index]
        return self.units[u](x_BCHW, keys, mine, positive)

    @torch.inference_mode()
    def warm_up(self, x_BCHW: Tensor, keep_BUG: Tensor | None = None, repeats: int = 3) -> list[str]:
        """Measure every unit's forms on a minibatch of such a size, or a piece of it, and keep the fastest for that size.

        Returns the names of units that run masked from now on: too small for anything to be saved. A chain has no forms.
        """
        self._ready()
        if self.chain or (keep_BUG is None and self._alike()):
            self(x_BCHW, keep_BUG)
            return []
        share = self.piece(-(-len(x_BCHW) // self.threads))
        x_BCHW, keep_BUG = x_BCHW[:share], None if keep_BUG is None else keep_BUG[:share]
        routes, forms = Routes(self.plain, self.router, x_BCHW, keep_BUG), []
        x_BCHW = self.stem(x_BCHW.contiguous(memory_format=torch.channels_last))
        for u in range(len(self.units)):
            keys = routes.decide(u, partial(routes.shown, x_BCHW))
            times = {form: self._timed(u, x_BCHW, keys, routes, form, repeats) for form in (VIEWS, SORTED, MASKED)}
            forms.append(min(times, key=lambda form: times[form]))
            x_BCHW = self._unit(u, x_BCHW.clone(), keys, routes, VIEWS, True, False)
        self.forms[share] = forms
        return [unit.spec.name for unit, form in zip(self.plain, forms, strict=True) if form == MASKED]

    def _timed(self, u: int, x_BCHW: Tensor, keys: list[Key], routes: Routes, form: str, repeats: int) -> float:
        """Seconds that a form takes, at best: of this thread, or on another device until its work is done."""
        times, now = [], _clock(x_BCHW.device)
        for _ in range(repeats + 1):  # the first makes the programs
            x, apart = x_BCHW.clone(), copy.copy(routes)
            before = now()
            self._unit(u, x, keys, apart, form, True, False)
            times.append(now() - before)
        return min(times[1:])

    def _chain(self, x_BCHW: Tensor, routes: Routes) -> Tensor:
        """The layers of a chain, feature maps without the channels that are not kept."""
        images, slabs = len(x_BCHW), [Slab(list(range(len(x_BCHW))), x_BCHW, None)]
        for u, layer in enumerate(self.layers):
            channels = self.plain[u].spec.in_channels
            keys = routes.decide(u, partial(self._seen, slabs, images, channels))
            slabs = layer(slabs, keys)
        return entire(slabs, images, sum(self.layers[-1].unit.sizes))

    def _seen(self, slabs: Sequence[Slab], images: int, channels: int) -> Tensor:
        """What the router of a chain is shown: as little as it can do with."""
        if images == 1 and self.router.leading:
            return slabs[0].x_NCHW
        return (pooled if self.router.pooled else entire)(slabs, images, channels)

    def _workers(self) -> ThreadPoolExecutor:
        """Threads that compute with one core each; this thread keeps the number it has."""
        if self.pool is None:
            mine, started = torch.get_num_threads(), Barrier(self.threads)
            self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
            # together, so that none is late to set the number, which threads that others start would get
            list(self.pool.map(lambda _: started.wait(), range(self.threads)))
            torch.set_num_threads(mine)
        return self.pool

    @torch.inference_mode()
    def _apart(self, x_BCHW: Tensor, keep_BUG: Tensor | None) -> Output:
        return self._run(x_BCHW, keep_BUG)


def split(x_BCHW: Tensor, keep_BUG: Tensor | None, size: int) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """A minibatch and its routes in runs of so many images."""
    parts = x_BCHW.split(size)
    return parts, [None] * len(parts) if keep_BUG is None else keep_BUG.split(size)


def joined(parts: Sequence[Output]) -> Output:
    """One output of those of consecutive images."""
    traces = [part.trace for part in parts]
    trace = traces[0]._replace(keep_BUG=torch.cat([t.keep_BUG for t in traces]))
    return Output(torch.cat([p.logits_BK for p in parts]), trace, torch.cat([p.macs_B for p in parts]))


def _clock(device: torch.device) -> Callable[[], float]:
    """This thread's processor time; on an accelerator wall time, after what it was given before."""
    if device.type == "cpu":
        return time.thread_time

    def now() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return now


def fast_net(net: RoutedNet, memory: float = MEMORY) -> FastNet:
    """The fast run of a net, with as many threads as torch is set to: images apart where there are several, on the CPU."""
    on_cpu = next(net.backbone.parameters()).is_cpu
    return FastNet(net, memory, threads=torch.get_num_threads() if on_cpu else 1)


class Routes:
    """Decisions of a minibatch whose images may change their places on the way: given, or asked of the router.

    The router sees the images as they came, always. order: the image that stands at each place; None: as they came.
    keeps: keep_BG of each unit so far, as they came.
    """

    def __init__(self, units: Sequence[Unit], router: Router, x_BCHW: Tensor, keep_BUG: Tensor | None) -> None:
        self.units, self.router = units, router
        self.given = None if keep_BUG is None else keep_BUG.to(x_BCHW.device)
        self.journey = router.start(x_BCHW) if keep_BUG is None else None
        self.order: Tensor | None = None
        self.keeps: list[Tensor] = []
        self.rows: list[list[tuple[bool, ...]]] = []  # of each unit, as they came

    def decide(self, u: int, look: Callable[[], Tensor]) -> list[Key]:
        """The pattern of each image at its present place. look: what the router is shown."""
        unit = self.units[u]
        if self.journey is None:
            assert self.given is not None
            keep_BG = self.given[:, u, : unit.spec.parts]
        else:
            decision, self.journey = self.router.choose(u, look(), self.journey)
            keep_BG = decision.keep_BG
        own = [tuple(map(bool, row)) for row in keep_BG.tolist()]
        self.keeps.append(keep_BG)
        self.rows.append(own)
        above = [None] * len(own) if unit.reads is None else self.rows[unit.reads]
        keys = [Key(u, *pair) for pair in zip(own, above, strict=True)]
        return keys if self.order is None else [keys[i] for i in self.order.tolist()]

    def shown(self, x_BCHW: Tensor) -> Tensor:
        """The feature maps of a minibatch for the router, images as they came; their means where it looks at no more."""
        if self.order is None:
            return x_BCHW
        if self.router.pooled:
            return pixel_means(x_BCHW)[self.order.argsort()][:, :, None, None]
        return gathered(x_BCHW, self.back())

    def reorder(self, index: Sequence[int]) -> None:
        """The images now stand in another order."""
        picked = torch.tensor(index, device=self.keeps[-1].device)
        self.order = picked if self.order is None else self.order[picked]

    def back(self) -> list[int]:
        """The places at which the images stand, as they came."""
        assert self.order is not None
        places: list[int] = self.order.argsort().tolist()
        return places
