"""The fast run: the same result from modules that are really smaller."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynroute.contracts import InputError, Setting
from dynroute.net import RoutedNet
from dynroute.routers import legal, stacked
from dynroute.skipping import FastNet, blocks, cache, chain, executor, kernels, load_forms, packed_works, save_forms
from dynroute.skipping import unit as unit_room
from dynroute.skipping.blocks import Blocks
from dynroute.skipping.cache import LOOK_AGAIN, Key, Programs
from dynroute.skipping.forms import forms_for
from dynroute.skipping.kernels import Conv
from dynroute.skipping.lowering import straight
from dynroute.skipping.unit import MASKED, SORTED, VIEWS, Scratch, gathered
from dynroute.testing import close, count_macs, random_routes, shake
from dynroute.units import FORMS, ConvUnit, channel_mask
from tiny import BLOCK_FORMS, PAIRS, make_net, make_router, pictures

FORM_NAMES = (VIEWS, SORTED, MASKED)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_the_fast_run_is_the_masked_run(name: str, unit: str, images: int, shortcut: str) -> None:
    net, x = make_net(name, unit, shortcut=shortcut), pictures(images)
    with torch.no_grad():
        masked, fast = net(x), FastNet(net)(x)
        assert close(fast.logits_BK, masked.logits_BK)
        assert torch.equal(fast.trace.keep_BUG, masked.trace.keep_BUG)
        assert torch.equal(fast.macs_B, masked.macs_B)


def routes(unit: str, kind: str, images: int) -> Tensor:
    specs = make_net("static", unit).backbone.specs
    if kind == "random":
        return random_routes(specs, images)
    return torch.full((images, 3, specs[0].parts), 1.0 if kind == "on" else 0.0)


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        ("channels", "on"),
        ("channels", "random"),
        ("paths", "on"),
        ("paths", "off"),
        ("paths", "random"),
        ("choice", "random"),
    ],
)
def test_given_routes(unit: str, kind: str, images: int) -> None:
    torch.manual_seed(0)
    net, x, keep = make_net("static", unit), pictures(images), routes(unit, kind, images)
    with torch.no_grad():
        masked, fast = net(x, keep), FastNet(net)(x, keep)
    assert close(fast.logits_BK, masked.logits_BK)
    assert torch.equal(fast.trace.keep_BUG, keep)


def test_routes_differ_in_these_tests() -> None:
    for name, unit in PAIRS:
        if name not in ("static", "slimmable"):
            found = make_net(name, unit)(pictures(8)).trace.keep_BUG.flatten(1).unique(dim=0)
            assert len(found) > 1, (name, unit)


@pytest.mark.parametrize("unit", FORMS)
def test_a_grouped_minibatch_costs_what_its_images_cost_alone(unit: str) -> None:
    net, x = make_net("static", unit), pictures(8)
    keep = routes(unit, "random", 8)
    together = count_macs(FastNet(net, packed=False), x, keep)
    assert together == float(net.cost(keep).sum())
    assert together < 8 * net.cost.dense


@pytest.mark.parametrize("unit", FORMS)
def test_the_order_of_images_does_not_matter(unit: str) -> None:
    net, x, keep = make_net("static", unit), pictures(8), routes(unit, "random", 8)
    order = torch.randperm(8)
    fast = FastNet(net)
    one, two = fast(x, keep), fast(x[order], keep[order])
    assert close(two.logits_BK, one.logits_BK[order])
    assert torch.equal(two.macs_B, one.macs_B[order])


def weights_of(net: RoutedNet) -> int:
    return 4 * sum(p.numel() for p in net.backbone.parameters())


@pytest.mark.parametrize("memory", [0.3, 1.0, 2.5, 100.0])
@pytest.mark.parametrize(("backbone", "unit"), [("resnet8", "paths"), ("resnet8", "channels"), ("conv4", "channels")])
def test_memory_stays_within_its_bound(backbone: str, unit: str, memory: float) -> None:
    net, x = make_net("static", unit, parts=4, name=backbone), pictures(32)
    keep = random_routes(net.backbone.specs, 32)
    small, wanted = FastNet(net, memory), net(x, keep).logits_BK
    for _ in range(3):
        assert close(small(x, keep).logits_BK, wanted)
    one = max(small.programs.sizes.values())  # a single pattern is kept even where it alone is too much
    assert small.programs.bytes <= max(memory * weights_of(net), one)


def test_patterns_without_room_run_in_pieces_that_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_net("static", "paths", parts=4), pictures(32)
    keep = random_routes(net.backbone.specs, 32)
    fast = FastNet(net, memory=2.2)
    for _ in range(3):
        fast(x, keep)
    assert len(fast.programs.kept) < sum(len(keep[:, u].unique(dim=0)) for u in range(3))
    assert all(sum(key.own) <= 2 for key in fast.programs.pieces)
    monkeypatch.setattr(cache, "lower", lambda *args: pytest.fail("made again"))
    assert close(fast(x, keep).logits_BK, net(x, keep).logits_BK)


def test_what_is_asked_for_more_often_takes_the_room() -> None:
    net = make_net("static", "paths", parts=4)
    unit = net.backbone.routable[2]
    programs = Programs([unit], 3 * 4 * sum(p.numel() for p in unit.parameters()), packed=False)
    often, seldom = ((True, True, True, False), (False, True, True, True))
    room = programs.limit - programs.set_aside
    for own in (seldom, *[often] * 40):
        programs.of(Key(0, own, None))
    assert programs.sizes[Key(0, often, None)] < room < 2 * programs.sizes[Key(0, often, None)]
    assert list(programs.kept) == [Key(0, often, None)]


@pytest.mark.parametrize("parts", [4, 8])
def test_nested_widths_without_room_are_not_made_again_and_again(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight widths they take 4.5 times the weights, with 3 allowed."""
    net, x = make_net("static", "channels", parts=parts, width=16), pictures(64)
    keep, made = random_routes(net.backbone.specs, 64), []
    fast, wanted, lower = FastNet(net), net(x, keep).logits_BK, cache.lower
    monkeypatch.setattr(cache, "lower", lambda *args: made.append(args) or lower(*args))
    for _ in range(LOOK_AGAIN + 2):
        assert close(fast(x, keep).logits_BK, wanted)
    patterns = sum(len(keep[:, u].unique(dim=0)) for u in range(3))
    assert len(made) <= patterns + 3
    assert fast.programs.bytes <= fast.programs.limit
    assert fast.programs.crowded() == ([] if parts == 4 else ["layer3.0"])


def test_what_was_asked_for_long_ago_counts_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FADE", 50)
    net = make_net("static", "paths", parts=4)
    unit = net.backbone.routable[2]
    programs = Programs([unit], 3 * 4 * sum(p.numel() for p in unit.parameters()), packed=False)
    before, now = Key(0, (True, True, True, False), None), Key(0, (False, True, True, True), None)
    for _ in range(200):
        programs.of(before)
    assert list(programs.kept) == [before]
    for _ in range(200):
        programs.of(now)
    assert list(programs.kept) == [now]
    for _ in range(500):
        programs.of(now)
    assert set(programs.asked) == set(programs.sizes) == {now}


def test_modules_are_made_once_and_a_pattern_without_room_takes_none() -> None:
    net, x = make_net("static", "channels", parts=4), pictures(1)
    whole = FastNet(net)
    whole(x, net.dense_routes(1))
    made = dict(whole.programs.kept)
    whole(x, net.dense_routes(1))
    assert all(whole.programs.kept[key] is program for key, program in made.items())
    tight = FastNet(net, memory=1.1)
    narrow = net.dense_routes(1).clone()
    narrow[:, 2, 3] = 0
    for keep in (net.dense_routes(1), net.dense_routes(1), narrow):
        assert close(tight(x, keep).logits_BK, net(x, keep).logits_BK)
    assert [sum(key.own) for key in tight.programs.kept if key.unit == 2] == [4]


@pytest.mark.parametrize("unit", BLOCK_FORMS)
@pytest.mark.parametrize("images", [2, 8])
def test_channels_last_is_kept(unit: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = make_net("static", unit), []
    original = Conv.__call__

    def watched(self: Conv, x: Tensor) -> Tensor:
        out = original(self, x)
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (x, out))
        return out

    monkeypatch.setattr(Conv, "__call__", watched)
    FastNet(net)(pictures(images), routes(unit, "random", images))
    assert len(seen) >= 6
    assert all(seen)


@pytest.mark.parametrize("form", [VIEWS, SORTED, MASKED])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_every_form_of_a_unit_gives_the_same(name: str, unit: str, form: str) -> None:
    net, x = make_net(name, unit), pictures(8)
    fast = FastNet(net)
    fast.forms[8] = [form] * len(net.backbone.routable)
    with torch.no_grad():
        wanted, got = net(x), fast(x)
    assert close(got.logits_BK, wanted.logits_BK)
    assert torch.equal(got.trace.keep_BUG, wanted.trace.keep_BUG)
    assert torch.equal(got.macs_B, wanted.macs_B)


def test_a_warm_up_measures_every_form_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_net("dmnn", "paths"), pictures(8)
    fast = FastNet(net)
    seconds = {
        (u, form): float(form != wanted) for u, wanted in enumerate((MASKED, VIEWS, SORTED)) for form in FORM_NAMES
    }
    monkeypatch.setattr(FastNet, "_timed", lambda self, u, x, keys, routes, form, repeats: seconds[u, form])
    assert fast.warm_up(x) == [net.backbone.specs[0].name]
    assert fast.forms == {8: [MASKED, VIEWS, SORTED]}
    assert close(fast(x).logits_BK, net(x).logits_BK)


def test_forms_hold_for_sizes_nearby() -> None:
    forms = {1: ["a"], 8: ["b"], 64: ["c"]}
    near = {1: "a", 2: "a", 3: None, 4: "b", 8: "b", 16: "b", 17: None, 32: "c", 128: "c", 129: None}
    assert {images: (forms_for(forms, images) or [None])[0] for images in near} == near
    assert forms_for({}, 1) is None


def test_forms_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "forms.json"
    assert load_forms(file, "c", "here", 2) == {}
    save_forms(file, "c", "here", {8: [VIEWS, MASKED]})
    save_forms(file, "c", "here", {1: [VIEWS, SORTED]})
    assert load_forms(file, "c", "here", 2) == {1: [VIEWS, SORTED], 8: [VIEWS, MASKED]}
    assert load_forms(file, "other", "here", 2) == load_forms(file, "c", "elsewhere", 2) == {}
    with pytest.raises(InputError, match="of other units; delete it"):
        load_forms(file, "c", "here", 3)
    save_forms(file, "other", "here", {2: [VIEWS, VIEWS]})
    assert load_forms(file, "other", "here", 2) == {2: [VIEWS, VIEWS]}
    assert load_forms(file, "c", "here", 2) == {}, "those of another checkpoint have gone"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "checkpoint": "c", "place": "here", "forms": {"8": ["x"]}}']
)
def test_a_broken_file_of_forms_is_said_and_can_be_written_anew(content: str, tmp_path: Path) -> None:
    file = tmp_path / "forms.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"forms.json is not a table of forms .*; delete it"):
        load_forms(file, "c", "here", 1)
    save_forms(file, "c", "here", {8: [VIEWS]})
    assert load_forms(file, "c", "here", 1) == {8: [VIEWS]}


@pytest.mark.parametrize("images", [2, 5, 8])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_threads_change_nothing(name: str, unit: str, images: int) -> None:
    net, x = make_net(name, unit), pictures(images)
    before = torch.get_num_threads()
    one, two = FastNet(net)(x), FastNet(net, threads=2)(x)
    assert torch.get_num_threads() == before
    assert close(two.logits_BK, one.logits_BK)
    assert torch.equal(two.trace.keep_BUG, one.trace.keep_BUG)
    assert torch.equal(two.macs_B, one.macs_B)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("name", "unit"), [pair for pair in PAIRS if pair[1] != "cascade"])
def test_pieces_of_a_minibatch_change_nothing(
    name: str, unit: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = make_net(name, unit), pictures(9)
    keep_BUG = FastNet(net)(x).trace.keep_BUG.flip(0)
    whole, given = FastNet(net)(x), FastNet(net)(x, keep_BUG)
    largest = 4 * max(unit.place.out_channels * unit.place.out_size**2 for unit in net.backbone.routable)
    monkeypatch.setattr(executor, "CACHED", 3 * largest)
    fast, seen = FastNet(net, threads=threads), []
    together = fast._together
    monkeypatch.setattr(fast, "_together", lambda x, keep: seen.append(len(x)) or together(x, keep))
    for out, wanted in ((fast(x), whole), (fast(x, keep_BUG), given)):
        assert close(out.logits_BK, wanted.logits_BK)
        assert torch.equal(out.trace.keep_BUG, wanted.trace.keep_BUG)
        assert torch.equal(out.macs_B, wanted.macs_B)
    assert sorted(seen) == sorted({1: [3, 3, 3], 2: [3, 2, 2, 2]}[threads] * 2)  # of 9, or of 5 and 4, in equal pieces
    fast.warm_up(x)
    assert set(fast.forms) <= {3}


def test_a_chain_goes_through_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "CACHED", 1)
    assert FastNet(make_net("rnp", "channels", name="conv4")).piece(9) == 9


def test_the_images_given_are_left_as_they_were() -> None:
    for name, unit in PAIRS:
        net, x = make_net(name, unit), pictures(4).contiguous(memory_format=torch.channels_last)
        before = x.clone()
        FastNet(net)(x)
        assert torch.equal(x, before), (name, unit)


@pytest.mark.skipif(not packed_works(), reason="this PyTorch has no packed oneDNN convolutions")
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(("name", "unit"), PAIRS)
def test_packed_convolutions_give_the_same(name: str, unit: str, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_PACKING", 0)
    net, x = make_net(name, unit), pictures(images)
    packed, plain = FastNet(net)(x), FastNet(net, packed=False)(x)
    assert close(packed.logits_BK, plain.logits_BK)
    assert close(packed.logits_BK, net(x).logits_BK)


def test_without_packed_convolutions_plain_ones_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_run", lambda *args: (_ for _ in ()).throw(NotImplementedError("not here")))
    kernels.packed_works.cache_clear()
    try:
        assert not kernels.packed_works()
        net, x = make_net("dmnn", "paths"), pictures(4)
        assert close(FastNet(net)(x).logits_BK, net(x).logits_BK)
    finally:
        kernels.packed_works.cache_clear()


def test_a_fast_net_leaves_the_net_alone_and_a_changed_net_gives_another() -> None:
    net, x = make_net("static", "paths", shortcut="B"), pictures(4)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    fast = FastNet(net)
    before = fast(x).logits_BK
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    shake(net.backbone)
    assert not close(FastNet(net)(x).logits_BK, before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_leaves_no_batch_norm_after_a_convolution(bias: bool, affine: bool) -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1, bias=bias),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU6(),
        nn.Sequential(nn.BatchNorm2d(4)),
    ).eval()
    shake(layers)
    x = torch.randn(2, 3, 8, 8)
    program = straight(layers, packed=False)
    assert [type(step) for step in program.steps] == [Conv, nn.BatchNorm2d]
    assert torch.allclose(program(x), layers(x), atol=1e-5)


@pytest.mark.parametrize("memory", [2.6, 50.0])
@pytest.mark.parametrize(("read", "call"), [(1e30, 10.0), (1e30, 0.0), (1.0, 0.0), (kernels.READ, kernels.CALL)])
@pytest.mark.parametrize("name", ["conv4", "conv4_bn"])
def test_every_way_through_a_chain_gives_the_same(
    name: str, read: float, call: float, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that cost nothing to read keep images apart, those that cost much bring them together in blocks."""
    for module in (chain, unit_room, cache):
        monkeypatch.setattr(module, "CALL", call)
        monkeypatch.setattr(module, "READ", read)
    net, x = make_net("rnp", "channels", name=name, parts=4), pictures(16)
    keep = random_routes(net.backbone.specs, 16)
    fast, wanted = FastNet(net, memory), net(x, keep)
    for _ in range(2):
        assert close(fast(x, keep).logits_BK, wanted.logits_BK)
    assert close(fast(x).logits_BK, net(x).logits_BK)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("wide", [1, 2, blocks.WIDE])
def test_a_layer_in_blocks_is_the_masked_layer(wide: int, pool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of unequal width, blocks within parts, all pairs of what is read and kept at once, in any order."""
    monkeypatch.setattr(blocks, "WIDE", wide)
    unit = ConvUnit("unit", 7, [2, 2, 1, 3], 6, reads=0, sizes_in=[3, 2, 2], pool=pool).eval()
    read, kept = zip(*random.Random(0).sample(list(itertools.product(range(1, 4), range(1, 5))), 12), strict=True)
    x = torch.randn(12, 7, 6, 6).contiguous(memory_format=torch.channels_last)
    keep, above = (torch.stack([(torch.arange(n) < k).float() for k in counts]) for n, counts in ((4, kept), (3, read)))
    hidden = x * channel_mask(above, unit.sizes_in)
    layer = Blocks(unit, packed=True)
    with torch.inference_mode():
        assert torch.allclose(layer(x, kept, read), unit(hidden, keep, above), atol=1e-5), (
            "what is not read may be anything"
        )
        for k, r, one in zip(kept, read, x.split(1), strict=True):
            width = sum(unit.sizes[:k])
            wanted = unit(one * channel_mask(above[read.index(r)][None], unit.sizes_in), keep[kept.index(k)][None])
            assert torch.allclose(layer.alike(one, k, r), wanted[:, :width], atol=1e-5)
    assert layer.bytes == 4 * unit.conv.weight.numel()
    assert max(t.channels.stop - t.channels.start for t in (*layer.outputs, *layer.inputs)) == min(wide, 3)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("read", "expected"), [(1e30, 0), (1.0, 2)])
def test_minibatches_go_through_blocks_where_weights_are_slow_to_read(
    read: float, expected: int, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "READ", read)
    monkeypatch.setattr(chain, "CACHE", 0)
    monkeypatch.setattr(chain, "SMALL", 8)
    net, x, ran = make_net("rnp", "channels", name="conv4", parts=4), pictures(16), []
    keep = net.dense_routes(16) if alike else random_routes(net.backbone.specs, 16)
    run = Blocks.__call__
    monkeypatch.setattr(Blocks, "__call__", lambda *args: ran.append(args) or run(*args))
    fast = FastNet(net)
    for images in (16, 1):
        ran.clear()
        assert close(fast(x[:images], keep[:images]).logits_BK, net(x[:images], keep[:images]).logits_BK)
        assert len(ran) == (expected if images > 1 else 0)


@pytest.mark.parametrize(("wide", "calls"), [(1, 64), (blocks.WIDE, 4)])
def test_a_pattern_without_room_takes_the_fewer_calls_or_the_fewer_weights(
    wide: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where parts are cut further, each pair of cuts is a call."""
    monkeypatch.setattr(blocks, "WIDE", wide)
    unit = make_net("static", "channels", name="conv4", parts=4).backbone.routable[2]
    size = 4 * sum(p.numel() for p in unit.parameters())
    run, ran = Blocks.__call__, []
    monkeypatch.setattr(Blocks, "__call__", lambda *args: ran.append(args) or run(*args))
    half = (True, True, False, False)
    for call, expected in (
        (0.99, 1),
        (1.01, 0),
    ):  # times what all calls but one may cost: the weights that are not read
        monkeypatch.setattr(cache, "CALL", call * 0.75 * size * (1 / cache.READ + 64 / 4 / cache.RATE) / (calls - 1))
        programs, narrow = Programs([unit, unit, unit], 2 * 3 * size, packed=False), unit.narrow(half, half)
        (program,) = programs.of(Key(2, half, half))
        assert program.body.bytes == 0, "no room for a program of its own"
        x = torch.randn(2, unit.spec.in_channels, 8, 8)
        ran.clear()
        assert close(program.body(x[:, program.inputs]), narrow.layers(x[:, program.inputs]))
        assert len(ran) == expected


def test_a_static_chain_has_room_for_its_one_pattern() -> None:
    body, x = make_net("static", "channels", name="vgg16_cifar", parts=4, size=32).backbone, pictures(2, size=32)
    fast = FastNet(RoutedNet(body, make_router("static", body.specs, width=0.5)))
    fast(x[:1])
    assert not fast.programs.instead and fast.programs.kept


def test_blocks_are_for_processors() -> None:
    net = make_net("rnp", "channels", name="vgg16_cifar", parts=4, size=32, width=64)
    fast, keys = FastNet(net), [Key(11, (True,) * n + (False,) * (4 - n), (True,) * 4) for n in (1, 2, 3, 4)] * 8
    for device, expected in (("cpu", True), ("meta", False)):
        maps = torch.empty(32, 512, 2, 2, device=device)
        assert fast.layers[11]._blocks_pay([chain.Slab(list(range(32)), maps, (True,) * 4)], keys) is expected


@pytest.mark.parametrize(("name", "unit"), [("rnr", "channels"), ("dmnn", "paths")])
def test_threads_keep_their_prices_apart(name: str, unit: str) -> None:
    """Two prices for one minibatch: a thread that decides at one must not be given the other's."""
    net, x = make_net(name, unit), pictures(64)
    net.router.setting = Setting(-50.0, 50.0, 0.5)
    fast, wanted = FastNet(net, threads=2), net(x).trace.keep_BUG
    assert len(wanted.flatten(1).unique(dim=0)) > 1
    for _ in range(20):
        assert torch.equal(fast(x).trace.keep_BUG, wanted)


def test_a_thread_started_later_computes_with_as_many_cores_as_before() -> None:
    """Torch gives a new thread what some thread has set last: the workers must all have set theirs before."""
    net, x = make_net("static", "channels"), pictures(4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        FastNet(net, threads=4)(x, net.dense_routes(4))
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("backbone", "unit"), [("resnet8", "paths"), ("resnet8", "channels"), ("conv4_bn", "channels")]
)
def test_a_net_that_decides_nothing_looks_nothing_up(backbone: str, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_net("static", unit, name=backbone, parts=4), pictures(5)
    fast = FastNet(net)
    for price in (0.0, 0.5):
        net.router.price = price
        wanted = net(x)
        for images in (1, 5):
            out = fast(x[:images])
            assert close(out.logits_BK, wanted.logits_BK[:images])
            assert torch.equal(out.trace.keep_BUG, wanted.trace.keep_BUG[:images])
            assert torch.equal(out.macs_B, wanted.macs_B[:images])
    monkeypatch.setattr(Programs, "of", lambda *args: pytest.fail("looked up"))
    assert close(fast(x).logits_BK, wanted.logits_BK)
    assert fast.warm_up(x) == []


def test_gathering_never_overwrites_what_it_reads() -> None:
    scratch, x = Scratch(), pictures(6).contiguous(memory_format=torch.channels_last)
    mine = wanted = x
    for index in ([5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4], [2, 0, 1, 5, 3, 4]):
        mine, wanted = scratch.gathered(mine, index), gathered(wanted, index)
        assert torch.equal(mine, wanted) and mine.is_contiguous(memory_format=torch.channels_last)
    small = scratch.gathered(mine[:2, :1], [1, 0])
    assert torch.equal(small, mine[[1, 0], :1]) and torch.equal(mine, wanted)
    assert len(scratch.stretches) == 2


def test_making_programs_draws_no_random_numbers() -> None:
    for name, unit in PAIRS:
        net, x = make_net(name, unit), pictures(4)
        before = torch.get_rng_state()
        FastNet(net)(x)
        assert torch.equal(torch.get_rng_state(), before), (name, unit)


def test_a_net_put_into_training_meanwhile_is_run_in_eval() -> None:
    net, x = make_net("static", "channels"), pictures(8)
    fast, keep = FastNet(net), random_routes(net.backbone.specs, 8)
    fast.forms = {8: [MASKED] * 3}
    wanted, state = fast(x, keep).logits_BK, {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    assert torch.equal(fast(x, keep).logits_BK, wanted)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("seed", range(3))
def test_the_router_of_a_chain_sees_the_images_as_they_came(seed: int) -> None:
    """Slabs that were parted and joined again hold them in another order, one slab of all of them too."""
    net, x = make_net("rnp", "channels", name="vgg16_cifar", **form_of("vgg16_cifar")), pictures(7, seed, 32)
    wanted = net(x)
    out = FastNet(net)(x)
    assert torch.equal(out.trace.keep_BUG.bool(), wanted.trace.keep_BUG.bool())
    assert close(out.logits_BK, wanted.logits_BK)


NETS: dict[tuple[str, str, str], RoutedNet] = {}
BODIES = [("resnet8", pair) for pair in PAIRS] + [
    ("conv4", ("rnp", "channels")),
    ("conv4_bn", ("rnr", "channels")),
    ("mobilenet_v2", ("dmnn", "paths")),
    ("mobilenet_v2", ("rnr", "channels")),
    ("resnet50", ("dmnn", "paths")),
    ("resnet50", ("rnr", "channels")),
    ("resnet50", ("rnr", "choice")),
    ("vgg16_cifar", ("rnp", "channels")),
]


def form_of(name: str) -> dict[str, int]:
    """What a body is built with besides its name: MobileNetV2 comes in one width, and five times a map is halved."""
    own = {"mobilenet_v2": {"size": 32, "width": 0}, "resnet50": {"size": 32}, "vgg16_cifar": {"size": 32}}
    return own.get(name, {})


@settings(max_examples=60, deadline=None)
@given(
    body=st.sampled_from(BODIES),
    images=st.sampled_from([1, 2, 7, 32]),
    kind=st.sampled_from(["router", "random", "on", "off"]),
    run=st.fixed_dictionaries(
        {"memory": st.sampled_from([0.3, 1.5, 3.0]), "threads": st.sampled_from([1, 2]), "packed": st.booleans()}
    ),
    form=st.sampled_from([None, VIEWS, SORTED, MASKED]),
    seed=st.integers(0, 5),
)
def test_whatever_the_net_and_its_routes_the_fast_run_is_the_masked_run(
    body: tuple[str, tuple[str, str]], images: int, kind: str, run: dict[str, Any], form: str | None, seed: int
) -> None:
    name, (router, unit) = body
    if (name, router, unit) not in NETS:
        NETS[name, router, unit] = make_net(router, unit, name=name, **form_of(name))
    net = NETS[name, router, unit]
    x = pictures(images, seed, form_of(name).get("size", 16))
    torch.manual_seed(seed)
    keep = {
        "router": lambda: None,
        "random": lambda: random_routes(net.backbone.specs, images),
        "on": lambda: net.dense_routes(images),
        "off": lambda: stacked([legal(torch.zeros(images, s.parts), s) for s in net.backbone.specs]),
    }[kind]()
    fast, units = FastNet(net, **run), len(net.backbone.specs)
    fast.forms = {} if form is None or fast.chain else {-(-images // run["threads"]): [form] * units}
    wanted = net(x, keep)
    for _ in range(2):
        out = fast(x, keep)
        assert close(out.logits_BK, wanted.logits_BK)
        assert torch.equal(out.trace.keep_BUG.bool(), wanted.trace.keep_BUG.bool())
        assert torch.equal(out.macs_B, wanted.macs_B)


def crowded(asked: list[tuple[str, int]]) -> tuple[Programs, list[str]]:
    """Programs with room for two patterns of two parts of four, or one of three, and what is kept after so many askings."""
    unit = make_net("static", "paths", parts=4).backbone.routable[2]
    programs = Programs([unit], 3 * 4 * sum(p.numel() for p in unit.parameters()), packed=False)
    for own, times in asked:
        for _ in range(times):
            programs.of(Key(0, tuple(bit == "1" for bit in own), None))
    assert programs.used == sum(programs.sizes[key] for key in programs.kept) <= programs.limit - programs.set_aside
    assert not programs.instead.keys() & programs.kept.keys()
    return programs, sorted("".join(str(int(on)) for on in key.own) for key in programs.kept)


def test_a_pattern_takes_the_place_of_the_least_asked_for_where_it_is_clearly_asked_for_more() -> None:
    both = ["0101", "1010"]
    assert crowded([("1010", 100), ("0101", 1), ("1001", LOOK_AGAIN + 1)])[1] == ["1001", "1010"]
    assert crowded([("1010", 16), ("0101", 16), ("1001", LOOK_AGAIN + 1)])[1] == both, "not for hardly more"
    assert crowded([("1010", 16), ("0101", 17), ("1001", 2 * LOOK_AGAIN + 1)])[1] == ["0101", "1001"]
    assert crowded([("1010", 20), ("0101", 20), ("1110", 2 * LOOK_AGAIN + 1)])[1] == both, "by its bytes it is less"
    assert crowded([("1010", 20), ("0101", 20), ("1110", 3 * LOOK_AGAIN + 1)])[1] == ["1110"]


def test_a_pattern_that_is_kept_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FADE", 20)
    assert crowded([("1010", 1), ("0101", 40), ("1001", 40)])[1] == ["0101", "1001"]


def test_what_ran_in_pieces_is_forgotten_and_crowds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FADE", 50)
    asked = [("1010", 40), ("0101", 40), ("1001", 1)]
    assert "1001" in ["".join(str(int(on)) for on in key.own) for key in crowded(asked)[0].instead]
    assert crowded(asked)[0].crowded() == []
    programs = crowded([*asked, ("1010", 200)])[0]
    assert programs.instead.keys() <= programs.asked.keys()


@pytest.mark.parametrize("memory", [1.5, 3.0, 4.0, 5.0, 6.0])
def test_a_chain_whose_every_pattern_is_asked_for_stays_within_its_memory(memory: float) -> None:
    units = make_net("static", "channels", name="conv4", parts=4).backbone.routable
    programs = Programs(
        units, memory * sum(4 * sum(p.numel() for p in unit.parameters()) for unit in units), packed=False
    )
    widths = [tuple(g < kept for g in range(4)) for kept in range(1, 5)]
    for _ in range(2 * LOOK_AGAIN):
        for u, unit in enumerate(units):
            for own, above in itertools.product(widths, widths if unit.reads is not None else [None]):
                programs.of(Key(u, own, above))
    assert programs.bytes <= programs.limit


def test_a_net_that_decides_nothing_follows_its_limit() -> None:
    net, x = make_net("static", "channels", parts=4), pictures(3)
    fast, (low, high) = FastNet(net), net.span()
    for share in (None, 0.5 * (low + high), None, low):
        net.set_limit(share)
        assert torch.equal(fast(x).trace.keep_BUG, net(x).trace.keep_BUG)
    assert not torch.equal(net(x).trace.keep_BUG, net.dense_routes(3))


def test_memory_for_gathering_grows_with_the_minibatch() -> None:
    scratch, x = Scratch(), pictures(6).contiguous(memory_format=torch.channels_last)
    for index in ([1, 0], [3, 2, 1, 0], [5, 4, 3, 2, 1, 0], [0, 1]):
        assert torch.equal(scratch.gathered(x, index), x[index])
