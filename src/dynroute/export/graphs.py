"""A trained net as one graph that another runtime can run: what is exported to ONNX.

`SkippingGraph` takes one image: units are branches of the graph, so that what the image does not keep is not computed. It
decides by the router as deployed (`Router.deployed`). `StaticGraph` runs one given route for any number of images.
B images, U units, G parts of a unit, N legal keeps of a unit, M of the unit that it reads, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynroute.contracts import Decision, Setting
from dynroute.export.files import Unavailable
from dynroute.net import RoutedNet
from dynroute.routers import Router, options, stacked, takes_other
from dynroute.units import NarrowConv, Residual, Unit

Branch = Callable[..., Tensor]
Pair = tuple[tuple[bool, ...], tuple[bool, ...]]  # what a unit keeps, and what the one that it reads keeps (or ())
MOST = 256  # branches of a graph: more take an hour to export


class Scaled(nn.Module):
    """Images of values 0 to 1 as a net was trained to see them. mean, std: of each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(x - mean) / std."""
        return (x_BCHW - self.mean) / self.std


class SkippingGraph(nn.Module):
    """One image of values as `scaled` takes them: logits (1, K), route (1, U, G) and multiply-adds (1,).

    The router's setting and limit are those that it has now. Raises Unavailable for more than MOST branches.
    """

    def __init__(self, net: RoutedNet, scaled: nn.Module) -> None:
        super().__init__()
        plain = net.backbone.routable
        self.scaled, self.stem, self.head, self.cost = scaled, net.backbone.stem, net.backbone.head, net.cost
        self.router = _frozen(net.router)
        self.reads = [unit.reads for unit in plain]
        routes_RUG = possible_routes(net.router) if net.router.alike else None
        pairs = [[] if unit.additive else _pairs(u, plain, routes_RUG) for u, unit in enumerate(plain)]
        count = sum(len(own) or unit.spec.parts for own, unit in zip(pairs, plain, strict=True))
        if count > MOST:
            raise Unavailable(f"the graph would have {count} branches, {MOST} at most: --form static has none")
        self.units = nn.ModuleList(
            Parts(unit) if unit.additive else Keeps(unit, own) for unit, own in zip(plain, pairs, strict=True)
        )

    def forward(self, images_1CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits_1K, keep_1UG, macs_1."""
        x_1CHW = self.scaled(images_1CHW)
        journey = self.router.start(x_1CHW)
        x_1CHW = self.stem(x_1CHW)
        keeps: list[Tensor] = []
        unheard = x_1CHW.new_zeros(())
        for u, unit in enumerate(self.units):
            decision, journey = self.router.choose(u, x_1CHW, journey)
            keeps.append(decision.keep_BG)
            reads = self.reads[u]
            x_1CHW = unit(x_1CHW, keeps[u], None if reads is None else keeps[reads])
            if "unheard" in decision.notes:  # else the exporter would take a router that is only timed out of the graph
                unheard = unheard + 0.0 * decision.notes["unheard"].sum()
        keep_1UG = stacked(keeps)
        return self.head(x_1CHW).float(), keep_1UG, self.cost(keep_1UG) + unheard


class StaticGraph(nn.Module):
    """Images (B, C, H, W) of values as `scaled` takes them, all on one route: logits (B, K). No router. keep_UG: the route."""

    def __init__(self, net: RoutedNet, scaled: nn.Module, keep_UG: Tensor) -> None:
        super().__init__()
        plain = net.backbone.routable
        keeps = [_pattern(keep_G[: unit.spec.parts]) for unit, keep_G in zip(plain, keep_UG, strict=True)]
        above = [None if unit.reads is None else keeps[unit.reads] for unit in plain]
        units = [unit.narrow(own, read) for unit, own, read in zip(plain, keeps, above, strict=True)]
        self.layers = nn.Sequential(scaled, net.backbone.stem, *units, net.backbone.head)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_BK."""
        logits_BK: Tensor = self.layers(images_BCHW)
        return logits_BK.float()


class Parts(nn.Module):
    """A unit whose parts add up (`Unit.additive`), for one image: a branch for each part."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        parts = unit.spec.parts
        each = [unit.narrow(tuple(i == g for i in range(parts))) for g in range(parts)]
        sums = [part for part in each if isinstance(part, Residual)]
        assert len(sums) == parts, "an additive unit narrows to a Residual"
        self.shortcut, self.relu = sums[0].shortcut, sums[0].relu
        self.bodies = nn.ModuleList(part.body for part in sums if part.body is not None)

    def forward(self, x_1CHW: Tensor, keep_1G: Tensor, above_1G: Tensor | None = None) -> Tensor:
        """Shortcut + the parts that are kept."""
        out_1CHW: Tensor = self.shortcut(x_1CHW)
        for g, body in enumerate(self.bodies):
            out_1CHW = _either(keep_1G[0, g] > 0, _adding(body), _leaving, (out_1CHW, x_1CHW))
        return out_1CHW.relu() if self.relu else out_1CHW


class Keeps(nn.Module):
    """Any other unit, for one image: a branch for each keep, with each keep of the unit that it reads, found by halving."""

    own_PG: Tensor
    above_PG: Tensor

    def __init__(self, unit: Unit, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.register_buffer("own_PG", torch.tensor([own for own, _ in pairs]).float())
        self.register_buffer("above_PG", torch.tensor([above for _, above in pairs]).float())
        bodies = [unit.narrow(own, above or None) for own, above in pairs]
        self.bodies = nn.ModuleList(body if _computes(body) else nn.Sequential(body, Anew()) for body in bodies)

    def forward(self, x_1CHW: Tensor, keep_1G: Tensor, above_1G: Tensor | None = None) -> Tensor:
        """The unit's output. above_1G: what the unit that it reads kept."""
        same_P = (self.own_PG == keep_1G[:, : self.own_PG.shape[1]]).all(1)
        if above_1G is not None:
            same_P = same_P & (self.above_PG == above_1G[:, : self.above_PG.shape[1]]).all(1)
        return _one_of(list(self.bodies), same_P.long().argmax(), 0, x_1CHW)


class Anew(nn.Module):
    """The same values: a branch may not hand back what it was given."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A copy."""
        return x_BCHW.clone()


class Mixed(Router):
    """A mixed setting without groups of images: both prices are asked, each image gets the answer of its own."""

    def __init__(self, router: Router, setting: Setting) -> None:
        super().__init__(router.specs)
        self.part = setting.part
        self.one, self.other = (_at(router, Setting(price)) for price in (setting.price, setting.other))

    def begin(self, x_BCHW: Tensor) -> Any:
        """Whose answer counts, and both routers' journeys."""
        return takes_other(x_BCHW, self.part), self.one.start(x_BCHW), self.other.start(x_BCHW)

    def decide(self, u: int, x_BCHW: Tensor, state: Any) -> tuple[Decision, Any]:
        """The decision at each image's price. No notes."""
        other_B, journey, journey_other = state
        one, journey = self.one.choose(u, x_BCHW, journey)
        other, journey_other = self.other.choose(u, x_BCHW, journey_other)
        keep_BG = torch.where(other_B[:, None], other.keep_BG, one.keep_BG)
        return Decision(keep_BG, {}), (other_B, journey, journey_other)


def _frozen(router: Router) -> Router:
    """The router as deployed, at its setting and under its limit."""
    made = Mixed(router, router.setting) if router.setting.part else _at(router, router.setting)
    made.limit = router.limit
    return made


def possible_routes(router: Router) -> Tensor:
    """(R, U, G): the routes of a router that gives all images of a price the same, at its setting: one, or two."""
    setting, found = router.setting, []
    for price in {setting.price, setting.other} if setting.part else {setting.price}:
        side = _at(router, Setting(price))
        side.limit = router.limit
        x_1C11, keeps = torch.zeros(1, 1, 1, 1), []
        journey = side.start(x_1C11)
        for u in range(len(router.specs)):
            decision, journey = side.choose(u, x_1C11, journey)
            keeps.append(decision.keep_BG)
        found.append(stacked(keeps)[0])
    return torch.stack(found)


def _pairs(u: int, units: Sequence[Unit], routes_RUG: Tensor | None) -> list[Pair]:
    """The branches of a unit: all that are legal, or those of the routes."""
    own, reads = units[u].spec, units[u].reads
    if routes_RUG is None:
        above = [()] if reads is None else list(map(_pattern, options(units[reads].spec)))
        return [(_pattern(keep_G), read) for read in above for keep_G in options(own)]
    owns = [_pattern(keep_UG[u, : own.parts]) for keep_UG in routes_RUG]
    if reads is None:
        return [(keep, ()) for keep in dict.fromkeys(owns)]
    above = [_pattern(keep_UG[reads, : units[reads].spec.parts]) for keep_UG in routes_RUG]
    return list(dict.fromkeys(zip(owns, above, strict=True)))


def _at(router: Router, setting: Setting) -> Router:
    """A copy of the router as deployed, at one price, without a limit."""
    made = router.deployed()
    made = copy.deepcopy(router).eval() if made is router else made
    made.setting, made.limit = setting, None
    return made


def _either(which: Tensor, yes: Branch, no: Branch, given: tuple[Tensor, ...]) -> Tensor:
    """yes(*given) or no(*given): a branch of the graph, or Python's own where none is being made."""
    if torch.compiler.is_exporting():
        out: Tensor = torch.cond(which, yes, no, given)
        return out
    return (yes if bool(which) else no)(*given)


def _pattern(keep_G: Tensor) -> tuple[bool, ...]:
    return tuple(map(bool, keep_G.tolist()))


def _computes(body: nn.Module) -> bool:
    """Whether a narrowed unit surely makes a new feature map."""
    if isinstance(body, Residual):
        return body.body is not None or body.relu
    return isinstance(body, NarrowConv)


def _adding(body: nn.Module) -> Branch:
    return lambda out_1CHW, x_1CHW: out_1CHW + body(x_1CHW)


def _leaving(out_1CHW: Tensor, x_1CHW: Tensor) -> Tensor:
    return out_1CHW.clone()


def _one_of(bodies: Sequence[nn.Module], number: Tensor, first: int, x_1CHW: Tensor) -> Tensor:
    """bodies[number - first](x), of which no other runs."""
    if len(bodies) == 1:
        out_1CHW: Tensor = bodies[0](x_1CHW)
        return out_1CHW
    half = len(bodies) // 2
    low, high = bodies[:half], bodies[half:]
    return _either(
        number < first + half,
        lambda number, x_1CHW: _one_of(low, number, first, x_1CHW),
        lambda number, x_1CHW: _one_of(high, number, first + half, x_1CHW),
        (number, x_1CHW),
    )
