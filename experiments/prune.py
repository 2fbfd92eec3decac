"""Static filter pruning by a library, as a control: cut a trained dense run to a share of its multiply-adds, fine-tune it.

    dynroute train router.name=static data.name=cifar10 backbone.name=resnet20 --out runs/dense
    python experiments/prune.py runs/dense --share 0.4 --share 0.6 --by l1 --by taylor --by group --epochs 8 --out runs/pruned
    dynroute compare runs/dense runs/pruned/* runs/dmnn

--resume leaves finished rows as they are, cuts again where a row was stopped (the seed decides on the same filters), and
goes on with its fine-tuning. Needs Torch-Pruning: pip install 'dynroute[controls]'. Fine-tuning is the project's own
training loop with the recipe of the dense run (its teacher too: with optim.teacher=start the dense run itself), multiply-
adds are counted by the project's rule (FlopCounterMode / 2), and rows go into eval.csv as of any run.

l1: filters by L1 norm, the same share of every layer (Li et al., 2017). taylor: by weight times gradient, over all layers
(Molchanov et al., 2019). group: by the L2 norm of all that goes with a filter, over all layers (DepGraph, Fang et al., 2023,
without its sparse training). Where a net has shortcuts that pad with zeros (backbone.shortcut=A), no convolution that writes
to the shortcut's sum is cut: the hidden channels of the blocks alone, as Li et al. do. Ours.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynroute.assembly import make_teacher
from dynroute.backbones import Backbone
from dynroute.calibration import TOLERANCE
from dynroute.config import CONFIG_FILE, Config
from dynroute.contracts import InputError, UnitSpec
from dynroute.cost import CostTerms
from dynroute.data import Dataset, loader
from dynroute.evaluation import Evaluator, trained_in
from dynroute.fit import fit
from dynroute.measure import make_dial
from dynroute.net import RoutedNet
from dynroute.records import EVAL_FILE, EvalRow, read_eval, write_text
from dynroute.routers import Phase, cross_entropy, ranged
from dynroute.routers.static import StaticOptions, StaticRouter
from dynroute.testing import count_macs
from dynroute.units import Residual, Subsample, Unit

STEPS = 100  # of pruning; each takes about a percent of the channels away, so that a share is met to about a percent
RATIO = 0.95  # of a layer's channels that may go
Score = Callable[[], Any]  # makes a Torch-Pruning importance


class PlainUnit(Unit):
    """A plain net as one unit that every image runs, so that loop, evaluation and rows of routed nets serve it too."""

    def __init__(self, net: nn.Module, macs: float) -> None:
        super().__init__()
        self.net, self.macs = net, macs
        self.spec = UnitSpec("pruned", 3, 1, "nested", False, (1.0,))

    def forward(self, x_BCHW: Tensor, keep_BG: Tensor | None = None) -> Tensor:
        """logits_BK. Not in channels_last: there torch 2.15 crashes in the backward of a strided 1x1 of under 8 channels."""
        logits_BK: Tensor = self.net(x_BCHW.contiguous())
        return logits_BK

    def narrow(self, keep: tuple[bool, ...], keep_in: tuple[bool, ...] | None = None) -> nn.Module:
        """The net itself."""
        return self.net

    def cost_terms(self) -> CostTerms:
        """All its MACs."""
        return CostTerms(0.0, (self.macs,))


class Pruned(Backbone):
    """A backbone of one PlainUnit. dense: MACs of the net before pruning, the reference of its share."""

    def __init__(self, net: nn.Module, image_size: int, dense: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Identity(), nn.Identity()
        self.units.append(PlainUnit(net, count_macs(net, torch.zeros(1, 3, image_size, image_size))))
        self.fixed_macs, self.dense_macs = 0.0, dense


def plain_net(backbone: Backbone) -> nn.Sequential:
    """The plain dense net of a backbone, made of its own layers, apart from it."""
    full = [(True,) * unit.spec.parts for unit in backbone.routable]
    above = [None if unit.reads is None else full[unit.reads] for unit in backbone.routable]
    blocks = [unit.narrow(*keeps) for unit, *keeps in zip(backbone.routable, full, above, strict=True)]
    return (
        copy.deepcopy(nn.Sequential(backbone.stem, *blocks, backbone.head))
        .to(memory_format=torch.contiguous_format)
        .eval()
    )


def spared(net: nn.Sequential) -> list[nn.Module]:
    """Layers whose outputs must stay: the classifier, and beside zero-padding shortcuts all that writes to their sum."""
    kept = [m for m in net[-1].modules() if isinstance(m, nn.Linear)][-1:]
    if any(isinstance(m, Subsample) for m in net.modules()):
        writers = [net[0], *(m.body for m in net.modules() if isinstance(m, Residual))]
        kept += [[m for m in writer.modules() if isinstance(m, nn.Conv2d)][-1] for writer in writers]
    return kept


def prune(net: nn.Sequential, by: str, share: float, data: Dataset, batch_size: int, seed: int) -> None:
    """Cut the net in place to at most a share of its multiply-adds. Raises InputError where it cannot be cut so far."""
    try:
        import torch_pruning as tp
    except ImportError:
        raise InputError("pruning needs Torch-Pruning: pip install 'dynroute[controls]'") from None
    scores: dict[str, Score] = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, group_reduction="first"),
        "taylor": tp.importance.GroupTaylorImportance,
        "group": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    }
    size = data.spec.image_size
    example = torch.zeros(1, 3, size, size)
    allowed = share * count_macs(net, example)
    pruner = tp.pruner.BasePruner(
        net,
        example,
        importance=scores[by](),
        global_pruning=by != "l1",
        pruning_ratio=RATIO,
        max_pruning_ratio=RATIO,
        iterative_steps=STEPS,
        ignored_layers=spared(net),
    )
    batches = itertools.cycle(loader(data.train, data.spec, batch_size, train=True, seed=seed))
    for _ in range(STEPS):
        if count_macs(net, example) <= allowed:
            break
        if by == "taylor":
            batch = next(batches)
            net.zero_grad()
            F.cross_entropy(net(batch.images), batch.labels).backward()
        pruner.step()
    net.zero_grad()
    if count_macs(net, example) > allowed + TOLERANCE * allowed / share:
        raise InputError(f"{by} cannot prune this net to {share:g} of its multiply-adds")


def planned(
    dense: Evaluator, source: Path, by: str, share: float, epochs: int, lr: float | None, folder: Path
) -> Config:
    """The configuration of a row. Raises InputError where the run is not dense, or the folder has a row of another one."""
    config = dense.config
    if config.router_name != "static" or config.router.width < 1:
        raise InputError(f"{source} is no dense run: train one with router.name=static")
    config = replace(
        config,
        top=replace(config.top, name=folder.name),
        backbone=replace(config.backbone, weights=str(source)),
        router_name=f"prune_{by}",
        router=StaticOptions(width=share, epochs=epochs),
        optim=replace(config.optim, lr=lr or config.optim.lr),
    )
    finished = read_eval(folder / EVAL_FILE) if (folder / EVAL_FILE).exists() else []
    others = [row for row in finished if (row["config_hash"], row["seed"]) != (config.hash(), config.top.seed)]
    begun = not finished and (folder / CONFIG_FILE).exists()
    if others or (begun and (folder / CONFIG_FILE).read_text() != config.yaml()):
        raise InputError(f"{folder} was pruned with other settings: choose another --out")
    return config


def run(dense: Evaluator, config: Config, folder: Path, resume: bool = False) -> EvalRow:
    """Prune and fine-tune a dense run into a folder; returns its row on the test split."""
    data, body, seed = dense.data, dense.net.backbone.cpu(), config.top.seed
    teacher = make_teacher(config, data.spec, dense.device)
    torch.manual_seed(seed)
    net = plain_net(body)
    prune(net, config.router_name.removeprefix("prune_"), config.router.width, data, config.optim.batch_size, seed)
    pruned = Pruned(net, data.spec.image_size, body.dense_macs)
    routed = RoutedNet(pruned, StaticRouter(pruned.specs, StaticOptions())).to(dense.device)
    write_text(folder / CONFIG_FILE, config.yaml())
    tune = Phase("tune", config.router.epochs, ("backbone",), cross_entropy)
    rows = fit(routed, data, [tune], config.optim, folder, seed=seed, resume=resume, teacher=teacher)
    made = Evaluator(
        folder,
        routed.eval(),
        config,
        data,
        dense.device,
        "last",
        len(rows),
        trained_in(rows),
        make_dial(routed, 0, list),
    )
    return made.measure(None).row


def main(words: list[str] | None = None) -> int:
    """Prune by each way to each share; prints a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, metavar="RUN", help="run folder of a dense net")
    parser.add_argument("--share", type=float, action="append", required=True, help="of the multiply-adds; repeatable")
    parser.add_argument("--by", choices=["l1", "taylor", "group"], action="append", required=True, help="repeatable")
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning [8]")
    parser.add_argument("--lr", type=float, help="of fine-tuning [the dense run's]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier call was stopped")
    given = parser.parse_args(words)
    try:
        ranged("--epochs", given.epochs, 0, 100_000)
        for share in given.share:
            ranged("--share", share, 0.01, 1.0)
        for by, share in itertools.product(given.by, given.share):
            folder = given.out / f"prune_{by}_{100 * share:g}"
            if not given.resume and folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is not empty: add --resume, or choose another --out")
            dense = Evaluator.of(given.source)
            config = planned(dense, given.source, by, share, given.epochs, given.lr, folder)
            if (folder / EVAL_FILE).exists():
                print(f"{folder}: finished before")
                continue
            row = run(dense, config, folder, given.resume)
            print(f"{folder}: share {row.macs_share:.3f}, {row.params} parameters, top-1 {100 * row.top1:.2f} %")
    except InputError as error:
        print(f"prune.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
