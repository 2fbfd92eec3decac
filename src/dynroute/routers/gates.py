"""DMNN (Su et al., arXiv 1902.10949): a switch for each sub-block, set by a small controller per block.

The controller of block l sees the pooled feature map and the controller state of block l-1; it is trained through
Gumbel noise with a straight-through gradient, by the task loss, a category loss and a resource loss. Equation numbers
are the paper's. ConvNet-AIG (Veit and Belongie, ECCV 2018), on which it builds, is the same router with one part a block,
previous=false, category=false, hidden=16, norm=true, resource=aig and a target for each block.
B images, U units, G = N sub-blocks, S superclasses, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Batch, Decision, InputError, Output, UnitSpec
from dynroute.routers.base import Net, Phase, Router, State, cross_entropy, legal, ranged


@dataclass
class DmnnOptions:
    """The `router` section for router.name=dmnn. "Ours" marks what the paper does not state."""

    target: float = 0.5
    """Target t = r: share of the dense net's multiply-adds, and of the sub-blocks of each block, that should run."""
    targets: list[float] = field(default_factory=list)
    """Share of the sub-blocks of each block that should run, in the order of the blocks (ConvNet-AIG); empty: target for all."""
    epochs: int = 10
    """Epochs of joint training."""
    hidden: int = 32
    """Hidden size d of the controllers (paper: 32)."""
    norm: bool = False
    """BatchNorm before the controller's first ReLU, as in ConvNet-AIG."""
    previous: bool = True
    """The controller also reads the state of the block before, equation (7)."""
    category: bool = True
    """Category loss against superclasses, equations (9)-(10); off by itself where the data has none."""
    resource_weight: float = 2.0
    """Weight lambda of the resource loss in equation (16). Ours, as ConvNet-AIG on CIFAR."""
    resource: str = "dmnn"
    """Resource loss: dmnn, equations (11)-(15), or aig: the mean over blocks of (share run - target)^2, no FLOPs term."""
    temperature: float = 1.0
    """Temperature of the Gumbel softmax. Ours, as ConvNet-AIG."""
    open_at_start: float = 0.87
    """Probability with which a gate is open before training. Ours, as ConvNet-AIG."""
    gate_lr: float = 1.0
    """Learning rate of the controllers, times optim.lr. Ours."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("router.target", self.target, 0.01, 1.0)
        for target in self.targets:
            ranged("router.targets", target, 0.0, 1.0)
        if self.resource not in ("dmnn", "aig"):
            raise InputError(f"router.resource must be dmnn or aig, not {self.resource!r}")
        ranged("router.epochs", self.epochs, 0, 100_000)
        ranged("router.hidden", self.hidden, 1, 65_536)
        ranged("router.resource_weight", self.resource_weight, 0.0, 1e6)
        ranged("router.temperature", self.temperature, 1e-3, 1e3)
        ranged("router.open_at_start", self.open_at_start, 0.01, 0.99)
        ranged("router.gate_lr", self.gate_lr, 0.0, 1e3)


class GateRouter(Router):
    """One controller per unit: z = GAP(x), h_l = ReLU(W1 z) + ReLU(W2 h_{l-1}), logits u = W3 h_l + b (5)-(8).

    A part runs when its open logit beats its closed one by more than price times its share of the unit's MACs.
    """

    train_only = ("category",)

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
        size = options.hidden
        later = range(1, len(specs)) if options.previous else ()
        self.features = nn.ModuleList(nn.Linear(s.in_channels, size, bias=False) for s in specs)  # W1
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
            odds = math.log(options.open_at_start / (1 - options.open_at_start))
            gate.bias.data.view(-1, 2)[:, 1] = odds
        shares = [torch.tensor(s.part_shares) for s in specs]
        for u, share_G in enumerate(shares):
            self.register_buffer(f"share_{u}", share_G, persistent=False)

    def decide(self, u: int, x_BCHW: Tensor, state: State) -> tuple[Decision, State]:
        """Gates of block u. Notes: logits_BG (open minus closed), and category_BS while training."""
        pooled_BC = x_BCHW.mean((2, 3)).to(self.get_buffer(f"share_{u}").dtype)  # the net may run in a shorter type
        v_BD = self.features[u](pooled_BC)
        h_BD = F.relu(v_BD if self.norms is None else self.norms[u](v_BD))
        if state is not None and str(u) in self.previous:
            h_BD = h_BD + F.relu(self.previous[str(u)](state))
        closed_open_BG2 = self.gates[u](h_BD).float().unflatten(1, (-1, 2))
        logits_BG = closed_open_BG2[:, :, 1] - closed_open_BG2[:, :, 0]
        logits_BG = logits_BG - self.price * self.get_buffer(f"share_{u}")
        notes = {"logits": logits_BG}
        if self.training and self.category is not None:
            notes["category"] = self.category[u](h_BD).float()
        keep_BG = self._sample(logits_BG) if self.training else (logits_BG > 0).float()
        return Decision(legal(keep_BG, self.specs[u]), notes), h_BD

    def macs(self) -> float:
        """Linear layers of all controllers; the category classifiers do not run at test time."""
        d = self.options.hidden
        return float(sum(s.in_channels * d + d * 2 * s.parts for s in self.specs) + len(self.previous) * d * d)

    def _sample(self, logits_BG: Tensor) -> Tensor:
        """Hard gates with the gradient of the soft ones (8).

        The arg-max of two Gumbel-perturbed logits is the sign of their difference plus logistic noise.
        """
        uniform = torch.rand_like(logits_BG).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((logits_BG + uniform.logit()) / self.options.temperature)
        return (soft > 0.5).float() + (soft - soft.detach())  # in this order the sum is exactly 0 or 1


def phases(net: Net, options: DmnnOptions) -> Iterator[Phase]:
    """One phase: everything is trained together on L = L_cls + L_cat + lambda L_res (16)."""
    specs = net.router.specs
    weights_U = torch.tensor([category_weight(s) for s in specs])
    targets_U = torch.tensor(options.targets or [options.target] * len(specs))
    parts_U = torch.tensor([s.parts for s in specs])

    def resource(out: Output) -> Tensor:
        if options.resource == "aig":
            return rate_loss(out, parts_U, targets_U).mean()
        return resource_loss(out, parts_U, options.target, net.cost.dense, targets_U)

    def loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        terms = cross_entropy(out, batch)
        terms["loss_resource"] = options.resource_weight * resource(out)
        if "category" in out.trace.notes and batch.superclasses is not None:
            terms["loss_category"] = category_loss(out, batch.superclasses, weights_U)
        return terms

    asked = float(targets_U.mean())
    yield Phase("joint", options.epochs, ("backbone", "router"), loss, router_scale=options.gate_lr, target=asked)


def executed(out: Output, parts_U: Tensor) -> Tensor:
    """e_l of (11), (U,): share of each block's sub-blocks that the minibatch runs."""
    keep_BUG = out.trace.keep_BUG
    return keep_BUG.sum(2).mean(0) / parts_U.to(keep_BUG.device)


def rate_loss(out: Output, parts_U: Tensor, targets_U: Tensor) -> Tensor:
    """(e_l - r_l)^2 of each block, (U,): their sum is L_rate of (12), their mean the loss of ConvNet-AIG."""
    rate_U = executed(out, parts_U)
    return (rate_U - targets_U.to(rate_U.device)).square()


def resource_loss(out: Output, parts_U: Tensor, target: float, dense: float, targets_U: Tensor | None = None) -> Tensor:
    """L_res = sum_l (e_l - r)^2 + (F_act / F_full - t)^2, equations (11)-(15), with r = t or r_l of targets_U.

    F_act is the mean of the reported per-image MACs, stem, head and controllers included; F_full the dense net's.
    """
    wanted_U = torch.full((len(parts_U),), target) if targets_U is None else targets_U
    share = (out.macs_B.mean() / dense).float()
    return rate_loss(out, parts_U, wanted_U).sum() + (share - target).square()


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
