"""RNP (Lin et al., NIPS 2017) and RNR (Rao et al., TPAMI 2019): a Q-learning agent decides how much of each unit runs.

    state    s_u: GAP of the unit's input -> encoder_u -> one recurrent cell shared by all units
    action   a_u in 0..A-1: run the first a_u + 1 groups (nested units), or the a_u-th alternative (choice units)
    Q-value  decoder_u(s_u), one per action; the policy takes the best, in training with probability epsilon a random one
    reward   r_u = -charge * cost(a_u), and -alpha L_cls of that very image added to the last one
    loss     (target_u - Q(s_u, a_u))^2, target detached

Training alternates as in RNP's Algorithm 1: the CNN learns all widths, then agent and CNN take turns. `rnp` keeps to what
the paper and its authors' code state; `rnr` differs by its options: the cost is the action's share of the unit's
multiply-adds, the charge is drawn for every image from a range and given to the agent (so that one agent serves every
budget), and agent and CNN end by learning together. B images, U units, A actions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Batch, Decision, InputError, Output, UnitSpec
from dynroute.routers.base import Net, Phase, Router, cross_entropy, ranged, stacked

CELLS: dict[str, Callable[[int, int], nn.RNNCellBase]] = {
    "rnn": nn.RNNCell,
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}
GATES_OF = {"rnn": 1, "gru": 3, "lstm": 4}


@dataclass
class RnpOptions:
    """The `router` section for router.name=rnp. "Ours" marks what the paper does not state."""

    pretrain_epochs: int = 4
    """Epochs of the dense net before anything else; set 0 where backbone.weights brings a trained one."""
    widths_epochs: int = 4
    """Epochs of the CNN under random actions, so that every width works (stage 2 of the authors' code)."""
    rounds: int = 2
    """Rounds M of Algorithm 1: agent, then CNN."""
    agent_epochs: int = 2
    """Epochs N1 of the agent in each round, CNN frozen."""
    cnn_epochs: int = 2
    """Epochs N2 of the CNN in each round under the agent's routes, agent frozen."""
    joint_epochs: int = 0
    """Epochs in which each minibatch trains both, as in the authors' code."""
    action_cost: str = "index"
    """Cost of action i: index, the paper's (i-1), or share, its part of the unit's multiply-adds."""
    charge: list[float] | None = None
    """Charge per unit of cost: [-p] or [low, high]; a range is drawn from, image by image, and given to the agent.
    Empty: [0.1] for rnp (the paper's p = -0.1), [0.0, 0.15] for rnr."""
    alpha: float = 1.0
    """Scale of the classification loss in the reward."""
    gamma: float = 1.0
    """Discount of Q-learning (authors' code: 1)."""
    trace: float = 0.0
    """Lambda of Q(lambda) returns; 0 is the paper's one-step target."""
    hidden: int = 128
    """Size of the encoders and of the recurrent state. Ours."""
    cell: str = "gru"
    """Recurrent cell: rnn, gru (authors' code) or lstm."""
    lr: float = 1e-3
    """Learning rate of the agent (Adam). Ours; the authors' 1e-4 goes with hundreds of epochs."""
    epsilon_start: float = 1.0
    """Exploration at the start of the agent's training."""
    epsilon_end: float = 0.1
    """Exploration at its end (authors' code: 0.1)."""
    cnn_lr: float = 0.5
    """Learning rate of the CNN in rounds and joint training, times optim.lr. Ours."""

    def __post_init__(self) -> None:
        """Fill in the charge and raise InputError on the first value out of range."""
        self.charge = [0.1] if self.charge is None else self.charge
        for name in (
            "pretrain_epochs",
            "widths_epochs",
            "rounds",
            "agent_epochs",
            "cnn_epochs",
            "joint_epochs",
        ):
            ranged(f"router.{name}", getattr(self, name), 0, 100_000)
        for name in ("gamma", "trace", "epsilon_start", "epsilon_end"):
            ranged(f"router.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("alpha", "lr", "cnn_lr"):
            ranged(f"router.{name}", getattr(self, name), 0.0, 1e6)
        ranged("router.hidden", self.hidden, 1, 65_536)
        if self.cell not in CELLS:
            raise InputError(f"router.cell must be one of {', '.join(CELLS)}, not {self.cell!r}")
        if self.action_cost not in ("index", "share"):
            raise InputError(f"router.action_cost must be index or share, not {self.action_cost!r}")
        if (
            not 1 <= len(self.charge) <= 2
            or not all(0 <= c < 1e6 for c in self.charge)
            or sorted(self.charge) != self.charge
        ):
            raise InputError(f"router.charge must be [p] or [low, high], low <= high, none negative, not {self.charge}")


@dataclass
class RnrOptions(RnpOptions):
    """The `router` section for router.name=rnr: RNP's options with other defaults. All schedules and sizes are ours."""

    rounds: int = 1
    """Rounds M of Algorithm 1: agent, then CNN."""
    cnn_epochs: int = 0
    """Epochs N2 of the CNN in each round under the agent's routes, agent frozen."""
    joint_epochs: int = 6
    """Epochs in which each minibatch trains both."""
    action_cost: str = "share"
    """Cost of action i: index, RNP's (i-1), or share, its part of the unit's multiply-adds."""
    trace: float = 0.7
    """Lambda of Q(lambda) returns; 0 is a one-step target."""
    hidden: int = 64
    """Size of the encoders and of the recurrent state."""
    lr: float = 2e-3
    """Learning rate of the agent (Adam)."""

    def __post_init__(self) -> None:
        """Fill in the charge, a range, and check as RNP does."""
        self.charge = [0.0, 0.15] if self.charge is None else self.charge
        super().__post_init__()


class Memory(NamedTuple):
    """The agent's state. h_BD, c_BD: recurrent state (c for an LSTM). charge_B: this image's charge. action_B: the last one."""

    h_BD: Tensor
    c_BD: Tensor
    charge_B: Tensor
    action_B: Tensor


class QRouter(Router):
    """encoder_u, shared cell, decoder_u. Never explores in eval(). epsilon is set by the training schedule."""

    epsilon: float = 0.1

    def __init__(self, specs: Sequence[UnitSpec], options: RnpOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        if any(s.form == "free" for s in specs):
            raise InputError("the Q-agent needs nested or alternative parts: set backbone.unit=channels (or auto)")
        self.options = options
        assert options.charge is not None
        self.low, self.high = options.charge[0], options.charge[-1]
        self.conditioned = self.high > self.low
        self.actions = max(s.parts for s in specs)
        size = options.hidden
        # standardised per channel, so that an encoder need not learn the scale of its feature map
        self.norms = nn.ModuleList(nn.BatchNorm1d(s.in_channels, affine=False) for s in specs)
        extra = 1 if self.conditioned else 0
        self.encoders = nn.ModuleList(nn.Linear(s.in_channels + extra, size) for s in specs)
        self.cell = CELLS[options.cell](size, size)
        self.decoders = nn.ModuleList(nn.Linear(size, s.parts) for s in specs)
        for u, spec in enumerate(specs):
            self.register_buffer(f"keep_{u}", action_keeps(spec), persistent=False)
            self.register_buffer(f"cost_{u}", action_costs(spec, options.action_cost), persistent=False)
            self.register_buffer(f"share_{u}", action_costs(spec, "share"), persistent=False)

    def begin(self, x_BCHW: Tensor) -> Memory:
        """Zero state, and each image's charge: drawn from the range in training, its cheapest-net end by the dial in eval."""
        zero_BD = x_BCHW.new_zeros(len(x_BCHW), self.options.hidden, dtype=torch.float32)
        if self.training and self.conditioned:
            charge_B = self.low + (self.high - self.low) * torch.rand(len(x_BCHW), device=x_BCHW.device)
        else:
            charge_B = zero_BD.new_full((len(x_BCHW),), self._asked()[0])
        return Memory(zero_BD, zero_BD, charge_B, torch.zeros_like(charge_B, dtype=torch.long))

    def decide(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Decision, Memory]:
        """Best action, or a random one with probability epsilon in training. Notes: q_BA, action_B, reward_B (cost part)."""
        pooled_BC = self.norms[u](x_BCHW.detach().float().mean((2, 3)))  # the TD loss must not teach the CNN
        if self.conditioned:
            asked_B1 = ((state.charge_B - self.low) / (self.high - self.low))[:, None] * 2 - 1
            pooled_BC = torch.cat([pooled_BC, asked_B1], 1)
        h_BD, c_BD = self._step(F.relu(self.encoders[u](pooled_BC)), state)
        q_BA = self.decoders[u](h_BD).float()
        score_BA = q_BA if self.training else q_BA - self._asked()[1] * self.get_buffer(f"share_{u}")
        action_B = score_BA.argmax(1)
        if self.training:
            explore_B = torch.rand(len(q_BA), device=q_BA.device) < self.epsilon
            action_B = torch.where(explore_B, torch.randint_like(action_B, q_BA.shape[1]), action_B)
        reward_B = -state.charge_B * self.get_buffer(f"cost_{u}")[action_B]
        q_BA = F.pad(q_BA, (0, self.actions - q_BA.shape[1]), value=-torch.inf)  # never the best of the next unit
        notes = {"q": q_BA, "action": action_B, "reward": reward_B}
        return Decision(self.get_buffer(f"keep_{u}")[action_B], notes), Memory(h_BD, c_BD, state.charge_B, action_B)

    def macs(self) -> float:
        """Encoders, cell (once per unit) and decoders."""
        d, gates = self.options.hidden, GATES_OF[self.options.cell]
        extra = 1 if self.conditioned else 0
        linear = sum((s.in_channels + extra) * d + d * s.parts for s in self.specs)
        return float(linear + len(self.specs) * gates * 2 * d * d)

    def _asked(self) -> tuple[float, float]:
        """(charge given to the agent, charge on top per share): the dial moves the first within its range, then the second.

        At price 0 a conditioned agent stands in the middle of its range.
        """
        if not self.conditioned:
            return self.low, self.price
        wanted = (self.low + self.high) / 2 + self.price
        inside = min(max(wanted, self.low), self.high)
        return inside, wanted - inside

    def _step(self, code_BD: Tensor, state: Memory) -> tuple[Tensor, Tensor]:
        if self.options.cell == "lstm":
            h_BD, c_BD = self.cell(code_BD, (state.h_BD.to(code_BD.dtype), state.c_BD.to(code_BD.dtype)))
            return h_BD, c_BD
        h_BD = self.cell(code_BD, state.h_BD.to(code_BD.dtype))
        return h_BD, state.c_BD


def action_keeps(spec: UnitSpec) -> Tensor:
    """(A, G): which parts each action runs: the first a+1 of nested parts, or exactly one alternative."""
    eye = torch.eye(spec.parts)
    return eye if spec.form == "choice" else eye.flip(1).cumsum(1).flip(1)


def action_costs(spec: UnitSpec, kind: str) -> Tensor:
    """(A,): the paper's i-1 for i = 1..A ("index"), or the action's share of the unit's multiply-adds ("share")."""
    if kind == "index":
        return torch.arange(spec.parts, dtype=torch.float32)
    return action_keeps(spec) @ torch.tensor(spec.part_shares)


def td_targets(q_BUA: Tensor, reward_BU: Tensor, gamma: float, trace: float) -> Tensor:
    """Targets (B, U), detached: r_u + gamma [(1 - lambda) max_a Q_{u+1} + lambda target_{u+1}]; r_U alone at the end.

    lambda = 0 is the paper's one-step Q-learning. Larger ones carry the terminal reward faster through the units, at the
    price of the exploring policy's returns (Peng and Williams, 1996, without cutting the trace).
    """
    best_BU = q_BUA.detach().max(2).values
    targets = [reward_BU[:, -1]]
    for u in range(reward_BU.shape[1] - 2, -1, -1):
        ahead_B = (1 - trace) * best_BU[:, u + 1] + trace * targets[-1]
        targets.append(reward_BU[:, u] + gamma * ahead_B)
    return torch.stack(targets[::-1], 1).detach()


def td_loss(out: Output, batch: Batch, options: RnpOptions) -> Tensor:
    """Mean squared TD error over images and units. The terminal reward is each image's own loss."""
    notes = out.trace.notes
    reward_BU = notes["reward"].clone()
    own_B = F.cross_entropy(out.logits_BK.detach().float(), batch.labels, reduction="none")
    reward_BU[:, -1] -= options.alpha * own_B
    taken_BU = notes["q"].gather(2, notes["action"][:, :, None])[:, :, 0]
    targets_BU = td_targets(notes["q"], reward_BU, options.gamma, options.trace)
    return F.mse_loss(taken_BU, targets_BU)


def random_widths(specs: Sequence[UnitSpec]) -> Callable[[int], Tensor]:
    """Routes for the widths phase: half of the images at one level with jitter, a quarter uniform, a quarter independent.

    Ours; the authors draw every layer independently, under which no image ever runs all-narrow or all-wide.
    """
    parts = torch.tensor([s.parts for s in specs])
    keeps = [action_keeps(s) for s in specs]

    def draw(images: int) -> Tensor:
        level_B1 = torch.rand(images, 1)
        jitter_BU = (level_B1 + 0.25 * torch.randn(images, len(specs))).clamp(0, 0.999)
        kind_B1 = torch.rand(images, 1)
        free_BU = torch.rand(images, len(specs))
        mixed_BU = torch.where(kind_B1 < 0.5, jitter_BU, torch.where(kind_B1 < 0.75, level_B1, free_BU))
        action_BU = (mixed_BU * parts).long()
        return stacked([keep[action_BU[:, u]] for u, keep in enumerate(keeps)])

    return draw


def phases(net: Net, options: RnpOptions) -> Iterator[Phase]:
    """pretrain -> widths -> (agent -> cnn) x rounds -> joint, as Algorithm 1 of RNP and the stages of its code."""
    router = net.router
    assert isinstance(router, QRouter)

    def explore(epsilon: float) -> None:
        router.epsilon = epsilon

    def agent_loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        return {"loss_td": td_loss(out, batch, options)}

    def both(out: Output, batch: Batch) -> dict[str, Tensor]:
        return cross_entropy(out, batch) | agent_loss(out, batch)

    yield Phase("pretrain", options.pretrain_epochs, ("backbone",), cross_entropy, routes=net.dense_routes)
    yield Phase("widths", options.widths_epochs, ("backbone",), cross_entropy, routes=random_widths(router.specs))
    for turn in range(options.rounds):
        start = options.epsilon_start if turn == 0 else options.epsilon_end
        yield Phase(
            f"agent{turn + 1}",
            options.agent_epochs,
            ("router",),
            agent_loss,
            router_lr=options.lr,
            schedule=lambda done, start=start: explore(start + (options.epsilon_end - start) * done),  # type: ignore[misc]
        )
        yield Phase(f"cnn{turn + 1}", options.cnn_epochs, ("backbone",), cross_entropy, lr_scale=options.cnn_lr)
    yield Phase(
        "joint",
        options.joint_epochs,
        ("backbone", "router"),
        both,
        router_lr=options.lr / 2,
        lr_scale=options.cnn_lr,
        schedule=lambda done: explore(options.epsilon_end),
    )
