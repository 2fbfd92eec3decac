"""The contract of every router, and the phases in which a method is trained.

B images, U units, G parts. A router sees UnitSpecs and feature maps, never the backbone. train() explores, eval() is
deterministic; there is no other mode. A higher price means a cheaper net, for every router.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Batch, Decision, InputError, Output, Setting, UnitSpec
from dynroute.cost import NetCost
from dynroute.routers.draws import draw_each, draws, image_hash

if TYPE_CHECKING:
    from dynroute.routers.limit import Limit, Spent

State = Any
NOTE = "note_"  # begins the names of loss terms that are recorded, not minimised
_HERE = threading.local()  # settings: of routers by id, where a group of images has one of its own
MIXED = 1 << 20  # the draw that says which of two prices an image gets; no unit has this number


class Journey(NamedTuple):
    """Where a minibatch is on its way through the units. groups: images of one price (rows, None: all of them), the setting
    that holds for them, and the router's own state; spent: what `Limit` must know."""

    groups: tuple[tuple[Tensor | None, Setting, State], ...]
    spent: Spent | None


class Router(nn.Module):
    """Decides, unit by unit, which parts each image runs.

    A router writes begin() and decide(); nets call start() and choose(), which see to mixed settings and the limit.
    price: the one budget dial: a charge per share of a unit's multiply-adds, subtracted from the score of whatever would
    run. 0 is the trained point. price_limits: where the dial's end stops lie (beyond them nothing changes any more).
    setting: the dial as calibrated for a target: one price, or two. limit: what no image may exceed, whatever the price.
    train_only: names of submodules that a deployed net does without. remarks: what the user is told when training starts.
    pooled: decide() looks at nothing but the mean of a feature map over its pixels, so that it may be given (B, C, 1, 1).
    leading: decide() may be given the first channels of a feature map alone, where the others are zeros (FastNet: of one image).
    alike: all images of one price get the same route.
    """

    setting: Setting = Setting()
    limit: Limit | None = None
    price_limits: tuple[float, float] = (-1e4, 1e4)
    train_only: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    pooled: bool = False
    leading: bool = False
    alike: bool = False

    def __init__(self, specs: Sequence[UnitSpec]) -> None:
        super().__init__()
        self.specs = list(specs)

    @property
    def price(self) -> float:
        """The price that holds for the images at hand; setting it sets it for all."""
        standing: dict[int, Setting] = getattr(_HERE, "settings", {})
        return standing.get(id(self), self.setting).price

    @price.setter
    def price(self, price: float) -> None:
        """One price for all images."""
        self.setting = Setting(price)

    def begin(self, x_BCHW: Tensor) -> State:
        """State before the first unit, from the images; None is fine."""
        return None

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """keep_BG of unit u for the feature maps that enter it, and the next state. Notes: same keys for every unit.

        The state must not share memory with x_BCHW, which the unit may overwrite.
        """
        raise NotImplementedError("a router must write decide()")

    def macs(self) -> float:
        """Multiply-adds of all decisions of one image, counted as for the net."""
        return 0.0

    def deployed(self) -> Router:
        """A router that decides alike in eval(), by this one's weights as they are now, from fewer operations: for FastNet.

        It has a dial and a limit of its own, which the caller sets. The router itself where nothing can be saved.
        """
        return self

    def start(self, x_BCHW: Tensor) -> Journey:
        """begin(), for each price of the setting with the images that it holds for."""
        spent = self.limit.start(len(x_BCHW), x_BCHW.device) if self.limit else None
        groups: list[tuple[Tensor | None, Setting]] = [(None, self.setting)]
        if self.setting.part:
            other = [draw < self.setting.part for draw in draw_each(image_hash(x_BCHW), MIXED)]
            prices = {False: self.setting.price, True: self.setting.other}
            groups = [(_places(other, side, x_BCHW.device), Setting(prices[side])) for side in sorted(set(other))]
        begun = []
        for rows, setting in groups:
            with _standing(self, setting):
                begun.append((rows, setting, self.begin(_of(x_BCHW, rows))))
        return Journey(tuple(begun), spent)

    def choose(self, u: int, x_BCHW: Tensor, journey: Journey) -> tuple[Decision, Journey]:
        """decide() for each group of images, put together in their order, and lowered where the limit asks for it."""
        _, setting, state = journey.groups[0]
        if journey.spent is None and setting is self.setting:  # one price for all, which is the router's own
            decision, after = self.decide(u, x_BCHW, state)
            return decision, Journey(((None, setting, after),), None)
        if self.pooled and len(journey.groups) > 1:  # the images of each price: their means, not copies of their maps
            x_BCHW = x_BCHW.mean((2, 3), keepdim=True, dtype=torch.float32)
        decided, groups = [], []
        for rows, setting, state in journey.groups:
            with _standing(self, setting):
                decision, after = self.decide(u, _of(x_BCHW, rows), state)
            decided.append(decision)
            groups.append((rows, setting, after))
        decision = _together([rows for rows, _, _ in groups], decided)
        spent = journey.spent
        if self.limit and spent:
            keep_BG, spent = self.limit.lowered(u, decision.keep_BG, spent)
            decision = decision._replace(keep_BG=keep_BG)
        return decision, Journey(tuple(groups), spent)


def takes_other(x_BCHW: Tensor, part: float) -> Tensor:
    """Which images (B,) get a mixed setting's other price: that part of all, each image always alike."""
    return draws(image_hash(x_BCHW), MIXED, 1)[:, 0] < part


@contextmanager
def _standing(router: Router, setting: Setting) -> Iterator[None]:
    """The dial at one group's setting, for this thread alone: others may decide for other images meanwhile."""
    if not hasattr(_HERE, "settings"):
        _HERE.settings = {}
    _HERE.settings[id(router)] = setting
    try:
        yield
    finally:
        del _HERE.settings[id(router)]


def _places(sides: list[bool], side: bool, device: torch.device) -> Tensor | None:
    """The places of one side; None: all of them, as for an image alone."""
    places = [i for i, one in enumerate(sides) if one == side]
    return None if len(places) == len(sides) else torch.tensor(places, device=device)


def _of(x_BCHW: Tensor, rows: Tensor | None) -> Tensor:
    return x_BCHW if rows is None else x_BCHW[rows]


def _together(rows: list[Tensor | None], decided: list[Decision]) -> Decision:
    """The decisions of groups of images as one, in the order of the images."""
    if len(decided) == 1:
        return decided[0]
    order_B = torch.cat([own for own in rows if own is not None]).argsort()
    notes = {name: torch.cat([d.notes[name] for d in decided])[order_B] for name in decided[0].notes}
    return Decision(torch.cat([d.keep_BG for d in decided])[order_B], notes)


class Net(Protocol):
    """What a method's phases may know of the net they train (`net.RoutedNet` is one)."""

    router: Router
    cost: NetCost

    def dense_routes(self, images: int) -> Tensor:
        """keep_BUG of the dense net."""

    def span(self) -> tuple[float, float]:
        """Shares of the cheapest and the dearest route."""


@dataclass
class Phase:
    """One stretch of training. All that differs between reinforcement learning and gates stands here.

    trains: "backbone", "router" or both; the rest is frozen in eval().
    loss: its terms are summed and become columns of train.csv; those named note_... are only recorded.
    routes: keep_BUG for B images instead of the router's own decisions (dense: all ones); None asks the router.
    router_lr: Adam at this rate (and with this router_decay) for the router; None trains it by the backbone's SGD, at
    router_scale times its rate and with router_decay on its weights alone. lr_scale: of optim.lr, for the backbone.
    schedule: called before each minibatch with the part of the phase that is done, 0..1 (exploration, temperature).
    passes: how often each minibatch is run, copy after copy in one forward pass, so that a loss may compare what one image
    gets under several routes: `routes` is asked for passes x B of them and `loss` is given as many images.
    target, target_share: share of the parts that the loss asks for, mean over units, or of the dense net's multiply-adds; an
    epoch that ends far from it is remarked upon.
    curve: the stretch of the curve of the learning rate that the phase has; phases that together make one have a curve in common.
    """

    name: str
    epochs: int
    trains: tuple[str, ...]
    loss: Callable[[Output, Batch], dict[str, Tensor]]
    routes: Callable[[int], Tensor] | None = None
    router_lr: float | None = None
    router_decay: float = 0.0
    router_scale: float = 1.0
    lr_scale: float = 1.0
    schedule: Callable[[float], None] | None = None
    passes: int = 1
    target: float | None = None
    target_share: float | None = None
    curve: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Method:
    """A row of ROUTERS: the router, its options, its phases, the unit form it needs ("any": every form).

    about: a sentence for `dynroute list`. also: other unit forms that it takes if asked to.
    """

    router: Callable[[Sequence[UnitSpec], Any, int], Router]  # specs, options, superclasses of the data (0: none)
    options: type
    phases: Callable[[Net, Any], Iterator[Phase]]
    unit: str = "any"
    about: str = ""
    also: tuple[str, ...] = ()


def legal(keep_BG: Tensor, spec: UnitSpec) -> Tensor:
    """The nearest legal keep: sorted to a prefix for nested units, and at least the first part where nothing is not allowed.

    Of alternatives the dearest that is kept, and the cheapest where none is; a gradient passes straight through.
    """
    if spec.form == "choice":
        share_G = torch.tensor(spec.part_shares, device=keep_BG.device)
        dearest_B = (keep_BG.detach() * share_G).argmax(1)
        one_B = torch.where(keep_BG.detach().any(1), dearest_B, share_G.argmin())
        one_hot_BG = nn.functional.one_hot(one_B, spec.parts).to(keep_BG.dtype)
        return one_hot_BG + (keep_BG - keep_BG.detach())  # in this order the sum is exactly 0 or 1
    if spec.form == "nested":
        keep_BG = keep_BG.sort(dim=1, descending=True).values
    if not spec.skippable:
        keep_BG = torch.cat([torch.ones_like(keep_BG[:, :1]), keep_BG[:, 1:]], 1)
    return keep_BG


def stacked(keeps: Sequence[Tensor]) -> Tensor:
    """One tensor (..., U, G) of one (..., G) a unit; units with fewer parts are padded with zeros."""
    widest = max(keep.shape[-1] for keep in keeps)
    rows = [k if k.shape[-1] == widest else nn.functional.pad(k, (0, widest - k.shape[-1])) for k in keeps]
    return torch.stack(rows, -2)


def classification_loss(logits_BK: Tensor, batch: Batch) -> Tensor:
    """Each image's loss (B,): cross entropy, and where there is a teacher its part of T^2 KL(teacher || net) instead."""
    own_B = F.cross_entropy(logits_BK, batch.labels, reduction="none")
    if batch.advice is None:
        return own_B
    teacher_BK, weight, t = batch.advice
    wanted, said = F.log_softmax(teacher_BK / t, 1), F.log_softmax(logits_BK / t, 1)
    apart_B = F.kl_div(said, wanted, reduction="none", log_target=True).sum(1) * t * t
    return (1 - weight) * own_B + weight * apart_B


def cross_entropy(out: Output, batch: Batch) -> dict[str, Tensor]:
    """The classification loss alone, a teacher's part included where there is one."""
    return {"loss_cls": classification_loss(out.logits_BK, batch).mean()}


def added_up(terms: dict[str, Tensor], passes: int) -> dict[str, Tensor]:
    """Losses of a minibatch run several times, summed over the passes instead of averaged; notes stay what they are."""
    return {name: value if name.startswith(NOTE) else value * passes for name, value in terms.items()}


def ranged(path: str, value: float, low: float, high: float) -> None:
    """Raise InputError unless low <= value <= high (NaN never is)."""
    if not low <= value <= high:
        raise InputError(f"{path} must lie between {low:g} and {high:g}, not {value}")
