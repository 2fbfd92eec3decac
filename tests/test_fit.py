"""The training loop: it repeats, it resumes to the same bits, it stops on NaN, and what is frozen stays frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TINY
from dynroute import assembly, checkpoints, runs
from dynroute import fit as fit_room
from dynroute.checkpoints import load_checkpoint
from dynroute.config import Config, load_config
from dynroute.contracts import Batch, InputError, Output
from dynroute.data import Dataset, load
from dynroute.evaluation import Evaluator
from dynroute.fit import Diverged, Step, fit, set_modes
from dynroute.net import RoutedNet
from dynroute.optim import OptimOptions, amp_dtype, learning_curve, make_optimizers
from dynroute.records import read_rows
from dynroute.routers import Phase, cross_entropy

SMALL = [*TINY, "data.train_images=150", "data.test_images=50", "optim.batch_size=16"]
LEARNED = ["router.hidden=8", "router.pretrain_epochs=0"]
METHODS = {
    "dmnn": ["router.name=dmnn", "router.epochs=3"],
    "opened": ["router.name=dmnn", "router.open_epochs=1", "router.epochs=2", "router.cooling=0.5"],
    "rnp": ["router.name=rnp", *LEARNED, "router.widths_epochs=1", "router.rounds=2", "router.agent_epochs=2",
            "router.cnn_epochs=1"],
    "rnr": ["router.name=rnr", *LEARNED, "router.widths_epochs=1", "router.agent_epochs=1", "router.joint_epochs=2"],
}  # fmt: skip


def config_of(method: str, *keys: str) -> Config:
    return load_config(overrides=[*SMALL, *METHODS[method], *keys])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each method trained once without a stop."""
    root = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        runs.train(config_of(method), root / method)
    return root


def numbers(folder: Path) -> list[dict[str, str]]:
    """train.csv but for its speeds."""
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in read_rows(folder / "train.csv")]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(a: Path, b: Path) -> None:
    assert numbers(a) == numbers(b)
    for name in ("last.pt", "best.pt"):
        one, two = load_checkpoint(a / name), load_checkpoint(b / name)
        assert same(one["model"], two["model"]), name
        assert same(one["optimizers"], two["optimizers"]), name


def stopper(epoch: int, step: int | None = None) -> Callable[[Step], None]:
    """A listener that presses Ctrl-C at an epoch's end, or after one of its minibatches."""

    def hear(heard: Step) -> None:
        if heard.epoch == epoch and (heard.row is not None if step is None else heard.step == step):
            raise KeyboardInterrupt

    return hear


# --- repeating and resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str, whole: Path, tmp_path: Path) -> None:
    runs.train(config_of(method), tmp_path / "again")
    assert_same_run(whole / method, tmp_path / "again")


def test_another_seed_gives_other_weights(whole: Path, tmp_path: Path) -> None:
    runs.train(config_of("dmnn", "seed=1"), tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_same_run(whole / "dmnn", tmp_path / "other")


@pytest.mark.parametrize(
    ("method", "epochs"),
    # rnp's phases end after epochs 1, 3, 4, 6, 7; rnr's after 1, 2, 4. The epoch at whose end Ctrl-C comes is not saved.
    [
        ("dmnn", [1]),
        ("dmnn", [3]),
        ("opened", [2]),
        ("opened", [3]),
        ("rnp", [2]),
        ("rnp", [3]),
        ("rnp", [4, 6]),
        ("rnr", [2]),
        ("rnr", [3, 4]),
    ],
)
def test_stopped_and_resumed_is_as_if_never_stopped(
    method: str, epochs: list[int], whole: Path, tmp_path: Path
) -> None:
    config, folder = config_of(method), tmp_path / "run"
    for i, epoch in enumerate(epochs):
        with pytest.raises(KeyboardInterrupt):
            runs.train(config, folder, resume=i > 0, listener=stopper(epoch))
        assert len(load_checkpoint(folder / "last.pt")["rows"]) == epoch - 1
    heard: list[Step] = []
    runs.train(config, folder, resume=True, listener=heard.append)
    assert heard[0].epoch == epochs[-1], "finished epochs are not trained again"
    assert_same_run(whole / method, folder)


def test_killed_between_best_and_last_leaves_no_epoch_out(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = config_of("dmnn"), tmp_path / "run"
    write, written, both = checkpoints.write_file, [], ("best.pt", "last.pt")

    def killed(path: Path, fill: Any) -> None:
        written.append(path.name)
        if (
            len(written) == 1 + len(both) + 2
        ):  # last.pt at the start, both after the first epoch, the second of the next
            raise KeyboardInterrupt
        write(path, fill)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config, folder)
    runs.train(config, folder, resume=True)
    assert_same_run(whole / "dmnn", folder)
    there, here = (load_checkpoint(path / "best.pt")["model"] for path in (whole / "dmnn", folder))
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_a_budget_and_epochs_of_the_cnn_alone_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    keys = ["router.budget=[0.3,0.9]", "router.cnn_epochs=1", "router.rounds=1"]
    for act in (
        lambda: runs.train(config_of("rnr", *keys), tmp_path / "run"),
        lambda: runs.check(config_of("rnr", *keys)),
    ):
        with pytest.raises(InputError, match=r"set router\.cnn_epochs=0"):
            act()
    assert not (tmp_path / "run").exists()
    assert runs.check(config_of("rnr", *keys, "router.rounds=0")).router.specs  # no such epochs are trained then


def test_a_folder_that_was_only_begun_is_begun_again(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "log.txt"):
        (tmp_path / "run" / name).write_text("")
    runs.train(config_of("dmnn"), tmp_path / "run", resume=True)
    assert_same_run(whole / "dmnn", tmp_path / "run")


def test_stopped_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    config = config_of("dmnn", "optim.batch_size=4", "router.epochs=2")
    runs.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runs.train(config, tmp_path / "run", listener=stopper(2, step=20))
    runs.train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_finished_run_resumes_to_itself(whole: Path) -> None:
    before = (whole / "rnr" / "last.pt").read_bytes()
    runs.train(config_of("rnr"), whole / "rnr", resume=True, listener=stopper(1))
    assert (whole / "rnr" / "last.pt").read_bytes() == before


def test_phases_follow_each_other_in_train_csv(whole: Path) -> None:
    phases = [row["phase"] for row in numbers(whole / "rnp")]
    assert phases == ["widths", "agent1", "agent1", "cnn1", "agent2", "agent2", "cnn2"]
    assert [row["phase"] for row in numbers(whole / "rnr")] == ["widths", "agent1", "joint", "joint"]


def test_a_listener_hears_every_epoch_and_every_twentieth_minibatch(tmp_path: Path) -> None:
    heard: list[Step] = []
    runs.train(config_of("dmnn", "optim.batch_size=4", "router.epochs=2"), tmp_path / "run", listener=heard.append)
    assert [(s.epoch, s.step, s.steps, s.row is not None) for s in heard] == [
        (1, 20, 34, False), (1, 34, 34, True), (2, 20, 34, False), (2, 34, 34, True),
    ]  # fmt: skip
    assert all(s.epochs == 2 and s.phase == "joint" and math.isfinite(s.loss) for s in heard)


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_best_is_the_best_of_the_last_phase_on_calibration(method: str, whole: Path) -> None:
    rows = numbers(whole / method)
    final = [row for row in rows if row["phase"] == rows[-1]["phase"]]
    best = load_checkpoint(whole / method / "best.pt")["rows"][-1]
    top = max(float(row["calib_top1"]) for row in final)
    assert best["phase"] == rows[-1]["phase"]
    assert best["calib_top1"] == pytest.approx(top)
    latest = [row["epoch"] for row in final if float(row["calib_top1"]) == top][-1]
    assert best["epoch"] == int(latest), "of equals, the later one"


def test_a_better_epoch_of_an_earlier_phase_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, config = small("dmnn")
    tops = iter([0.9, 0.5, 0.7, 0.6])

    def row(part: object, epoch: int, *_: object) -> dict[str, Any]:
        return {"epoch": epoch + 1, "calib_top1": next(tops)}

    monkeypatch.setattr(fit_room._Part, "epoch", row)
    phases = [Phase("dense", 1, ("backbone",), cross_entropy), Phase("routed", 3, ("backbone",), cross_entropy)]
    fit(net, data, phases, config.optim, tmp_path)
    assert load_checkpoint(tmp_path / "best.pt")["rows"][-1]["epoch"] == 3


def small(method: str, *keys: str) -> tuple[RoutedNet, Dataset, Config]:
    config = config_of(method, *keys)
    data = load(config.data)
    return assembly.build(config, data.spec), data, config


def watch(net: RoutedNet, states: list[dict[str, Tensor]]) -> Callable[[Step], None]:
    """A listener that keeps the net's state at every epoch's end."""
    states.append({k: v.clone() for k, v in net.state_dict().items()})
    return lambda step: states.append({k: v.clone() for k, v in net.state_dict().items()}) if step.row else None


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_checkpoint_cut_off_anywhere_is_called_broken(whole: Path, tmp_path: Path) -> None:
    content = (whole / "dmnn" / "last.pt").read_bytes()
    for length in (0, 500, 5000, len(content) // 2, len(content) - 1):  # 5000: torch itself raises an OSError
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut\.pt was not loaded: broken or truncated"):
            load_checkpoint(tmp_path / "cut.pt")


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, config = small("dmnn")
    phases = [Phase("joint", 1, ("backbone", "router"), cross_entropy)]
    fit(net, data, phases, config.optim, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()

    def full(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(net, data, phases, config.optim, tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "train.csv"]


def test_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    net, data, config = small("dmnn")
    fit(net, data, [], config.optim, tmp_path)
    other, _, _ = small("dmnn", "backbone.width=4")
    with pytest.raises(InputError, match="does not fit this architecture: size mismatch"):
        fit(other, data, [], config.optim, tmp_path, resume=True)


# --- divergence ---------------------------------------------------------------------------------------------


def breaks_in(epoch: int, term: Callable[[Output], Tensor], steps: int = 9) -> Callable[..., dict[str, Tensor]]:
    """Cross entropy, joined by a bad term from that epoch on. steps: minibatches of an epoch."""
    calls = [0]

    def loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        calls[0] += 1
        bad = {"bad": term(out)} if calls[0] > (epoch - 1) * steps else {}
        return cross_entropy(out, batch) | bad

    return loss


@pytest.mark.parametrize(
    ("term", "says"),
    [
        (lambda out: torch.tensor(math.nan), "the loss is nan"),  # no gradient: the weights stay finite
        (lambda out: torch.tensor(math.inf), "the loss is inf"),
        (lambda out: out.logits_BK.sum() * math.nan, "the loss is nan"),
        (lambda out: (out.logits_BK * 0).sqrt().sum(), "the loss is nan"),  # a loss of 0 with a gradient of nan
    ],
    ids=["nan", "inf", "nan with a gradient", "nan in the gradient alone"],
)
def test_a_loss_that_is_not_finite_stops_and_the_epoch_before_stands(
    term: Callable[[Output], Tensor], says: str, tmp_path: Path
) -> None:
    net, data, config = small("dmnn")
    states: list[dict[str, Tensor]] = []
    phase = Phase("joint", 3, ("backbone", "router"), breaks_in(2, term))
    with pytest.raises(Diverged, match=f"{says} in phase 'joint': the last good checkpoint is kept"):
        fit(net, data, [phase], config.optim, tmp_path, listener=watch(net, states))
    last = load_checkpoint(tmp_path / "last.pt")
    assert [row["epoch"] for row in last["rows"]] == [1]
    assert same(last["model"], states[1])
    assert len(read_rows(tmp_path / "train.csv")) == 1


def test_weights_that_burst_at_the_last_step_are_not_saved(tmp_path: Path) -> None:
    net, data, config = small("dmnn")
    calls = [0]

    def loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        calls[0] += 1
        terms = cross_entropy(out, batch)
        return terms | ({"bad": (out.logits_BK * 0).sqrt().sum()} if calls[0] == 9 else {})

    with pytest.raises(Diverged, match="weights are no longer finite"):
        fit(net, data, [Phase("joint", 2, ("backbone",), loss)], config.optim, tmp_path)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["rows"] == []
    assert all(bool(v.isfinite().all()) for v in last["model"].values())


def test_the_log_says_why_a_run_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise Diverged("the loss is nan")

    monkeypatch.setattr(fit_room._Part, "epoch", broken)
    with pytest.raises(Diverged):
        runs.train(config_of("dmnn"), tmp_path / "run")
    assert "stopped: the loss is nan" in (tmp_path / "run" / "log.txt").read_text()


# --- frozen parts, groups and schedules ---------------------------------------------------------------------


def test_each_phase_changes_only_what_it_trains(tmp_path: Path) -> None:
    net, data, config = small("rnp")
    states: list[dict[str, Tensor]] = []
    phases = list(config.method.phases(net, config.router))
    rows = fit(net, data, phases, config.optim, tmp_path, listener=watch(net, states))
    for row, before, after in zip(rows, states, states[1:], strict=False):
        rooms = {name.split(".")[0] for name in changed(before, after)}
        assert rooms == ({"router"} if row["phase"].startswith("agent") else {"backbone"}), row["phase"]
    agent = changed(states[1], states[2])
    assert any("norms" in name for name in agent), "the agent's own statistics do learn"
    cnn = changed(states[3], states[4])
    assert any("running_mean" in name for name in cnn) and any("conv" in name for name in cnn)


def test_a_joint_phase_changes_both(tmp_path: Path) -> None:
    net, data, config = small("dmnn", "router.epochs=1")
    states: list[dict[str, Tensor]] = []
    phases = list(config.method.phases(net, config.router))
    fit(net, data, phases, config.optim, tmp_path, listener=watch(net, states))
    assert {name.split(".")[0] for name in changed(*states)} == {"backbone", "router"}


@pytest.mark.parametrize("trains", [("backbone",), ("router",), ("backbone", "router")])
def test_modes_and_gradients_follow_the_phase(trains: tuple[str, ...]) -> None:
    net, _, _ = small("rnp")
    set_modes(net, Phase("p", 1, trains, cross_entropy))
    for name, module in (("backbone", net.backbone), ("router", net.router)):
        assert all(m.training == (name in trains) for m in module.modules())
        assert all(p.requires_grad == (name in trains) for p in module.parameters())


@pytest.mark.parametrize("router_decay", [0.0, 0.003])
def test_only_convolutions_and_linear_layers_decay(router_decay: float) -> None:
    net, _, _ = small("dmnn")
    options = OptimOptions(lr=0.2, weight_decay=0.01)
    both = ("backbone", "router")
    phase = Phase("p", 1, both, cross_entropy, lr_scale=0.5, router_scale=0.25, router_decay=router_decay)
    (sgd,), (tops,) = make_optimizers(net, phase, options)
    decay = {id(p): group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    rate = {id(p): top for group, top in zip(sgd.param_groups, tops, strict=True) for p in group["params"]}
    assert len(decay) == sum(len(g["params"]) for g in sgd.param_groups) == len(list(net.parameters()))
    for part, weight, lr in ((net.backbone, 0.01, 0.1), (net.router, router_decay, 0.05)):
        for module in part.modules():
            for name, p in module.named_parameters(recurse=False):
                weighs = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
                assert (decay[id(p)], rate[id(p)]) == (weight if weighs else 0.0, lr)


def test_an_agent_has_its_own_adam() -> None:
    net, _, _ = small("rnp")
    made, tops = make_optimizers(net, Phase("p", 1, ("router",), cross_entropy, router_lr=3e-3), OptimOptions())
    assert [type(o) for o in made] == [torch.optim.Adam]
    assert tops == [[3e-3]]
    assert {id(p) for p in made[0].param_groups[0]["params"]} == {id(p) for p in net.router.parameters()}
    both, _ = make_optimizers(net, Phase("p", 1, ("backbone", "router"), cross_entropy, router_lr=1e-3), OptimOptions())
    assert [type(o) for o in both] == [torch.optim.SGD, torch.optim.Adam]


def test_the_rate_climbs_then_falls_to_zero_as_a_cosine() -> None:
    options = OptimOptions(warmup=0.1)
    curve = [learning_curve(i / 1000, 9, options) for i in range(1001)]
    assert 0 < curve[0] < 0.02
    assert curve[:100] == sorted(curve[:100])
    assert curve[100] == 1.0
    assert curve[100:] == sorted(curve[100:], reverse=True)
    assert learning_curve(0.55, 9, options) == pytest.approx(0.5)
    assert curve[-1] == pytest.approx(0.0)
    assert learning_curve(0.0, 9, OptimOptions(warmup=0.0)) == 1.0


def test_the_rate_steps_down_by_epochs() -> None:
    options = OptimOptions(schedule="step", step_epochs=2, step_factor=0.5)
    assert [learning_curve(epoch / 5, 5, options) for epoch in range(5)] == [1, 1, 0.5, 0.5, 0.25]


def test_the_rate_steps_down_at_parts_of_a_phase_whatever_its_length() -> None:
    options = OptimOptions(schedule="step", step_at=[0.5, 0.75], step_factor=0.1)
    for epochs in (4, 200):
        rates = [learning_curve(epoch / epochs, epochs, options) for epoch in range(epochs)]
        expected = [1.0] * (epochs // 2) + [0.1] * (epochs // 4) + [0.01] * (epochs // 4)
        assert rates == pytest.approx(expected)
    with pytest.raises(InputError, match=r"optim\.step_at must lie between 0 and 1, not 100"):
        OptimOptions(schedule="step", step_at=[100])
    with pytest.raises(InputError, match=r"optim\.step_at is for optim\.schedule=step"):
        OptimOptions(step_at=[0.5])


def test_schedules_hear_how_far_their_phase_is(tmp_path: Path) -> None:
    net, data, config = small("dmnn")
    heard: list[float] = []
    phases = [
        Phase("first", 1, ("backbone",), cross_entropy),
        Phase("none", 0, ("backbone",), cross_entropy),
        Phase("second", 2, ("backbone",), cross_entropy, schedule=heard.append),
    ]
    rows = fit(net, data, phases, config.optim, tmp_path)
    assert [row["phase"] for row in rows] == ["first", "second", "second"]
    assert heard == pytest.approx([i / len(heard) for i in range(len(heard))])


def test_a_step_runs_its_images_once_at_each_of_their_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, seen = RoutedNet.forward, list[tuple[Tensor, Tensor]]()

    def watched(net: RoutedNet, images: Tensor, routes: Tensor | None = None) -> Output:
        out: Output = forward(net, images, routes)
        if net.router.training:
            seen.append((images, out.trace.notes["asked"][:, 0]))
        return out

    monkeypatch.setattr(RoutedNet, "forward", watched)
    keys = ["router.widths_epochs=0", "router.joint_epochs=1", "router.budget=[0.3,0.9]", "router.budgets_per_image=3"]
    runs.train(config_of("rnr", *keys), tmp_path / "run")
    steps = len(read_rows(tmp_path / "run" / "train.csv")) * -(-len(load(config_of("rnr").data).train) // 16)
    assert len(seen) == steps, "a step is one pass over its copies"
    for images, asked_B in seen:
        copies = images.chunk(3)
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        places_PB = (asked_B.view(3, -1) - 0.3) / 0.6 * 3
        assert (places_PB.floor().sort(0).values == torch.arange(3)[:, None]).all(), "a third of the range each"


def test_terms_of_the_loss_are_columns_that_add_up(whole: Path) -> None:
    for row in numbers(whole / "dmnn"):
        terms = [float(v) for k, v in row.items() if k.startswith("loss_")]
        assert len(terms) == 3
        assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-4)


@pytest.mark.parametrize(("wanted", "dtype"), [("bf16", torch.bfloat16), ("none", None)])
def test_precision_is_what_was_asked_for(wanted: str, dtype: torch.dtype | None) -> None:
    assert amp_dtype(wanted, torch.device("cpu")) is dtype
    assert amp_dtype("auto", torch.device("cpu")) in (torch.bfloat16, None)


def test_a_gpu_that_emulates_bf16_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert amp_dtype("auto", torch.device("cuda:1")) is None


def test_bf16_training_runs_and_repeats(tmp_path: Path) -> None:
    config = config_of("rnr", "optim.amp=bf16", "router.joint_epochs=1")
    for name in ("a", "b"):
        runs.train(config, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("wanted", "precision"), [("bf16", "bf16"), ("none", "fp32")])
def test_the_precision_of_training_is_told_with_the_results(wanted: str, precision: str, tmp_path: Path) -> None:
    runs.train(config_of("dmnn", f"optim.amp={wanted}"), tmp_path / "run")
    assert {row["precision"] for row in read_rows(tmp_path / "run" / "train.csv")} == {precision}
    assert Evaluator.of(tmp_path / "run").measure(None).row.precision == precision


def test_every_epoch_draws_anew_and_is_scored_on_the_calibration_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data, config = small("dmnn")
    asked, noise, load_batches = list[tuple[Any, Any]](), list[float](), fit_room.loader

    def watched(part: Any, *rest: Any, **words: Any) -> Any:
        asked.append((part, words.get("epoch")))
        return load_batches(part, *rest, **words)

    def loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        noise.append(float(torch.rand(())))
        return cross_entropy(out, batch)

    monkeypatch.setattr(fit_room, "loader", watched)
    fit(net, data, [Phase("p", 2, ("backbone",), loss)], config.optim, tmp_path)
    wanted = [(data.train, 0), (data.calibration, None), (data.train, 1), (data.calibration, None)]
    assert all(part is split and epoch == number for (part, epoch), (split, number) in zip(asked, wanted, strict=True))
    assert len(set(noise)) == len(noise)


def test_the_share_in_train_csv_is_of_the_dense_net(whole: Path) -> None:
    for row in numbers(whole / "dmnn"):
        assert 0 < float(row["share"]) < 1.1


def test_the_loss_hears_what_the_teacher_says_of_its_images(tmp_path: Path) -> None:
    net, data, config = small("dmnn", "optim.teacher_weight=0.3", "optim.teacher_temperature=4")
    heard: list[bool] = []

    def teacher(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None] * torch.arange(20)

    def loss(out: Output, batch: Batch) -> dict[str, Tensor]:
        assert batch.advice is not None and batch.advice[1:] == (0.3, 4.0)
        heard.append(torch.equal(batch.advice.logits_BK, teacher(batch.images)))
        return cross_entropy(out, batch)

    fit(net, data, [Phase("p", 1, ("backbone",), loss)], config.optim, tmp_path, teacher=teacher)
    assert heard and all(heard)


def test_optimizers_have_the_momentum_and_decay_that_were_asked_for() -> None:
    net, _, _ = small("rnp")
    both = Phase("p", 1, ("backbone", "router"), cross_entropy, router_lr=1e-3, router_decay=0.003)
    for momentum, nesterov in ((0.8, True), (0.8, False), (0.0, True)):
        (sgd, adam), _ = make_optimizers(net, both, OptimOptions(momentum=momentum, nesterov=nesterov))
        assert {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(momentum, nesterov and momentum > 0)}
        assert [group["weight_decay"] for group in adam.param_groups] == [0.003]


def test_the_rate_steps_down_at_the_epoch_itself_however_it_is_rounded() -> None:
    options = OptimOptions(schedule="step", step_epochs=1, step_factor=0.5)
    for epochs in range(1, 120):
        assert [learning_curve(epoch / epochs, epochs, options) for epoch in range(epochs)] == [
            0.5**e for e in range(epochs)
        ]
