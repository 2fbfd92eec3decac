"""The Q-agent against what can be known: all 64 routes of three units by enumeration, and an oracle that sees what it sees.

The oracle and the agent's training on tables are those of experiments/enumeration.py; worlds here are made up, or a real net.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynroute.cli import main
from dynroute.contracts import UnitSpec
from dynroute.records import read_rows
from dynroute.routers.qlearn import RnpOptions
from enumeration import Enumerated, Oracle, decide, learned, place, returns, routes_of, worlds
from enumeration import main as enumerate_routes

UNITS, ACTIONS = 3, 4
SPECS = [UnitSpec(f"u{u}", 6, ACTIONS, "nested", False, (0.25,) * 4) for u in range(UNITS)]


@dataclass
class MadeUp:
    """Images that differ in difficulty and in the unit that matters; noisy features of a frozen net.

    A unit's features tell the difficulty, better and better, and from the unit that matters on also which one it is.
    """

    hard_N: Tensor
    needs_N: Tensor
    seen_NUC: Tensor
    specs: list[UnitSpec] = field(default_factory=lambda: SPECS)

    @classmethod
    def of(cls, images: int, seed: int) -> MadeUp:
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

    @property
    def images(self) -> int:
        return len(self.hard_N)

    def features(self, rows_B: Tensor, before_BV: Tensor) -> Tensor:
        """(B, C); the last action shows in one of them."""
        x_BC = self.seen_NUC[rows_B, before_BV.shape[1]].clone()
        if before_BV.shape[1]:
            x_BC[:, 4] = before_BV[:, -1] / (ACTIONS - 1)
        return x_BC

    def losses(self) -> Tensor:
        """L_cls (N, 64)."""
        lack_RU = (1 - torch.tensor(routes_of(SPECS)) / (ACTIONS - 1)).square()
        return self.hard_N[:, None] * (3.0 * lack_RU.T[self.needs_N] + 0.3 * lack_RU.sum(1))


def earned(return_NR: Tensor, action_NU: Tensor) -> float:
    """Mean return of the routes taken."""
    return float(return_NR.gather(1, place(action_NU, SPECS)[:, None]).mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_agent_earns_what_its_state_can_tell(seed: int) -> None:
    charge = 0.15
    world, unseen = MadeUp.of(3000, seed), MadeUp.of(3000, seed + 100)
    torch.manual_seed(seed)
    oracle = Oracle(world, returns(world, charge, 1.0))
    agent = learned(world, RnpOptions(hidden=32, charge=[charge], trace=0.7), seed)
    return_NR = returns(unseen, charge, 1.0)
    constant = float(return_NR.mean(0).max())
    best = earned(return_NR, oracle.actions(unseen))
    with torch.no_grad():
        got = earned(return_NR, decide(agent, unseen, torch.arange(3000))[0])
    assert best > constant + 0.1, "the world must have something to tell"
    assert (got - constant) / (best - constant) >= 0.95


def test_a_huge_charge_buys_nothing_and_no_charge_everything() -> None:
    world = MadeUp.of(1000, 5)
    rows = torch.arange(1000)
    dear = decide(learned(world, RnpOptions(hidden=16, charge=[100.0]), 0, 300), world, rows)[0]
    free = decide(learned(world, RnpOptions(hidden=16, charge=[0.0], trace=0.7), 0, 600), world, rows)[0]
    assert int(dear.max()) == 0
    loss_NR = world.losses()
    got_N = loss_NR.gather(1, place(free, SPECS)[:, None])[:, 0]
    assert float((got_N - loss_NR[:, -1]).mean()) < 0.05  # of losses up to 3.9


# --- a real net ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet8 that has learned easy shapes at every width, for a minute or so."""
    run = tmp_path_factory.mktemp("net") / "widths"
    words = ["router.name=rnr", "router.rounds=0", "router.joint_epochs=0", "router.pretrain_epochs=2"]
    words += ["router.widths_epochs=3", "data.train_images=4000", "data.image_size=16", "backbone.width=8"]
    words += ["optim.batch_size=32", "optim.lr=0.05"]
    assert main(["train", *words, "optim.amp=none", "device=cpu", "threads=1", "--out", str(run)]) == 0
    return run


def test_the_tables_are_what_the_net_does(trained: Path) -> None:
    """Losses of routes and features after prefixes, against plain runs of the net on the same images."""
    from dynroute.assembly import restore
    from dynroute.data import DataOptions, load, loader
    from dynroute.routers.base import stacked
    from dynroute.routers.qlearn import action_keeps

    net = restore(trained / "last.pt", router=False)[0].eval()
    data = load(DataOptions(image_size=16, train_images=20, test_images=40))
    table = Enumerated(net, data.test, data.spec)
    (batch,) = loader(data.test, data.spec, 40, train=False)
    for route in [(0, 0, 0), (3, 3, 3), (2, 0, 1)]:
        keep_UG = stacked([action_keeps(s)[a] for s, a in zip(net.backbone.specs, route, strict=True)])
        with torch.no_grad():
            logits = net(batch.images, keep_UG.expand(40, -1, -1)).logits_BK
            x = net.backbone.routable[0](net.backbone.stem(batch.images), keep_UG[0].expand(40, -1))
        loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        told = table.losses()[:, int(place(torch.tensor([route]), table.specs))]
        assert torch.allclose(told, loss, atol=1e-4)
        before = torch.tensor([route[:1]]).expand(40, -1)
        assert torch.allclose(table.features(torch.arange(40), before), x.mean((2, 3)), atol=1e-5)


def test_on_a_real_net_a_huge_charge_buys_nothing_and_no_charge_loses_nothing(trained: Path) -> None:
    known, unseen = worlds(trained, 3000)
    rows, loss_NR = torch.arange(unseen.images), unseen.losses()
    dear, free = (
        decide(learned(known, RnpOptions(hidden=16, charge=[charge], trace=0.7), 0, steps), unseen, rows)[0]
        for charge, steps in ((10.0, 500), (0.0, 300))
    )
    assert float((loss_NR[:, 0] - loss_NR[:, -1]).mean()) < 1, "one step costs 10 times what all of them could save"
    assert int(dear.max()) == 0
    gap_N, worst_N = (loss - loss_NR[:, -1] for loss in (loss_NR[rows, place(free, unseen.specs)], loss_NR[:, 0]))
    noise = float(gap_N.std()) / len(gap_N) ** 0.5
    assert float(worst_N.mean()) > 3 * float(worst_N.std()) / len(worst_N) ** 0.5, "the cheapest route must be worse"
    assert float(gap_N.mean()) < 2 * noise


def test_a_row_for_each_charge_and_seed(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    words = ["--images", "400", "--steps", "30", "--charge", "0.1", "--seeds", "3"]
    assert enumerate_routes([str(trained), *words, "--out", str(out)]) == 0
    rows = read_rows(out)
    assert [(row["charge"], row["seed"]) for row in rows] == [("0.1", "3")]
    for row in rows:
        best, oracle, agent, constant = (float(row[k]) for k in ("each_images_best", "oracle", "agent", "constant"))
        assert best >= max(oracle, agent, constant)
        assert float(row["oracle_gain"]) == pytest.approx(oracle - constant, abs=1e-5)
        assert row["n"] == "200"


def test_only_small_nets_on_drawn_images(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Two sub-blocks each, any subset of them: no chain of actions to enumerate."""
    assert routes_of(SPECS) == list(itertools.product(range(4), repeat=3))
    assert place(torch.tensor(routes_of(SPECS)), SPECS).tolist() == list(range(64))
    assert enumerate_routes([str(runs["dmnn"])]) == 2
    assert "backbone.unit=channels" in capsys.readouterr().err
