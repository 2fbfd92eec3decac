"""DMNN (Su et al., arXiv 1902.10949): a switch for each sub-block, set by a small controller per block.

The controller of block l sees the pooled feature map and the controller state of block l-1; it is trained through
Gumbel noise with a straight-through gradient, by the task loss, a category loss and a resource loss. Equation numbers
are the paper's. ConvNet-AIG (Veit and Belongie, ECCV 2018), on which it builds, is the same router with one part a block,
previous=false, category=false, hidden=16, norm=true, resource=aig and a target for each block.
With a budget (ours) one net is trained for a range of targets: each image has its own, and its controllers are told it.
B images, U units, G = N sub-blocks, S superclasses, D hidden size, K knots of the table of targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Batch, Decision, InputError, Output, Trace, UnitSpec
from dynroute.routers.base import Net, Phase, Router, added_up, cross_entropy, legal, ranged
from dynroute.routers.budget import KNOTS, Range, check_budget
from dynroute.routers.deployed import DeployedGates

FEEDBACK = 0.05  # step of a budget's target per minibatch and per share missed (ours)
SLACK = 0.2  # and how far from its budget the target may move
GROUPS = 4  # of the images of a pass by target, each held to its own mean: 32 of 128 images (ours)
TARGET = 0.5
APART = 0.05  # of shares: beyond it rate and FLOPs terms are said to contradict each other (ours)
OPEN_AT_START = 0.87
STEEP = 12.0  # log odds of a gate per share of budget: so a gate opens within about a third of the whole range (ours)


@dataclass
class DmnnOptions:
    """The `router` section for router.name=dmnn. "Ours" marks what the paper does not state."""

    target: float = TARGET
    """Target t = r: share of the dense net's multiply-adds, and of the sub-blocks of each block, that should run. With
    resource=aig, of the blocks alone. Beside targets with resource=aig it only names the row in tables."""
    targets: list[float] = field(default_factory=list)
    """r of each block, in the order of the blocks (ConvNet-AIG; or where all sub-blocks together cost much more than the dense
    net, so that r of them and t of the dense net are not the same thing); empty: target for all."""
    budget: list[float] | None = None
    """[low, high]: targets drawn from, image by image, and given to the controllers, so that one net serves every budget
    between; what is asked for is corrected until eval mode spends it. Empty: the one target. Ours."""
    budgets_per_image: int = 1
    """Budgets drawn for each image of a minibatch, spread over the range: the image runs once for each, in one step, and the
    losses add up, as those of the widths of a slimmable net. Takes so many times the time and the memory. Ours."""
    epochs: int = 10
    """Epochs of joint training."""
    open_epochs: int = 0
    """Epochs before them in which every part runs and the backbone alone learns, on the same curve of the learning rate:
    where epochs are few, gates drawn anew at every step make learning slow. Ours."""
    cooling: float = 0.0
    """Part of the joint training, at its end, over which the noise of the gates falls to none, as in eval mode. Ours."""
    hidden: int = 32
    """Hidden size d of the controllers (paper: 32)."""
    norm: bool = False
    """BatchNorm before the controller's first ReLU, as in ConvNet-AIG."""
    previous: bool = True
    """The controller also reads the state of the block before, equation (7)."""
    category: bool = True
    """Category loss against superclasses, equations (9)-(10); off by itself where the data has none."""
    resource_weight: float = 2.0
    """Weight lambda of the resource loss in equation (16). Ours: of 0.5, 2 and 8 on the embedded data 2 ended nearest to the
    target, within the spread over seeds (docs/results.md). ConvNet-AIG's 2 on CIFAR is of a mean over blocks; here their
    terms add up."""
    resource: str = "dmnn"
    """Resource loss: dmnn, equations (11)-(15); flops, the FLOPs term (14) alone, which leaves open where it is spent (ours);
    or aig: the mean over blocks of (share run - target)^2, no FLOPs term."""
    temperature: float = 1.0
    """Temperature of the Gumbel softmax. Ours, as ConvNet-AIG."""
    open_at_start: float = OPEN_AT_START
    """Probability with which a gate is open before training; not with a budget, where it depends on the target. Ours, as
    ConvNet-AIG."""
    gate_lr: float = 1.0
    """Learning rate of the controllers, times optim.lr. Ours."""
    gate_decay: float = 0.0
    """Weight decay of the controllers' weights; biases and BatchNorms have none. Ours."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("router.target", self.target, 0.01, 1.0)
        for target in self.targets:
            ranged("router.targets", target, 0.0, 1.0)
        if self.targets and self.resource == "flops":
            raise InputError("router.targets are parts of blocks, which router.resource=flops does not ask for")
        check_budget(self.budget, self.budgets_per_image)
        if self.budget and (self.targets or self.target != TARGET):
            raise InputError("router.budget excludes router.target and router.targets: it draws targets from its range")
        if self.budget and self.open_at_start != OPEN_AT_START:
            raise InputError(
                "router.budget excludes router.open_at_start: gates then start open or closed by the target"
            )
        if self.resource not in ("dmnn", "flops", "aig"):
            raise InputError(f"router.resource must be dmnn, flops or aig, not {self.resource!r}")
        ranged("router.epochs", self.epochs, 0, 100_000)
        ranged("router.open_epochs", self.open_epochs, 0, 100_000)
        ranged("router.cooling", self.cooling, 0.0, 1.0)
        ranged("router.hidden", self.hidden, 1, 65_536)
        ranged("router.resource_weight", self.resource_weight, 0.0, 1e6)
        ranged("router.temperature", self.temperature, 1e-3, 1e3)
        ranged("router.open_at_start", self.open_at_start, 0.01, 0.99)
        ranged("router.gate_lr", self.gate_lr, 0.0, 1e3)
        ranged("router.gate_decay", self.gate_decay, 0.0, 10.0)


class Memory(NamedTuple):
    """The controllers' state. h_BD: of the block before, None at the first. With a budget: asked_B, the share asked of each
    image, and told_B, the target that buys it."""

    h_BD: Tensor | None = None
    asked_B: Tensor | None = None
    told_B: Tensor | None = None


class GateRouter(Router):
    """One controller per unit: z = GAP(x), h_l = ReLU(W1 z) + ReLU(W2 h_{l-1}), logits u = W3 h_l + b (5)-(8).

    A part runs when its open logit beats its closed one by more than price times its share of the unit's MACs. With a
    budget z has one more entry, the image's target, and the price first moves what is asked within the range.
    noise: what the Gumbel noise of training is multiplied by.
    """

    noise: float = 1.0
    train_only = ("category",)
    pooled = True
    told_K: Tensor

    def __init__(self, specs: Sequence[UnitSpec], options: DmnnOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        if any(s.form == "choice" for s in specs):
            raise InputError(
                "gates open parts independently, so alternatives are not for them: set backbone.unit=paths"
            )
        if options.targets and len(options.targets) != len(specs):
            raise InputError(
                f"router.targets must be as many as the net has blocks, {len(specs)}, not {len(options.targets)}"
            )
        self.options = options
        self.range = Range(*options.budget) if options.budget else None
        if self.range:
            self.register_buffer("told_K", torch.linspace(*self.range, KNOTS))
        size, told = options.hidden, 1 if self.range else 0
        later = range(1, len(specs)) if options.previous else ()
        self.features = nn.ModuleList(nn.Linear(s.in_channels + told, size, bias=False) for s in specs)  # W1
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for _ in specs) if options.norm else None
        self.previous = nn.ModuleDict({str(u): nn.Linear(size, size, bias=False) for u in later})  # W2
        self.gates = nn.ModuleList(nn.Linear(size, 2 * s.parts) for s in specs)  # W3, b
        wanted = superclasses if options.category else 0
        if options.category and not superclasses:
            self.remarks = ("no category loss: the data have no superclasses (data.superclasses may name them)",)
        # classifiers of the category loss: used in training alone, so they cost nothing at test time
        self.category = nn.ModuleList(nn.Linear(size, wanted) for _ in specs) if wanted else None
        for gate in (module for module in self.gates if isinstance(module, nn.Linear)):
            nn.init.normal_(gate.weight, std=0.001)
            nn.init.zeros_(gate.bias)
            gate.bias.data.view(-1, 2)[:, 1] = math.log(options.open_at_start / (1 - options.open_at_start))
        if self.range:
            self._open_in_turn()
        shares = [torch.tensor(s.part_shares) for s in specs]
        for u, share_G in enumerate(shares):
            self.register_buffer(f"share_{u}", share_G, persistent=False)

    def _open_in_turn(self) -> None:
        """Log odds that rise with the target: the gates open one after another, the first part of every unit before any second.

        So an untrained net already obeys, and with the noise off the share rises in small steps, not all at once. Ours.
        """
        parts = sum(s.parts for s in self.specs)
        order = sorted((g, u) for u, s in enumerate(self.specs) for g in range(s.parts))
        self.slopes = nn.ParameterList(nn.Parameter(torch.full((s.parts,), STEEP)) for s in self.specs)
        for place, (g, u) in enumerate(order):
            biases = cast(nn.Linear, self.gates[u]).bias.data
            biases.view(-1, 2)[g, 1] = -STEEP * (place + 0.5) / parts

    def begin(self, x_BCHW: Tensor) -> Memory:
        """Each image's budget, where there is a range of them: drawn in training, set by the dial in eval."""
        if self.range is None:
            return Memory()
        if self.training:
            asked_B = self.range.draw(len(x_BCHW), x_BCHW.device, self.options.budgets_per_image)
        else:
            asked_B = torch.full((len(x_BCHW),), self.asked()[0], device=x_BCHW.device)
        return Memory(None, asked_B, self.range.read(self.told_K, asked_B))

    def decide(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Decision, Memory]:
        """Gates of block u.

        Notes: logits_BG (open minus closed); while training category_BS, and with a budget asked_B, told_B and greedy_BG,
        the gates without noise.
        """
        z_BC = _pooled(x_BCHW).to(self.get_buffer(f"share_{u}").dtype)  # the net may run in a shorter type
        if self.range is not None and state.told_B is not None:
            z_BC = torch.cat([z_BC, self.range.heard(state.told_B)[:, None].to(z_BC.dtype)], 1)
        with torch.autocast(z_BC.device.type, enabled=False):  # log odds near 0 differ by less than bf16 can tell
            h_BD, logits_BG = self._controller(u, z_BC, state.h_BD)
        if state.told_B is not None:
            logits_BG = logits_BG + self.slopes[u] * state.told_B[:, None]
        logits_BG = logits_BG - self.asked()[1] * self.get_buffer(f"share_{u}")
        notes = {"logits": logits_BG}
        if self.training and self.category is not None:
            notes["category"] = self.category[u](h_BD).float()
        if self.training and state.asked_B is not None and state.told_B is not None:
            greedy_BG = legal((logits_BG.detach() > 0).float(), self.specs[u])
            notes |= {"asked": state.asked_B, "told": state.told_B, "greedy": greedy_BG}
        keep_BG = self._sample(logits_BG) if self.training else (logits_BG > 0).float()
        return Decision(legal(keep_BG, self.specs[u]), notes), state._replace(h_BD=h_BD)

    def _controller(self, u: int, z_BC: Tensor, before_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state h_BD of block u, (5)-(7), and its log odds (B, G) of open against closed (8)."""
        v_BD = self.features[u](z_BC)
        h_BD = F.relu(v_BD if self.norms is None else self.norms[u](v_BD))
        if before_BD is not None and str(u) in self.previous:
            h_BD = h_BD + F.relu(self.previous[str(u)](before_BD))
        closed_open_BG2 = self.gates[u](h_BD).unflatten(1, (-1, 2))
        return h_BD, closed_open_BG2[:, :, 1] - closed_open_BG2[:, :, 0]

    def deployed(self) -> DeployedGates:
        """The same decisions from fewer operations, weights as they are now."""
        return DeployedGates(self)

    def macs(self) -> float:
        """Linear layers of all controllers as deployed: what is told goes into biases, the category classifiers do not run."""
        d = self.options.hidden
        linear = sum(s.in_channels * d + d * 2 * s.parts for s in self.specs)
        return float(linear + len(self.previous) * d * d)

    @torch.no_grad()
    def correct_targets(self, asked_B: Tensor, share_B: Tensor, span: tuple[float, float]) -> None:
        """Lower the targets of budgets that the gates without noise overspend, raise those of the others.

        share_B: of those gates. span: shares of the cheapest and the dearest route.
        """
        assert self.range is not None
        wanted_K = torch.linspace(*self.range, KNOTS, device=self.told_K.device)
        self.told_K -= FEEDBACK * self.range.overspent(asked_B, share_B, span)
        self.told_K.clamp_(wanted_K - SLACK, wanted_K + SLACK)

    def warn_of_two_targets(self, target: float, parts: float, span: tuple[float, float]) -> None:
        """Leave a remark where the rate terms (12) and the FLOPs term (14) ask for costs that are far apart.

        parts: mean r of the blocks. span: shares of the cheapest and the dearest route.
        """
        share = span[0] + parts * (span[1] - span[0])
        if abs(share - target) > APART:
            fit = (target - span[0]) / (span[1] - span[0])
            remark = f"{parts:.2f} of the parts cost {share:.2f} of the dense net, and {target:.2f} is asked for: the resource "
            self.remarks = (
                *self.remarks,
                f"{remark}loss cannot have both; router.targets=[{fit:.2f}, ...] for each block agrees",
            )

    def asked(self) -> tuple[float, float]:
        """(budget asked for, price on top per share of a unit), as the dial stands; no budget is asked for without a range."""
        return (0.0, self.price) if self.range is None else self.range.dial(self.price)

    def _sample(self, logits_BG: Tensor) -> Tensor:
        """Hard gates with the gradient of the soft ones (8).

        The arg-max of two Gumbel-perturbed logits is the sign of their difference plus logistic noise.
        """
        uniform = torch.rand_like(logits_BG).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((logits_BG + self.noise * uniform.logit()) / self.options.temperature)
        return (soft > 0.5).float() + (soft - soft.detach())  # in this order the sum is exactly 0 or 1


def phases(net: Net, options: DmnnOptions) -> Iterator[Phase]:
    """Everything is trained together on L = L_cls + L_cat + lambda L_res (16); before it, if asked, the open net alone."""
    router, specs, span = net.router, net.router.specs, net.span()
    assert isinstance(router, GateRouter)
    weights_U = torch.tensor([category_weight(s) for s in specs])
    parts_U = torch.tensor([s.parts for s in specs])
    targets_U = torch.tensor(options.targets or [options.target] * len(specs))
    passes = options.budgets_per_image
    if options.resource == "dmnn" and router.range is None:
        router.warn_of_two_targets(options.target, float(targets_U.mean()), span)

    def resource(out: Output, target: float | Tensor, targets_U: Tensor) -> Tensor:
        if options.resource == "aig":
            return rate_loss(out, parts_U, targets_U).mean()
        if options.resource == "flops":
            return flops_loss(out, target, net.cost.dense)
        return resource_loss(out, parts_U, target, net.cost.dense, targets_U)

    def asked_resource(out: Output) -> Tensor:
        """The resource loss of each group of images with similar targets, at the group's mean target; their mean."""
        told_B = out.trace.notes["told"][:, 0]
        losses = []
        for group in told_B.argsort().tensor_split(min(GROUPS * passes, len(told_B))):
            target = told_B[group].mean()
            part = Output(out.logits_BK, Trace(out.trace.keep_BUG[group], {}), out.macs_B[group])
            losses.append(resource(part, target, target.expand(len(specs))))
        return torch.stack(losses).mean()

    def loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        terms, notes = cross_entropy(out, batch), out.trace.notes
        if router.range is None:
            terms["loss_resource"] = options.resource_weight * resource(out, options.target, targets_U)
        else:
            terms["loss_resource"] = options.resource_weight * asked_resource(out)
            share_B = net.cost(notes["greedy"]) / net.cost.dense
            router.correct_targets(notes["asked"][:, 0], share_B.float(), span)
            terms |= {"note_target_low": router.told_K[0].clone(), "note_target_high": router.told_K[-1].clone()}
        if "category" in notes and batch.superclasses is not None:
            terms["loss_category"] = category_loss(out, batch.superclasses, weights_U)
        return added_up(terms, passes)

    # price 0, the trained point, stands in the middle of the range; the FLOPs term alone asks for no number of parts
    middle = router.range.dial(0.0)[0] if router.range else None
    by_share = options.resource == "flops"
    opened = options.open_epochs / max(1, options.open_epochs + options.epochs)
    if options.open_epochs:
        yield Phase(
            "open", options.open_epochs, ("backbone",), cross_entropy, routes=net.dense_routes, curve=(0.0, opened)
        )
    yield Phase(
        "joint",
        options.epochs,
        ("backbone", "router"),
        loss,
        router_scale=options.gate_lr,
        router_decay=options.gate_decay,
        schedule=lambda done: cool(router, done, options.cooling),
        passes=passes,
        target=None if by_share else float(targets_U.mean()) if middle is None else middle,
        target_share=None if not by_share else options.target if middle is None else middle,
        curve=(opened, 1.0),
    )


def cool(router: GateRouter, done: float, cooling: float) -> None:
    """Set the noise of the gates when `done` (0..1) of the joint training is over: 1, and 0 at its end if there is cooling."""
    router.noise = min(1.0, (1.0 - done) / cooling) if cooling else 1.0


def executed(out: Output, parts_U: Tensor) -> Tensor:
    """e_l of (11), (U,): share of each block's sub-blocks that the minibatch runs."""
    keep_BUG = out.trace.keep_BUG
    return keep_BUG.sum(2).mean(0) / parts_U.to(keep_BUG.device)


def rate_loss(out: Output, parts_U: Tensor, targets_U: Tensor) -> Tensor:
    """(e_l - r_l)^2 of each block, (U,): their sum is L_rate of (12), their mean the loss of ConvNet-AIG."""
    rate_U = executed(out, parts_U)
    return (rate_U - targets_U.to(rate_U.device)).square()


def resource_loss(
    out: Output, parts_U: Tensor, target: float | Tensor, dense: float, targets_U: Tensor | None = None
) -> Tensor:
    """L_res = sum_l (e_l - r)^2 + (F_act / F_full - t)^2, equations (11)-(15), with r = t or r_l of targets_U.

    F_act is the mean of the reported per-image MACs, stem, head and controllers included; F_full the dense net's.
    """
    wanted_U = torch.full((len(parts_U),), float(target)) if targets_U is None else targets_U
    return rate_loss(out, parts_U, wanted_U).sum() + flops_loss(out, target, dense)


def flops_loss(out: Output, target: float | Tensor, dense: float) -> Tensor:
    """L_flops = (F_act / F_full - t)^2 of (14)."""
    return ((out.macs_B.mean() / dense).float() - target).square()


def category_weight(spec: UnitSpec) -> float:
    """w_l of (10): 1e-1 in the last stage and a tenth of it for each stage before; four stages give the paper's

    1e-4, 1e-3, 1e-2, 1e-1, three stages 1e-3, 1e-2, 1e-1 (ours: the paper's nets have four).
    """
    return 10.0 ** (spec.stage - spec.stages - 1)


def category_loss(out: Output, superclasses_B: Tensor, weights_U: Tensor) -> Tensor:
    """L_cat = sum_l w_l CE(classifier_l(h_l), superclass), equations (9)-(10)."""
    logits_BUS = out.trace.notes["category"]
    labels_BU = superclasses_B[:, None].expand(-1, logits_BUS.shape[1])
    losses_BU = F.cross_entropy(logits_BUS.transpose(1, 2), labels_BU, reduction="none")
    return (losses_BU.mean(0) * weights_U.to(losses_BU.device)).sum()


def _pooled(x_BCHW: Tensor) -> Tensor:
    """(B, C) mean over pixels. On the CPU in a form whose gradient keeps x's memory format, as that of `Tensor.mean` does not."""
    if x_BCHW.device.type != "cpu":
        return x_BCHW.mean((2, 3))
    return F.avg_pool2d(x_BCHW, x_BCHW.shape[2:]).flatten(1)
