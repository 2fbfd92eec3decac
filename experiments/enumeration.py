"""Is the Q-agent right? Every route of a small frozen net by enumeration, and an oracle that sees what the agent sees.

    python experiments/enumeration.py RUN [--images N] [--steps N] [--charge P ...] [--seeds 0,1,2] [--out FILE.csv]

RUN: a run of at most a few hundred routes on the embedded `shapes`, trained over its widths, such as
    dynroute train -c experiments/shapes/widths.yaml --out runs/shapes/widths
Its net is frozen. Fresh images are drawn, half to learn from, half to judge by; their loss on every route and the pooled
features that enter every unit after every prefix of a route are tabled. On these tables the project's own agent learns by
Q-learning from the routes it tries. The oracle is told all routes: backward induction by a regression on the features and
actions so far. Returns are -alpha (L_cls - dense L_cls) - charge * sum of (i - 1), alpha = 1 / mean L_cls over routes and
images; the dense net's own loss on the image is a baseline, as that of a teacher is for RNR, and changes no decision.

A row a charge and seed: mean return of the best constant route (chosen on the images to learn from), of the oracle, of
the agent's greedy policy, and of the best route of each image, which no one can know; the part of the gap between
constant and oracle that the agent earns; and how much that gap is worth, beside its standard error over the images.
U units, A actions, R = A^U routes, N images, B of a minibatch.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.assembly import prepare, restore
from dynroute.backbones import Backbone
from dynroute.checkpoints import LAST
from dynroute.contracts import Batch, InputError, Output, Trace, UnitSpec
from dynroute.data import DataOptions, DataSpec, Split, load, loader
from dynroute.net import RoutedNet, masked
from dynroute.provenance import commit, machine
from dynroute.records import write_rows
from dynroute.routers.qlearn import QRouter, RnpOptions, action_keeps
from dynroute.routers.td import rewards, td_loss

Route = tuple[int, ...]
ROUTES = 1024  # more would not be tabled in memory


class World(Protocol):
    """What agent and oracle are judged in: images with known losses on all routes."""

    images: int
    specs: list[UnitSpec]

    def features(self, rows_B: Tensor, before_BV: Tensor) -> Tensor:
        """(B, C) pooled features that enter unit V after the V actions before it."""

    def losses(self) -> Tensor:
        """L_cls (N, R) of every image on every route, routes in the order of itertools.product."""


def routes_of(specs: list[UnitSpec]) -> list[Route]:
    """All routes, the last unit changing fastest."""
    return list(itertools.product(*(range(spec.parts) for spec in specs)))


def place(action_BU: Tensor, specs: list[UnitSpec]) -> Tensor:
    """Where routes stand in `routes_of`."""
    index_B = torch.zeros(len(action_BU), dtype=torch.long)
    for u, spec in enumerate(specs):
        index_B = index_B * spec.parts + action_BU[:, u]
    return index_B


def returns(world: World, charge: float, alpha: float) -> Tensor:
    """(N, R): -alpha (L_cls - dense L_cls) - charge * sum of (i - 1)."""
    spent_R = torch.tensor([float(sum(route)) for route in routes_of(world.specs)])
    return -alpha * beyond_dense(world) - charge * spent_R


def beyond_dense(world: World) -> Tensor:
    """(N, R): each route's loss less that of the dense one, the last."""
    loss_NR = world.losses()
    return loss_NR - loss_NR[:, -1:]


class Enumerated:
    """A frozen net on a split, tabled: losses on every route, features after every prefix of a route."""

    @torch.no_grad()
    def __init__(self, net: RoutedNet, split: Split, data_spec: DataSpec) -> None:
        self.specs, self.images = net.backbone.specs, len(split)
        self.loss_NR = torch.zeros(self.images, len(routes_of(self.specs)))
        self.seen = [  # (prefixes, N, C) of each unit
            torch.zeros(len(routes_of(self.specs[:u])), self.images, spec.in_channels)
            for u, spec in enumerate(self.specs)
        ]
        for batch in loader(split, data_spec, 256, train=False):
            self._follow(net.backbone, net.backbone.stem(batch.images), batch, ())

    def _follow(self, body: Backbone, x_BCHW: Tensor, batch: Batch, prefix: Route) -> None:
        """Fill in what follows a prefix, unit by unit, so that what routes have in common is computed once."""
        u, where = len(prefix), int(place(torch.tensor([prefix], dtype=torch.long), self.specs[: len(prefix)]))
        if u == len(self.specs):
            self.loss_NR[batch.index, where] = F.cross_entropy(body.head(x_BCHW), batch.labels, reduction="none")
            return
        self.seen[u][where, batch.index] = x_BCHW.mean((2, 3))
        keeps = [action_keeps(spec)[a].expand(len(x_BCHW), -1) for spec, a in zip(self.specs, prefix, strict=False)]
        for action, keep_G in enumerate(action_keeps(self.specs[u])):
            given = [*keeps, keep_G.expand(len(x_BCHW), -1)]
            self._follow(body, masked(body.routable[u], x_BCHW, given[-1], given), batch, (*prefix, action))

    def features(self, rows_B: Tensor, before_BV: Tensor) -> Tensor:
        """(B, C), looked up."""
        v = before_BV.shape[1]
        return self.seen[v][place(before_BV, self.specs[:v]), rows_B]

    def losses(self) -> Tensor:
        """L_cls (N, R)."""
        return self.loss_NR


def decide(router: QRouter, world: World, rows_B: Tensor) -> tuple[Tensor, Output, Batch]:
    """Actions (B, U) of the agent, and what its loss needs."""
    images, notes, keeps = len(rows_B), [], []
    state, action_BV = router.begin(torch.zeros(images, 3, 1, 1)), torch.zeros(images, 0, dtype=torch.long)
    for u in range(len(world.specs)):
        decision, state = router.decide(u, world.features(rows_B, action_BV)[:, :, None, None], state)
        action_BV = torch.cat([action_BV, decision.notes["action"][:, None]], 1)
        notes.append(decision.notes)
        keeps.append(decision.keep_BG)
    together = {name: torch.stack([note[name] for note in notes], 1) for name in notes[0]}
    out = Output(torch.zeros(images, 2), Trace(torch.stack(keeps, 1), together), torch.zeros(images))
    return action_BV, out, Batch(torch.empty(images, 0), torch.zeros(images, dtype=torch.long), None, rows_B)


def learned(world: World, options: RnpOptions, seed: int, steps: int = 1500, alpha: float = 1.0) -> QRouter:
    """An agent after so many minibatches of 256 images, exploring less and less."""
    torch.manual_seed(seed)
    router = QRouter(world.specs, options).train()
    adam = torch.optim.Adam(router.agent.parameters(), lr=4e-3)
    loss_NR = beyond_dense(world)
    for step in range(steps):
        router.epsilon = max(1 - 1.4 * step / steps, 0.05)
        adam.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        rows_B = torch.randint(world.images, (256,))
        action_BU, out, batch = decide(router, world, rows_B)
        loss_B = loss_NR[rows_B, place(action_BU, world.specs)]
        reward_BU = rewards(out, batch, alpha, loss_B, baseline=False)
        adam.zero_grad()
        td_loss(out, reward_BU, options).backward()
        adam.step()
    return router.eval()


class Oracle:
    """Backward induction by regression on all returns: sees the features and actions so far, with every action tried."""

    def __init__(self, world: World, return_NR: Tensor) -> None:
        self.specs = world.specs
        rows_N = torch.arange(world.images)
        self.nets: list[nn.Module] = []
        value = return_NR.view(len(rows_N), *(spec.parts for spec in self.specs))  # (N, A, ..., A)
        for u in reversed(range(len(self.specs))):
            prefixes = routes_of(self.specs[:u])
            inputs = torch.cat([self._inputs(world, rows_N, prefix) for prefix in prefixes])
            wanted = value.flatten(1, -2) if u else value[:, None]
            wanted = wanted.transpose(0, 1)  # (prefixes, N, A)
            net = fitted(inputs, wanted.flatten(0, 1))
            with torch.no_grad():
                best = net(inputs).argmax(1).view(len(prefixes), -1, 1)
            chosen = wanted.gather(2, best)[:, :, 0].transpose(0, 1)
            value = chosen.reshape(len(rows_N), *(spec.parts for spec in self.specs[:u]))
            self.nets.insert(0, net)

    @staticmethod
    def _inputs(world: World, rows_B: Tensor, prefix: Route) -> Tensor:
        """All features up to the unit, and the actions before it."""
        before = torch.tensor(prefix, dtype=torch.long).expand(len(rows_B), -1)
        seen = [world.features(rows_B, before[:, :v]) for v in range(len(prefix) + 1)]
        return torch.cat([*seen, before.float()], 1)

    @torch.no_grad()
    def actions(self, world: World) -> Tensor:
        """(N, U) decisions on another world."""
        chosen = torch.zeros(world.images, len(self.specs), dtype=torch.long)
        for u in range(len(self.specs)):
            for prefix in {tuple(row) for row in chosen[:, :u].tolist()}:
                rows = (chosen[:, :u] == torch.tensor(prefix, dtype=torch.long)).all(1).nonzero()[:, 0]
                chosen[rows, u] = self.nets[u](self._inputs(world, rows, prefix)).argmax(1)
        return chosen


class Standardised(nn.Module):
    """A net whose inputs are brought to mean 0 and deviation 1."""

    def __init__(self, x: Tensor, net: nn.Module) -> None:
        super().__init__()
        self.mean, self.scale, self.net = x.mean(0), x.std(0).clamp(min=1e-6), net

    def forward(self, x: Tensor) -> Tensor:
        """The net's output."""
        out: Tensor = self.net((x - self.mean) / self.scale)
        return out


def fitted(x: Tensor, y: Tensor, steps: int = 250) -> nn.Module:
    """A small supervised regression: two hidden layers of 48, Adam."""
    body = nn.Sequential(nn.Linear(x.shape[1], 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, y.shape[1]))
    net = Standardised(x, body)
    adam = torch.optim.Adam(net.parameters(), lr=8e-3)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 8e-3 * (1 - step / steps)
        rows = torch.randint(len(x), (1024,))
        adam.zero_grad()
        F.mse_loss(net(x[rows]), y[rows]).backward()
        adam.step()
    return net


def judged(known: World, unseen: World, charge: float, seed: int, steps: int) -> dict[str, float]:
    """Mean returns on the unseen world of constant route, oracle, agent and each image's best; see the top of the file."""
    alpha = 1 / float(known.losses().mean())
    torch.manual_seed(seed)
    mine_NR, theirs_NR = returns(known, charge, alpha), returns(unseen, charge, alpha)
    oracle = Oracle(known, mine_NR).actions(unseen)
    options = RnpOptions(hidden=32, charge=[charge], alpha=alpha, trace=0.7)
    agent = learned(known, options, seed, steps, alpha)
    with torch.no_grad():
        policy = decide(agent, unseen, torch.arange(unseen.images))[0]
    constant_N = theirs_NR[:, mine_NR.mean(0).argmax()]
    oracle_N, agent_N = (theirs_NR.gather(1, place(a, unseen.specs)[:, None])[:, 0] for a in (oracle, policy))
    gap_N = oracle_N - constant_N
    gap, error = float(gap_N.mean()), float(gap_N.std()) / len(gap_N) ** 0.5
    return {
        "charge": charge,
        "seed": seed,
        "alpha": alpha,
        "constant": float(constant_N.mean()),
        "oracle": float(oracle_N.mean()),
        "agent": float(agent_N.mean()),
        "each_images_best": float(theirs_NR.max(1).values.mean()),
        "oracle_gain": gap,
        "oracle_gain_se": error,
        "earned": float((agent_N - constant_N).mean()) / gap if gap > 2 * error else float("nan"),
        "agent_routes": len(policy.unique(dim=0)),
        "n": unseen.images,
    }


def worlds(run: Path, images: int) -> tuple[Enumerated, Enumerated]:
    """The frozen net of a run on two sets of fresh images. Raises InputError for a run that is not on `shapes`."""
    net, config, _ = restore(run / LAST, router=False)
    prepare(config)
    if any(spec.form == "free" for spec in net.backbone.specs):
        raise InputError(f"{run} has free parts, the agent needs nested or alternative ones: backbone.unit=channels")
    count = len(routes_of(net.backbone.specs))
    if config.data.name != "shapes" or count > ROUTES:
        raise InputError(
            f"{run} is on {config.data.name} and has {count} routes: this needs shapes and {ROUTES} at most"
        )
    size = config.data.image_size
    fresh = load(DataOptions(image_size=size, train_images=20, test_images=images), seed=1000 + config.top.seed).test
    data_spec, half = load(DataOptions(image_size=size, train_images=20, test_images=20)).spec, images // 2
    parts = (fresh.take(torch.arange(half)), fresh.take(torch.arange(half, images)))
    known, unseen = (Enumerated(net.eval(), part, data_spec) for part in parts)
    return known, unseen


def main(words: list[str] | None = None) -> int:
    """Print a row a charge and seed, and write them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--images", type=int, default=40_000, help="fresh images, half to judge by [40000]")
    parser.add_argument("--steps", type=int, default=4000, help="minibatches of the agent [4000]")
    parser.add_argument("--charge", type=float, action="append", help="of one action; repeatable [0.1]")
    parser.add_argument("--seeds", default="0,1,2", help="of agent and oracle [0,1,2]")
    parser.add_argument("--out", type=Path, help="CSV file")
    asked = parser.parse_args(words)
    try:
        known, unseen = worlds(asked.run, asked.images)
        rows = []
        for charge, seed in itertools.product(asked.charge or [0.1], map(int, asked.seeds.split(","))):
            row: dict[str, object] = dict(judged(known, unseen, charge, seed, asked.steps))
            print(", ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
            rows.append(row | {"run": asked.run.name, "commit": commit(), "machine": machine(torch.device("cpu"))})
        if asked.out:
            write_rows(asked.out, rows)
    except InputError as error:
        print(f"enumeration.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
