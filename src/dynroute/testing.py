"""Contract checks for third parties: `check_unit`, `check_backbone`, `check_router`, `check_dataset`.

Each takes your object, runs it on small random inputs, and raises AssertionError with a sentence about the first promise
it breaks. The project's own units, nets, routers and data sets go through the same checks.
B images, U units, G parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynroute.backbones import Backbone
from dynroute.contracts import UnitSpec
from dynroute.cost import CostTerms
from dynroute.data import Dataset, loader
from dynroute.net import RoutedNet, masked
from dynroute.routers import Router, legal, options
from dynroute.skipping import FastNet
from dynroute.units import Unit

TOLERANCE = 1e-5  # between masked and narrowed run, of the largest output


def patterns(spec: UnitSpec) -> Iterator[tuple[bool, ...]]:
    """Every legal keep of a unit."""
    for keep_G in options(spec):
        yield tuple(keep_G.bool().tolist())


def count_macs(module: Any, *inputs: Tensor) -> int:
    """Multiply-adds that torch really executes: `FlopCounterMode` / 2."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2


@torch.no_grad()
def check_unit(unit: Unit, size: int, keep_in: Mapping[tuple[bool, ...], Tensor] | None = None) -> None:
    """Masked run == narrowed run, cost == what the narrowed run executes, nothing kept == the pure shortcut.

    size: height and width of the unit's input. keep_in: for a unit that reads another, patterns of that one, each with
    feature maps as they arrive under it (channels that are not there are zeros).
    """
    shake(unit)
    unit.eval()
    spec, terms = unit.spec, unit.cost_terms()
    assert spec.parts == len(terms.by_part_G) == len(spec.part_shares), f"{spec.name}: parts disagree"
    x_BCHW = torch.randn(3, spec.in_channels, size, size)
    dense = unit(x_BCHW)
    everything = [
        legal(torch.ones(3, spec.parts), spec),
        *(torch.ones(3, len(above)) for above in list(keep_in or ())[:1]),
    ]
    assert close(unit(x_BCHW, *everything), dense), f"{spec.name}: keeping all parts is not the dense run"
    arriving: Mapping[Any, Tensor] = keep_in or {None: x_BCHW}
    for keep, (above, x_BCHW) in itertools.product(patterns(spec), arriving.items()):
        small = unit.narrow(keep, above)
        keeps = [torch.tensor([bits] * len(x_BCHW), dtype=torch.float32) for bits in (keep, above) if bits is not None]
        given = f"{keep}" if above is None else f"{keep} reading {above}"
        assert close(small(x_BCHW), unit(x_BCHW, *keeps)), f"{spec.name}: masked and narrowed run disagree for {given}"
        counted, told = count_macs(small, x_BCHW[:1]), _told(terms, keep, above)
        assert counted == told, f"{spec.name}: cost says {told:.0f} MACs for {given}, the run does {counted}"


@torch.no_grad()
def check_backbone(backbone: Backbone, image_size: int) -> None:
    """Every unit passes `check_unit`; the cost of random routes is what the fast run executes; the masked run agrees."""
    x_BCHW = torch.randn(2, 3, image_size, image_size)
    shake(backbone)
    backbone.eval()
    x = backbone.stem(x_BCHW)
    for u, unit in enumerate(backbone.routable):
        check_unit(unit, x.shape[-1], _arriving(backbone, u, x_BCHW))
        x = unit(x)
    assert backbone.head(x).dim() == 2, "the head must return logits_BK"
    net = RoutedNet(backbone, _Given(backbone.specs))
    check_agreement(net, x_BCHW, random_routes(backbone.specs, 2))


@torch.no_grad()
def check_router(router: Router, size: int = 8, images: int = 16) -> None:
    """Legal keeps; eval() deterministic and independent of the batch; a higher price never dearer in the mean at its ends;

    `deployed()` decides alike, and `macs()` is what one image's decisions then execute.
    """
    features = [torch.randn(images, spec.in_channels, size, size) for spec in router.specs]
    picture = torch.randn(images, 3, size, size)

    def run(rows: slice, by: Router = router, shown: Sequence[Tensor] = features) -> list[Tensor]:
        state, keeps = by.begin(picture[rows]), []
        for u, x_BCHW in enumerate(shown):
            decision, state = by.decide(u, x_BCHW[rows], state)
            keeps.append(decision.keep_BG)
        return keeps

    for mode in (True, False):
        router.train(mode)
        for keep, spec in zip(run(slice(None)), router.specs, strict=True):
            _check_legal(keep, spec)
    price, every = router.price, slice(None)
    first, again = run(every), run(every)
    assert all(map(torch.equal, first, again)), "eval() gives different routes for the same images"
    alone = [torch.cat(rows) for rows in zip(*(run(slice(i, i + 1)) for i in range(images)), strict=True)]
    assert all(map(torch.equal, first, alone)), "a route depends on the other images of the batch"
    deployed = router.deployed()
    deployed.setting = router.setting
    assert all(map(torch.equal, first, run(every, deployed))), "deployed() decides otherwise"
    counted = count_macs(lambda: run(slice(0, 1), deployed))
    assert counted == router.macs(), f"macs() says {router.macs():.0f}, one image's decisions do {counted}"
    if deployed.leading:
        cut = [x_BCHW[:, : (x_BCHW.shape[1] + 1) // 2] for x_BCHW in features]
        whole = [
            F.pad(part, (0, 0, 0, 0, 0, x.shape[1] - part.shape[1])) for part, x in zip(cut, features, strict=True)
        ]
        for rows in (every, slice(0, 1)):
            both = [run(rows, deployed, shown) for shown in (cut, whole)]
            assert all(map(torch.equal, *both)), "the first channels alone are not the same as zeros behind them"
    costs = []
    for end in router.price_limits:  # low to high
        router.price = end
        keeps = zip(run(every), router.specs, strict=True)
        costs.append(sum(float((keep @ torch.tensor(spec.part_shares)).mean()) for keep, spec in keeps))
    router.price = price
    assert costs[1] <= costs[0], "a higher price must mean a cheaper net"


def check_dataset(data: Dataset, batch_size: int = 8) -> None:
    """Batches have the promised shapes and ranges; a seed and epoch give the same batches again; splits are not empty."""
    spec = data.spec
    for name in ("train", "calibration", "test"):
        split = getattr(data, name)
        assert len(split) > 0, f"the {name} split is empty"
        train = name == "train"
        one, two = (next(iter(loader(split, spec, batch_size, train=train, seed=1))) for _ in range(2))
        shape = (3, spec.image_size, spec.image_size)
        assert one.images.shape[1:] == shape, f"{name} images are {tuple(one.images.shape[1:])}, not {shape}"
        assert one.images.dtype == torch.float32, f"{name} images are {one.images.dtype}, not float32"
        assert int(one.labels.min()) >= 0, "a label is negative"
        assert int(one.labels.max()) < spec.classes, f"a label lies beyond the {spec.classes} classes"
        assert torch.equal(one.images, two.images), f"the {name} batches of one seed and epoch differ"
        assert (one.superclasses is not None) == (spec.superclasses > 0), "superclasses and their number disagree"


@torch.no_grad()
def check_agreement(net: RoutedNet, x_BCHW: Tensor, keep_BUG: Tensor | None = None) -> None:
    """Masked and fast run give the same logits and routes, and the reported cost is what the fast run executes."""
    net.eval()
    masked = net(x_BCHW, keep_BUG)
    fast = FastNet(net)(x_BCHW, keep_BUG)
    assert close(fast.logits_BK, masked.logits_BK), "masked and fast run disagree"
    assert torch.equal(fast.trace.keep_BUG.bool(), masked.trace.keep_BUG.bool()), "routes of the fast run differ"
    for image in range(len(x_BCHW)):
        given = None if keep_BUG is None else keep_BUG[image : image + 1]
        counted = count_macs(FastNet(net, packed=False), x_BCHW[image : image + 1], given)  # type: ignore[arg-type]
        told = float(masked.macs_B[image]) - (net.cost.router if given is not None else 0.0)
        assert counted == told, f"image {image}: {told:.0f} MACs reported, {counted} executed"


def random_routes(specs: Sequence[UnitSpec], images: int) -> Tensor:
    """keep_BUG of random legal routes."""
    width = max(spec.parts for spec in specs)
    rows = []
    for spec in specs:
        choices = torch.tensor(list(patterns(spec)), dtype=torch.float32)
        picked = choices[torch.randint(len(choices), (images,))]
        rows.append(nn.functional.pad(picked, (0, width - spec.parts)))
    return torch.stack(rows, 1)


def close(one: Tensor, two: Tensor) -> bool:
    """Equal to TOLERANCE of the largest value."""
    return bool((one - two).abs().max() <= TOLERANCE * (1 + two.abs().max()))


@torch.no_grad()
def shake(module: nn.Module) -> None:
    """Random running statistics, affines and biases: at their initial values several mistakes would cancel out."""
    for owner in module.modules():
        for name in ("running_mean", "running_var", "bias"):
            value = getattr(owner, name, None)
            if isinstance(value, Tensor):
                value.copy_(torch.rand_like(value) + 0.5 if name == "running_var" else 0.3 * torch.randn_like(value))
        if hasattr(owner, "running_mean") and getattr(owner, "weight", None) is not None:
            owner.weight.copy_(torch.rand_like(owner.weight) + 0.5)  # type: ignore[arg-type, operator]


def _told(terms: CostTerms, keep: tuple[bool, ...], above: tuple[bool, ...] | None) -> float:
    """A unit's MACs for one pattern of its own and one of the unit it reads; None: all of that."""
    own = terms.always + sum(m for m, k in zip(terms.by_part_G, keep, strict=True) if k)
    rows = [row for h, row in enumerate(terms.by_pair_HG or ()) if above is None or above[h]]
    return own + sum(m for row in rows for m, k in zip(row, keep, strict=True) if k)


def _arriving(backbone: Backbone, u: int, x_BCHW: Tensor) -> dict[tuple[bool, ...], Tensor] | None:
    """What enters unit u under each pattern of the unit it reads, the other units' routes being random."""
    units, reads = backbone.routable[:u], backbone.routable[u].reads
    if reads is None:
        return None
    out = {}
    for above in patterns(units[reads].spec):
        keeps = list(random_routes(backbone.specs, len(x_BCHW)).unbind(1))
        keeps[reads][:, : len(above)] = torch.tensor(above, dtype=torch.float32)
        y_BCHW = backbone.stem(x_BCHW)
        for unit, keep_BG in zip(units, keeps, strict=False):
            y_BCHW = masked(unit, y_BCHW, keep_BG, keeps)
        out[above] = y_BCHW
    return out


def _check_legal(keep_BG: Tensor, spec: UnitSpec) -> None:
    hard = keep_BG.detach()
    assert hard.shape[1] == spec.parts, f"{spec.name}: keep has {hard.shape[1]} parts, the unit {spec.parts}"
    assert bool(((hard == 0) | (hard == 1)).all()), f"{spec.name}: keep must be 0 or 1"
    if spec.form == "choice":
        assert bool((hard.sum(1) == 1).all()), f"{spec.name}: exactly one alternative must run"
    else:
        assert torch.equal(legal(hard, spec), hard), f"{spec.name}: this keep is not legal for form {spec.form!r}"


class _Given(Router):
    """Stands in where routes are given."""
