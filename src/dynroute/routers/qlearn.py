"""RNP (Lin et al., NIPS 2017) and RNR (Rao et al., TPAMI 2019): a Q-learning agent decides how much of each unit runs.

    state    s_u: GAP of the unit's input -> encoder_u -> one recurrent cell shared by all units
    action   a_u in 0..A-1: run the first a_u + 1 groups (nested units), or the a_u-th alternative (choice units)
    Q-value  decoder_u(s_u), one per action; the policy takes the best, in training with probability epsilon a random one
    reward   r_u = -charge * cost(a_u), and -alpha L_cls of that very image added to the last one
    loss     (target_u - Q(s_u, a_u))^2, target detached

Training alternates as in RNP's Algorithm 1: the CNN learns all widths, then agent and CNN take turns. `rnp` keeps to what
the paper and its authors' code state. `rnr` differs by its options, all ours: the cost is the action's share of the unit's
multiply-adds; for every image a budget is drawn and the charge that buys it is given to the agent, so that one agent
serves every budget; the reward is measured against the teacher's own loss on that image, which changes no decision and
takes away most of the noise; returns reach back faster (lambda); and agent and CNN end by learning together.
B images, U units, A actions, D hidden size, K knots of the table of charges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Batch, Decision, InputError, Output, UnitSpec
from dynroute.routers import charges
from dynroute.routers.base import Net, Phase, Router, added_up, classification_loss, cross_entropy, ranged, stacked
from dynroute.routers.budget import Range, check_budget
from dynroute.routers.deployed import DeployedAgent
from dynroute.routers.td import rewards, td_loss

CELLS: dict[str, Callable[[int, int], nn.RNNCellBase]] = {
    "rnn": nn.RNNCell,
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}
GATES_OF = {"rnn": 1, "gru": 3, "lstm": 4}
ALPHA_FROM = 20  # minibatches over which an automatic alpha is measured: 2,560 losses, 2 % (ours)


@dataclass
class RnpOptions:
    """The `router` section for router.name=rnp. "Ours" marks what the paper does not state."""

    pretrain_epochs: int = 4
    """Epochs of the dense net before anything else; set 0 where backbone.weights brings a trained one."""
    widths_epochs: int = 4
    """Epochs of the CNN under random actions, so that every width works (stage 2 of the authors' code)."""
    width_draws: str = "independent"
    """Random actions of the widths phase: independent for every image and layer (authors' code), or mixed: half of the
    images near one level, a quarter at one level, a quarter independent (ours: reaches all-narrow and all-wide nets)."""
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
    """Charge per unit of cost: [-p], or [low, high]: drawn from, image by image, and given to the agent.
    Empty: [0.1], the paper's p = -0.1, unless there is a budget."""
    budget: list[float] | None = None
    """[low, high]: shares of the dense net's multiply-adds drawn from, image by image, instead of a charge; the charge that
    buys each share is found by feedback and given to the agent. Empty: off. Ours."""
    budgets_per_image: int = 1
    """Budgets drawn for each image of a minibatch, spread over the range: the image runs once for each, in one step, and the
    losses add up, as those of the widths of a slimmable net. Takes so many times the time and the memory. Ours."""
    alpha: float = 0.0
    """Scale of the classification loss in the reward; 0: so that its mean is 1 (the paper), measured on the train split."""
    baseline: bool = False
    """Reward the loss beyond the teacher's own on that image; without a teacher the loss itself. Ours."""
    gamma: float = 1.0
    """Discount of Q-learning (authors' code: 1)."""
    trace: float = 0.0
    """Lambda of Q(lambda) returns; 0 is the paper's one-step target."""
    slow_target: float = 0.0
    """Decay per minibatch of a slowly moving copy of the agent that gives the targets (0.99, say); 0: none. Ours."""
    double_q: bool = False
    """Let the agent pick the next action and the slow copy value it (van Hasselt et al., 2016); needs slow_target. Ours."""
    td: str = "mse"
    """Loss of the TD error: mse (paper) or huber."""
    hidden: int = 128
    """Size of the encoders and of the recurrent state. Ours."""
    cell: str = "gru"
    """Recurrent cell: rnn, gru (authors' code) or lstm."""
    lr: float = 1e-3
    """Learning rate of the agent (Adam). Ours; the authors' 1e-4 goes with hundreds of epochs."""
    joint_lr: float = 5e-4
    """Learning rate of the agent where it learns together with the CNN (authors' code: 1e-4)."""
    agent_decay: float = 0.0
    """Weight decay of the agent (authors' code: 5e-5)."""
    epsilon_start: float = 1.0
    """Exploration at the start of the agent's training."""
    epsilon_end: float = 0.1
    """Exploration at its end (authors' code: 0.1)."""
    cnn_lr: float = 0.5
    """Learning rate of the CNN in rounds and joint training, times optim.lr. Ours."""

    def __post_init__(self) -> None:
        """Fill in the charge and raise InputError on the first value out of range."""
        if self.charge is not None and self.budget is not None:
            raise InputError("router.charge and router.budget exclude each other: a budget finds its own charge")
        if self.charge is None and self.budget is None:
            self.charge = [0.1]
        for name in (
            "pretrain_epochs",
            "widths_epochs",
            "rounds",
            "agent_epochs",
            "cnn_epochs",
            "joint_epochs",
        ):
            ranged(f"router.{name}", getattr(self, name), 0, 100_000)
        for name in ("gamma", "trace", "epsilon_start", "epsilon_end", "slow_target", "agent_decay"):
            ranged(f"router.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("alpha", "lr", "joint_lr", "cnn_lr"):
            ranged(f"router.{name}", getattr(self, name), 0.0, 1e6)
        ranged("router.hidden", self.hidden, 1, 65_536)
        if self.cell not in CELLS:
            raise InputError(f"router.cell must be one of {', '.join(CELLS)}, not {self.cell!r}")
        if self.action_cost not in ("index", "share"):
            raise InputError(f"router.action_cost must be index or share, not {self.action_cost!r}")
        if self.width_draws not in ("independent", "mixed"):
            raise InputError(f"router.width_draws must be independent or mixed, not {self.width_draws!r}")
        if self.td not in ("mse", "huber"):
            raise InputError(f"router.td must be mse or huber, not {self.td!r}")
        if self.double_q and not self.slow_target:
            raise InputError("router.double_q needs router.slow_target, the decay of the copy that values the action")
        c = self.charge
        if c is not None and (not 1 <= len(c) <= 2 or not all(0 <= x < 1e6 for x in c) or sorted(c) != c):
            raise InputError(f"router.charge must be [p] or [low, high], low <= high, none negative, not {c}")
        check_budget(self.budget, self.budgets_per_image)


@dataclass
class RnrOptions(RnpOptions):
    """The `router` section for router.name=rnr: RNP's options with other defaults. All schedules and sizes are ours."""

    width_draws: str = "mixed"
    """Random actions of the widths phase: independent for every image and layer, or mixed with near-uniform widths."""
    rounds: int = 1
    """Rounds M of Algorithm 1: agent, then CNN."""
    cnn_epochs: int = 0
    """Epochs N2 of the CNN in each round under the agent's routes, agent frozen."""
    joint_epochs: int = 6
    """Epochs in which each minibatch trains both."""
    action_cost: str = "share"
    """Cost of action i: index, RNP's (i-1), or share, its part of the unit's multiply-adds."""
    baseline: bool = True
    """Reward the loss beyond the teacher's own on that image; without a teacher the loss itself."""
    trace: float = 0.7
    """Lambda of Q(lambda) returns; 0 is a one-step target."""
    hidden: int = 64
    """Size of the encoders and of the recurrent state."""
    lr: float = 2e-3
    """Learning rate of the agent (Adam)."""
    joint_lr: float = 1e-3
    """Learning rate of the agent where it learns together with the CNN."""

    def __post_init__(self) -> None:
        """Fill in the budget, unless a charge is given, and check as RNP does."""
        if self.charge is None and self.budget is None:
            self.budget = [0.3, 0.9]
        super().__post_init__()


class Memory(NamedTuple):
    """The agent's state. hidden: (h_BD, c_BD) of the agent, and of its slow copy where it has one; charge_B: this image's
    charge; asked_B: the budget or charge asked of it; ran_B: the share that the unit before has run."""

    hidden: tuple[tuple[Tensor, Tensor], ...]
    charge_B: Tensor
    asked_B: Tensor
    ran_B: Tensor


class Agent(nn.Module):
    """encoder_u -> one recurrent cell -> decoder_u. told: further inputs of every encoder."""

    def __init__(self, specs: Sequence[UnitSpec], size: int, cell: str, told: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(s.in_channels + told, size) for s in specs)
        self.cell = CELLS[cell](size, size)
        self.decoders = nn.ModuleList(nn.Linear(size, s.parts) for s in specs)
        self.lstm = cell == "lstm"

    def forward(self, u: int, x_BC: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Q-values (B, A) of unit u and the next hidden state."""
        h_BD, c_BD = hidden
        with torch.autocast(x_BC.device.type, enabled=False):  # Q-values differ by less than bf16 can tell
            code_BD = F.relu(self.encoders[u](x_BC))
            if self.lstm:
                h_BD, c_BD = self.cell(code_BD, (h_BD, c_BD))
            else:
                h_BD = self.cell(code_BD, h_BD)
            return self.decoders[u](h_BD), (h_BD, c_BD)


class QRouter(Router):
    """The agent under the router's contract. Never explores in eval(). epsilon is set by the training schedule.

    What only training needs is not counted as a parameter of the net: `slow`, the copy that gives the targets.
    """

    train_only = ("slow",)
    pooled = True
    epsilon: float = 0.1
    charge_K: Tensor
    loss_mean: Tensor
    loss_count: Tensor

    def __init__(self, specs: Sequence[UnitSpec], options: RnpOptions, superclasses: int = 0) -> None:
        super().__init__(specs)
        if any(s.form == "free" for s in specs):
            raise InputError("the Q-agent needs nested or alternative parts: set backbone.unit=channels (or auto)")
        self.options = options
        self.range = _range(options)
        self.conditioned = self.range.high > self.range.low
        self.told = 2 if self.conditioned else 0
        self.actions = max(s.parts for s in specs)
        # standardised per channel, so that an encoder need not learn the scale of its feature map
        self.norms = nn.ModuleList(nn.BatchNorm1d(s.in_channels, affine=False) for s in specs)
        self.agent = Agent(specs, options.hidden, options.cell, self.told)
        self.slow = copy.deepcopy(self.agent).requires_grad_(False) if options.slow_target else None
        self.register_buffer("charge_K", charges.first_table())  # of each budget, on the scale of `charges`
        self.register_buffer("loss_mean", torch.zeros(()))
        self.register_buffer("loss_count", torch.zeros(()))
        for u, spec in enumerate(specs):
            self.register_buffer(f"keep_{u}", action_keeps(spec), persistent=False)
            self.register_buffer(f"cost_{u}", action_costs(spec, options.action_cost), persistent=False)
            self.register_buffer(f"share_{u}", action_costs(spec, "share"), persistent=False)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Checkpoints of before charges had a sign: without a budget their table was not used. Raises InputError with one."""
        older = state.pop(f"{prefix}log_charge_K", None)
        if older is not None:
            if self.options.budget:
                raise InputError("an agent of before charges could fall below zero, trained for budgets: train it anew")
            state[f"{prefix}charge_K"] = self.charge_K
        super()._load_from_state_dict(state, prefix, *rest)

    def begin(self, x_BCHW: Tensor) -> Memory:
        """Zero state, and each image's budget or charge: drawn from the range in training, set by the dial in eval."""
        images, device = len(x_BCHW), x_BCHW.device
        zero_BD = x_BCHW.new_zeros(images, self.options.hidden, dtype=torch.float32)
        if self.training and self.conditioned:
            asked_B = self.range.draw(images, device, self.options.budgets_per_image)
        else:
            asked_B = torch.full((images,), self.asked()[0], device=device)
        hidden = ((zero_BD, zero_BD),) * (1 if self.slow is None else 2)
        return Memory(hidden, self._charge(asked_B), asked_B, torch.zeros_like(asked_B))

    def decide(self, u: int, x_BCHW: Tensor, state: Memory) -> tuple[Decision, Memory]:
        """Best action, or a random one with probability epsilon in training.

        Notes: q_BA, slow_BA (with a slow copy), action_B, greedy_B (the best action), reward_B (its part for the cost),
        asked_B (the budget or charge), size_B (of the returns, where charges vary: one and the charge).
        """
        pooled_BC = self.norms[u](x_BCHW.detach().float().mean((2, 3)))  # the TD loss must not teach the CNN
        if self.conditioned:
            pooled_BC = torch.cat([pooled_BC, self.told_of(state)], 1)
        q_BA, hidden = self.agent(u, pooled_BC, state.hidden[0])
        if self.conditioned:  # what an action costs here and now is known and need not be learned for every charge
            q_BA = q_BA - state.charge_B[:, None] * self.get_buffer(f"cost_{u}")
        price = 0.0 if self.training else self.asked()[1]
        score_BA = q_BA - price * self.get_buffer(f"share_{u}") if price else q_BA
        greedy_B = action_B = score_BA.argmax(1)
        keep_AG, share_A = self.get_buffer(f"keep_{u}"), self.get_buffer(f"share_{u}")
        if self.training:
            explore_B = torch.rand(len(q_BA), device=q_BA.device) < self.epsilon
            action_B = torch.where(explore_B, torch.randint_like(action_B, q_BA.shape[1]), action_B)
        notes = {
            "q": self._padded(q_BA),
            "action": action_B,
            "greedy": greedy_B,
            "reward": -state.charge_B * self.get_buffer(f"cost_{u}")[action_B],
            "asked": state.asked_B,
        }
        if self.conditioned:
            notes["size"] = 1 + state.charge_B.abs()
        after: tuple[tuple[Tensor, Tensor], ...] = (hidden,)
        if self.slow is not None:
            with torch.no_grad():
                slow_BA, slow_hidden = self.slow(u, pooled_BC, state.hidden[1])
                if self.conditioned:
                    slow_BA = slow_BA - state.charge_B[:, None] * self.get_buffer(f"cost_{u}")
            notes["slow"], after = self._padded(slow_BA), (hidden, slow_hidden)
        return Decision(keep_AG[action_B], notes), state._replace(hidden=after, ran_B=share_A[action_B])

    def deployed(self) -> DeployedAgent:
        """The same decisions from fewer operations, weights as they are now."""
        return DeployedAgent(self)

    def macs(self) -> float:
        """Encoders, cell (once per unit) and decoders, as deployed: what is told goes into biases made beforehand."""
        d, gates = self.options.hidden, GATES_OF[self.options.cell]
        linear = sum(s.in_channels * d + d * s.parts for s in self.specs)
        return float(linear + len(self.specs) * gates * 2 * d * d)

    def keeps(self, action_BU: Tensor) -> Tensor:
        """keep_BUG of actions."""
        return stacked([self.get_buffer(f"keep_{u}")[action_BU[:, u]] for u in range(len(self.specs))])

    @torch.no_grad()
    def alpha(self, loss_B: Tensor) -> Tensor:
        """The scale of the loss in the reward: given, or 1 / mean loss over the first ALPHA_FROM minibatches seen."""
        if self.options.alpha:
            return loss_B.new_tensor(self.options.alpha)
        if self.training and self.loss_count < ALPHA_FROM:
            self.loss_count += 1
            self.loss_mean += (loss_B.mean() - self.loss_mean) / self.loss_count
        return 1 / self.loss_mean.clamp(min=1e-6)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow copy a step towards the agent."""
        if self.slow is not None:
            for slow, fast in zip(self.slow.parameters(), self.agent.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.options.slow_target)

    @torch.no_grad()
    def correct_charges(self, asked_B: Tensor, share_B: Tensor, span: tuple[float, float]) -> None:
        """Raise the charge of budgets that were overspent, lower that of the others; less while the agent explores.

        share_B: of the best actions. span: shares of the cheapest and the dearest route.
        """
        charges.correct(self.charge_K, self.range.overspent(asked_B, share_B, span), 1 - self.epsilon)

    def asked(self) -> tuple[float, float]:
        """(budget or charge given to the agent, charge on top per share), as the dial stands."""
        if not self.conditioned:
            return self.range.low, self.price
        return self.range.dial(self.price, falls=self.options.budget is not None)

    def _charge(self, asked_B: Tensor) -> Tensor:
        """The charge of each image: as drawn, or what its budget costs by the table (linear on its scale)."""
        return charges.unscaled(self.range.read(self.charge_K, asked_B)) if self.options.budget else asked_B

    def told_of(self, state: Memory) -> Tensor:
        """(B, 2): the charge (as `charges.told` where a budget finds it), and the share that the unit before has run."""
        charge_B = state.charge_B
        told_B = charges.told(charge_B) if self.options.budget else self.range.place(charge_B) * 2 - 1
        return torch.stack([told_B, state.ran_B], 1)

    def _padded(self, q_BA: Tensor) -> Tensor:
        """Q-values of a unit with fewer actions; what it lacks is never the best."""
        return F.pad(q_BA, (0, self.actions - q_BA.shape[1]), value=-torch.inf)


def _range(options: RnpOptions) -> Range:
    """The range of what is asked: of budgets, or of charges (equal ends where there is one charge)."""
    asked = options.budget or options.charge
    assert asked is not None
    return Range(asked[0], asked[-1])


def action_keeps(spec: UnitSpec) -> Tensor:
    """(A, G): which parts each action runs: the first a+1 of nested parts, or exactly one alternative."""
    eye = torch.eye(spec.parts)
    return eye if spec.form == "choice" else eye.flip(1).cumsum(1).flip(1)


def action_costs(spec: UnitSpec, kind: str) -> Tensor:
    """(A,): the paper's i-1 for i = 1..A ("index"), or the action's share of the unit's multiply-adds ("share")."""
    if kind == "index":
        return torch.arange(spec.parts, dtype=torch.float32)
    return action_keeps(spec) @ torch.tensor(spec.part_shares)


def random_widths(specs: Sequence[UnitSpec], draws: str = "mixed") -> Callable[[int], Tensor]:
    """Routes for the widths phase.

    independent: every image and unit for itself (the authors), under which hardly an image runs all-narrow or all-wide.
    mixed: half of the images at one level with jitter, a quarter at one level, a quarter independent (ours).
    """
    parts = torch.tensor([s.parts for s in specs])
    keeps = [action_keeps(s) for s in specs]

    def draw(images: int) -> Tensor:
        if draws == "independent":
            return routes(torch.rand(images, len(specs)))
        level_B1 = torch.rand(images, 1)
        jitter_BU = (level_B1 + 0.25 * torch.randn(images, len(specs))).clamp(0, 0.999)
        kind_B1 = torch.rand(images, 1)
        free_BU = torch.rand(images, len(specs))
        mixed_BU = torch.where(kind_B1 < 0.5, jitter_BU, torch.where(kind_B1 < 0.75, level_B1, free_BU))
        return routes(mixed_BU)

    def routes(level_BU: Tensor) -> Tensor:
        action_BU = (level_BU * parts).long()
        return stacked([keep[action_BU[:, u]] for u, keep in enumerate(keeps)])

    return draw


def phases(net: Net, options: RnpOptions) -> Iterator[Phase]:
    """pretrain -> widths -> (agent -> cnn) x rounds -> joint, as Algorithm 1 of RNP and the stages of its code."""
    router = net.router
    assert isinstance(router, QRouter)
    if router.conditioned and options.cnn_epochs and options.rounds:
        raise InputError(
            "a range of budgets or charges trains agent and CNN together, each image under its own: set router.cnn_epochs=0 "
            "and router.joint_epochs"
        )

    def explore(epsilon: float) -> None:
        router.epsilon = epsilon

    def agent_loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        loss_B = classification_loss(out.logits_BK.detach().float(), batch)
        alpha = router.alpha(loss_B)
        terms = {
            "loss_td": td_loss(out, rewards(out, batch, alpha, loss_B, options.baseline), options),
            "note_alpha": alpha,
        }
        if options.budget:
            share_B = net.cost(router.keeps(out.trace.notes["greedy"])) / net.cost.dense
            router.correct_charges(out.trace.notes["asked"][:, 0], share_B.float(), span)
            terms |= {
                "note_charge_low": charges.unscaled(router.charge_K[0]),
                "note_charge_high": charges.unscaled(router.charge_K[-1]),
            }
        router.follow()
        return added_up(terms, options.budgets_per_image)

    def both(out: Output, batch: Batch) -> dict[str, Tensor]:
        return added_up(cross_entropy(out, batch), options.budgets_per_image) | agent_loss(out, batch)

    widths, span = random_widths(router.specs, options.width_draws), net.span()
    yield Phase("pretrain", options.pretrain_epochs, ("backbone",), cross_entropy, routes=net.dense_routes)
    yield Phase("widths", options.widths_epochs, ("backbone",), cross_entropy, routes=widths)
    for turn in range(options.rounds):
        start = options.epsilon_start if turn == 0 else options.epsilon_end
        yield Phase(
            f"agent{turn + 1}",
            options.agent_epochs,
            ("router",),
            agent_loss,
            router_lr=options.lr,
            router_decay=options.agent_decay,
            passes=options.budgets_per_image,
            schedule=lambda done, start=start: explore(start + (options.epsilon_end - start) * done),  # type: ignore[misc]
        )
        yield Phase(f"cnn{turn + 1}", options.cnn_epochs, ("backbone",), cross_entropy, lr_scale=options.cnn_lr)
    yield Phase(
        "joint",
        options.joint_epochs,
        ("backbone", "router"),
        both,
        router_lr=options.joint_lr,
        router_decay=options.agent_decay,
        lr_scale=options.cnn_lr,
        passes=options.budgets_per_image,
        schedule=lambda done: explore(options.epsilon_end),
    )
