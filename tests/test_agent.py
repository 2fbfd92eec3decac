"""The Q-agent against what can be known: all 64 routes of three units by enumeration, and an oracle that sees what it sees."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.contracts import Batch, Output, Trace, UnitSpec
from dynroute.routers.qlearn import QRouter, RnpOptions, rewards, td_loss

UNITS, ACTIONS = 3, 4
SPECS = [UnitSpec(f"u{u}", 6, ACTIONS, "nested", False, (0.25,) * 4) for u in range(UNITS)]
ROUTES = torch.tensor(list(itertools.product(range(ACTIONS), repeat=UNITS)))  # (64, U)


@dataclass
class World:
    """Images that differ in difficulty and in the unit that matters; noisy features of a frozen net.

    A unit's features tell the difficulty, better and better, and from the unit that matters on also which one it is.
    """

    hard_N: Tensor
    needs_N: Tensor
    seen_NUC: Tensor

    @classmethod
    def of(cls, images: int, seed: int) -> World:
        draw = torch.Generator().manual_seed(seed)
        hard_N = torch.rand(images, generator=draw)
        needs_N = torch.randint(UNITS, (images,), generator=draw)
        seen_NUC = torch.zeros(images, UNITS, 6)
        for u in range(UNITS):
            noise = torch.randn(images, 4, generator=draw)
            seen_NUC[:, u, 0] = hard_N + 0.3 / (u + 1) * noise[:, 0]
            told = (needs_N[:, None] == torch.arange(UNITS)) & (torch.arange(UNITS) <= u)
            seen_NUC[:, u, 1:4] = told.float() + 0.2 * noise[:, 1:]
        return cls(hard_N, needs_N, seen_NUC)

    def features(self, rows_B: Tensor, u: int, before_B: Tensor) -> Tensor:
        """(B, C, 2, 2) maps that enter unit u after the action `before` of the last one."""
        x_BC = self.seen_NUC[rows_B, u].clone()
        x_BC[:, 4] = before_B / (ACTIONS - 1) if u else 0.0
        return x_BC[:, :, None, None].expand(-1, -1, 2, 2)

    def loss(self, rows_B: Tensor, action_BU: Tensor) -> Tensor:
        """L_cls of images under routes."""
        lack_BU = (1 - action_BU / (ACTIONS - 1)).square()
        own_B = lack_BU.gather(1, self.needs_N[rows_B][:, None])[:, 0]
        return self.hard_N[rows_B] * (3.0 * own_B + 0.3 * lack_BU.sum(1))

    def returns(self, charge: float) -> Tensor:
        """(N, 64): -L_cls - charge * sum of (i - 1) for every image and route."""
        rows = torch.arange(len(self.hard_N))
        each = [-self.loss(rows, route.expand(len(rows), -1)) - charge * route.sum() for route in ROUTES]
        return torch.stack(each, 1)


def decide(router: QRouter, world: World, rows_B: Tensor) -> tuple[Tensor, Output, Batch]:
    """Actions (B, U) of the agent on a frozen world, and what its loss needs."""
    state, notes, keeps = router.begin(torch.zeros(len(rows_B), 3, 1, 1)), [], []
    before_B = torch.zeros(len(rows_B))
    for u in range(UNITS):
        decision, state = router.decide(u, world.features(rows_B, u, before_B), state)
        before_B = decision.notes["action"].float()
        notes.append(decision.notes)
        keeps.append(decision.keep_BG)
    together = {name: torch.stack([note[name] for note in notes], 1) for name in notes[0]}
    labels = torch.zeros(len(rows_B), dtype=torch.long)
    out = Output(torch.zeros(len(rows_B), 2), Trace(torch.stack(keeps, 1), together), torch.zeros(len(rows_B)))
    return together["action"], out, Batch(torch.empty(len(rows_B), 0), labels, None, rows_B)


def trained(world: World, options: RnpOptions, seed: int, steps: int = 1500) -> QRouter:
    """An agent after so many minibatches, exploring less and less."""
    torch.manual_seed(seed)
    router = QRouter(SPECS, options).train()
    adam = torch.optim.Adam(router.agent.parameters(), lr=4e-3)
    for step in range(steps):
        router.epsilon = max(1 - 1.4 * step / steps, 0.05)
        adam.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        rows = torch.randint(len(world.hard_N), (256,))
        action_BU, out, batch = decide(router, world, rows)
        reward_BU = rewards(out, batch, 1.0, world.loss(rows, action_BU), baseline=False)
        adam.zero_grad()
        td_loss(out, reward_BU, options).backward()
        adam.step()
    return router.eval()


def fitted(x: Tensor, y: Tensor, steps: int = 250) -> nn.Module:
    """A small supervised net."""
    net = nn.Sequential(nn.Linear(x.shape[1], 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, y.shape[1]))
    adam = torch.optim.Adam(net.parameters(), lr=8e-3)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 8e-3 * (1 - step / steps)
        rows = torch.randint(len(x), (1024,))
        adam.zero_grad()
        F.mse_loss(net(x[rows]), y[rows]).backward()
        adam.step()
    return net


class Oracle:
    """Backward induction by regression on the enumerated returns: sees the same features, with all actions tried."""

    def __init__(self, world: World, charge: float) -> None:
        returns_N64 = world.returns(charge)
        rows = torch.arange(len(world.hard_N))
        self.nets: dict[int, nn.Module] = {}
        value_N64 = returns_N64  # the return of a route whose later actions are already the best known
        for u in reversed(range(UNITS)):
            prefixes = list(itertools.product(range(ACTIONS), repeat=u))
            inputs, wanted = [], []
            for prefix in prefixes:
                index = [self.index((*prefix, a, *([0] * (UNITS - u - 1)))) for a in range(ACTIONS)]
                inputs.append(self.inputs(world, rows, prefix))
                wanted.append(value_N64[:, index])
            self.nets[u] = fitted(torch.cat(inputs), torch.cat(wanted))
            with torch.no_grad():
                best = [self.nets[u](x).argmax(1) for x in inputs]
            value_N64 = value_N64.clone()
            for prefix, action, values in zip(prefixes, best, wanted, strict=True):
                ends = self.index((*prefix, *([0] * (UNITS - u))))
                value_N64[:, ends] = values.gather(1, action[:, None])[:, 0]

    @staticmethod
    def index(route: tuple[int, ...]) -> int:
        return int(sum(a * ACTIONS ** (UNITS - 1 - u) for u, a in enumerate(route)))

    @staticmethod
    def inputs(world: World, rows: Tensor, prefix: tuple[int, ...]) -> Tensor:
        """All features up to the unit, and the actions before it."""
        seen = world.seen_NUC[rows, : len(prefix) + 1].flatten(1)
        return torch.cat([seen, torch.tensor(prefix, dtype=torch.float32).expand(len(rows), -1)], 1)

    @torch.no_grad()
    def actions(self, world: World) -> Tensor:
        """(N, U) decisions on another world."""
        chosen = torch.zeros(len(world.hard_N), UNITS, dtype=torch.long)
        for u in range(UNITS):
            for prefix in itertools.product(range(ACTIONS), repeat=u):
                rows = (chosen[:, :u] == torch.tensor(prefix)).all(1).nonzero()[:, 0]
                if len(rows):
                    chosen[rows, u] = self.nets[u](self.inputs(world, rows, prefix)).argmax(1)
        return chosen


def earned(returns_N64: Tensor, action_NU: Tensor) -> float:
    """Mean return of the routes taken."""
    index = (action_NU * torch.tensor([ACTIONS ** (UNITS - 1 - u) for u in range(UNITS)])).sum(1)
    return float(returns_N64.gather(1, index[:, None]).mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_agent_earns_what_its_state_can_tell(seed: int) -> None:
    charge = 0.15
    world, unseen = World.of(3000, seed), World.of(3000, seed + 100)
    torch.manual_seed(seed)
    oracle = Oracle(world, charge)
    agent = trained(world, RnpOptions(hidden=32, charge=[charge], trace=0.7), seed)
    returns = unseen.returns(charge)
    constant = float(returns.mean(0).max())
    best = earned(returns, oracle.actions(unseen))
    with torch.no_grad():
        got = earned(returns, decide(agent, unseen, torch.arange(3000))[0])
    assert best > constant + 0.1, "the world must have something to tell"
    assert (got - constant) / (best - constant) >= 0.95


def test_a_huge_charge_buys_nothing_and_no_charge_everything() -> None:
    world = World.of(1000, 5)
    rows = torch.arange(1000)
    dear = decide(trained(world, RnpOptions(hidden=16, charge=[100.0]), 0, 300), world, rows)[0]
    free = decide(trained(world, RnpOptions(hidden=16, charge=[0.0], trace=0.7), 0, 600), world, rows)[0]
    assert int(dear.max()) == 0
    full = world.loss(rows, torch.full((1000, UNITS), ACTIONS - 1))
    assert float((world.loss(rows, free) - full).mean()) < 0.05  # of losses up to 3.9
