"""The data room: splits, minibatches, the drawn shapes, and what each reader says of a bad file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynroute.contracts import InputError
from dynroute.data import DATASETS, DataOptions, Dataset, DataSpec, FileSplit, Split, load, loader
from dynroute.data import cifar as cifar_room
from dynroute.data import folders as folder_room
from dynroute.data.arrays import resized
from dynroute.data.batches import augment, mixed_seed
from dynroute.data.drawing import SUPERCLASS_OF, draw
from dynroute.data.files import read_image
from dynroute.data.folders import pictures
from dynroute.data.spec import cut, fair_order, limited

GRAY_SPEC = DataSpec("tiny", 8, 2, ("a", "b"), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def tiny_split(count: int = 20, size: int = 8) -> Split:
    images = torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(1))
    return Split(images.to(torch.uint8), torch.arange(count) % 2)


def same(a: Split | FileSplit, b: Split | FileSplit) -> bool:
    assert isinstance(a, Split)
    assert isinstance(b, Split)
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return load(DataOptions(train_images=1000, test_images=1000))


def test_shapes_are_bit_identical_for_a_seed_and_differ_between_seeds(shapes: Dataset) -> None:
    options = DataOptions(train_images=1000, test_images=1000)
    again, other = load(options), load(options, seed=1)
    assert same(shapes.train, again.train)
    assert same(shapes.test, again.test)
    assert not same(shapes.train, other.train)


def test_a_longer_shapes_split_begins_like_a_shorter_one() -> None:
    assert torch.equal(draw(700, 16, (0, 0)).images[:40], draw(40, 16, (0, 0)).images)


def test_shapes_are_balanced_with_a_superclass_for_each_class(shapes: Dataset) -> None:
    for split, each in ((shapes.train, 45), (shapes.calibration, 5), (shapes.test, 50)):
        assert torch.bincount(split.labels).tolist() == [each] * 20
        assert split.superclasses is not None
        assert torch.equal(split.superclasses, torch.tensor(SUPERCLASS_OF)[split.labels])
    assert shapes.spec.superclass_of == tuple(k // 4 for k in range(20))
    assert len(set(shapes.spec.class_names)) == shapes.spec.classes == 20
    assert len(shapes.spec.superclass_names) == shapes.spec.superclasses == 5


def test_shapes_train_and_test_share_no_image(shapes: Dataset) -> None:
    assert isinstance(shapes.train, Split)
    assert isinstance(shapes.test, Split)
    train = {image.numpy().tobytes() for image in shapes.train.images}
    assert len(train) == 900
    assert not train & {image.numpy().tobytes() for image in shapes.test.images}


def test_difficulty_lowers_the_contrast_and_raises_the_noise() -> None:
    split = draw(4000, 32, (0, 0))
    assert split.difficulty is not None
    images = split.images[split.labels == 0].float() / 255  # discs: large and filled
    fifth = (split.difficulty[split.labels == 0] * 5).long()
    smooth = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), 3, 1).flatten(2)  # most noise averaged out
    background = smooth.median(dim=2, keepdim=True).values
    contrast = (smooth - background).abs().amax(dim=1).quantile(0.9, dim=1)
    corner = images[:, :4, :4]  # nearly always background: what varies there is noise
    noise = (corner - corner.mean(dim=(1, 2), keepdim=True)).std(dim=(1, 2, 3))
    assert contrast[fifth == 4].median() < 0.7 * contrast[fifth == 0].median()
    assert (torch.stack([noise[fifth == k].median() for k in range(5)]).diff() > 0.01).all()


def test_difficulty_is_uniform_and_independent_of_the_class() -> None:
    split = draw(4000, 8, (0, 0))
    assert split.difficulty is not None
    assert torch.histc(split.difficulty, 4, 0, 1).min() > 900
    means = torch.stack([split.difficulty[split.labels == k].mean() for k in range(20)])
    assert (means - 0.5).abs().max() < 0.1


def test_easy_shapes_show_their_outline() -> None:
    """Drawn pixels against geometry: the area of a filled square is well above that of its ring."""
    split = draw(4000, 32, (3, 0))
    assert split.difficulty is not None
    images = split.images.float()
    background = images.flatten(1, 2).median(dim=1).values[:, None, None]
    share = ((images - background).abs().amax(dim=3) > 60).float().mean(dim=(1, 2))
    easy = split.difficulty < 0.1
    names = load(DataOptions(train_images=40, test_images=20)).spec.class_names
    area = {name: share[easy & (split.labels == k)].mean().item() for k, name in enumerate(names)}
    for full, part in (("square", "square_ring"), ("triangle", "triangle_ring"), ("disc", "crescent")):
        assert area[full] > 1.15 * area[part] > 0.02
    assert min(area.values()) > 0.02


# --- the calibration cut and the limits ---------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.integers(1, 80))
def test_every_prefix_of_the_fair_order_is_stratified(classes: list[int], length: int) -> None:
    labels = torch.tensor(classes)
    order = fair_order(labels)
    assert sorted(order.tolist()) == list(range(len(classes)))
    prefix = labels[order[:length]]
    for k in range(5):
        expected = (labels == k).sum() * len(prefix) / len(labels)
        assert abs((prefix == k).sum() - expected) <= 2.5


def test_the_calibration_cut_is_disjoint_stratified_and_fixed() -> None:
    split = Split(torch.zeros(1000, 1, 1, 3, dtype=torch.uint8), torch.arange(1000) % 10)
    split.difficulty = torch.arange(1000.0)  # marks the rows
    rest, calibration = cut(split, 0.1)
    assert torch.bincount(calibration.labels).tolist() == [10] * 10
    assert rest.difficulty is not None
    assert calibration.difficulty is not None
    assert sorted([*rest.difficulty.tolist(), *calibration.difficulty.tolist()]) == list(range(1000))
    torch.manual_seed(99)  # the training's seed must not matter
    np.random.seed(99)  # noqa: NPY002
    again = cut(split, 0.1)[1]
    assert again.difficulty is not None
    assert torch.equal(calibration.difficulty, again.difficulty)
    assert calibration.difficulty.tolist() != list(range(100))


def test_a_cut_leaves_both_sides_something() -> None:
    assert [len(part) for part in cut(tiny_split(2), 0.01)] == [1, 1]
    assert [len(part) for part in cut(tiny_split(3), 0.99)] == [1, 2]
    with pytest.raises(InputError, match="at least 2"):
        cut(tiny_split(1), 0.1)


def test_a_limit_takes_all_classes_even_of_sorted_data() -> None:
    split = Split(torch.zeros(100, 1, 1, 3, dtype=torch.uint8), torch.arange(100) // 10)
    assert torch.bincount(limited(split, 20).labels).tolist() == [2] * 10
    assert limited(split, 0) is split
    assert limited(split, 1000) is split


# --- minibatches --------------------------------------------------------------------------------------------


def epoch_of(split: Split | FileSplit, spec: DataSpec, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader(split, spec, 8, **{"train": True, **options}))
    return torch.cat([b.images for b in batches]), torch.cat([b.index for b in batches])


def test_a_training_epoch_depends_on_seed_and_epoch_alone() -> None:
    split = tiny_split()
    images, index = epoch_of(split, GRAY_SPEC, seed=3, epoch=5)
    torch.manual_seed(0)
    torch.rand(7)
    again_images, again_index = epoch_of(split, GRAY_SPEC, seed=3, epoch=5)
    assert torch.equal(images, again_images)
    assert torch.equal(index, again_index)
    for other in ({"seed": 3, "epoch": 6}, {"seed": 4, "epoch": 5}, {"seed": 5, "epoch": 3}):
        assert not torch.equal(index, epoch_of(split, GRAY_SPEC, **other)[1])
    assert sorted(index.tolist()) == list(range(20))
    assert len({mixed_seed(s, e) for s in range(30) for e in range(30)}) == 900


def test_iterating_a_loader_twice_gives_the_same_batches_and_leaves_the_global_generator_alone() -> None:
    batches = loader(tiny_split(), GRAY_SPEC, 8, train=True)
    state = torch.get_rng_state()
    first, second = list(batches), list(batches)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_is_in_order_complete_and_normalised_by_hand() -> None:
    split = tiny_split(21)
    spec = DataSpec("tiny", 8, 2, ("a", "b"))
    batches = list(loader(split, spec, 8, train=False))
    assert [len(b.labels) for b in batches] == [8, 8, 5]
    images = torch.cat([b.images for b in batches])
    assert images.shape == (21, 3, 8, 8)
    assert images.dtype == torch.float32
    by_hand = (split.images.numpy() / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), by_hand, atol=1e-5)
    assert torch.cat([b.index for b in batches]).tolist() == list(range(21))
    assert torch.equal(torch.cat([b.labels for b in batches]), split.labels)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert batches[0].superclasses is None


@pytest.mark.parametrize(
    ("count", "train", "sizes"), [(17, True, [8, 8]), (18, True, [8, 8, 2]), (17, False, [8, 8, 1])]
)
def test_only_a_last_training_batch_of_one_is_dropped(count: int, train: bool, sizes: list[int]) -> None:
    batches = loader(tiny_split(count), GRAY_SPEC, 8, train=train)
    assert [len(b.labels) for b in batches] == sizes
    assert len(batches) == len(sizes)


def test_labels_superclasses_and_index_stay_with_their_images() -> None:
    split = Split(torch.arange(40).repeat_interleave(192).reshape(40, 8, 8, 3).to(torch.uint8), torch.arange(40) % 2)
    split.superclasses = torch.arange(40)
    spec = DataSpec("tiny", 8, 2, ("a", "b"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for batch in loader(split, spec, 16, train=True):
        assert batch.superclasses is not None
        assert torch.equal(batch.superclasses, batch.index)
        assert torch.equal(batch.labels, batch.index % 2)
        middle = (batch.images[:, 0, 4, 4] * 255).round().long()  # inside every crop: padding is one pixel
        assert torch.equal(middle, batch.index)


def test_augmentation_crops_within_the_padding_and_mirrors_half() -> None:
    size, padding, count = 16, 2, 400
    image = torch.randint(1, 256, (size, size, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    out = augment(image.expand(count, -1, -1, -1), padding, True, torch.Generator().manual_seed(0))
    seen = {}
    padded = torch.zeros(size + 2 * padding, size + 2 * padding, 3, dtype=torch.uint8)
    for mirrored in (False, True):
        padded[padding:-padding, padding:-padding] = image.flip(1) if mirrored else image
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                crop = padded[top : top + size, left : left + size]
                seen[mirrored, top, left] = int((out == crop).flatten(1).all(dim=1).sum())
    assert sum(seen.values()) == count  # every result is one of the 50 possible ones
    assert min(seen.values()) > 0  # and each of these occurs
    assert 150 < sum(n for (mirrored, *_), n in seen.items() if mirrored) < 250


def test_augmentation_draws_anew_for_each_image_and_obeys_the_spec() -> None:
    image = torch.arange(8, dtype=torch.uint8).repeat(8, 1)[..., None].expand(8, 8, 3)
    split = Split(image.expand(64, 8, 8, 3), torch.zeros(64, dtype=torch.int64))
    plain = DataSpec("tiny", 8, 2, ("a", "b"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    distinct = {
        (flip, on): len(
            torch.unique(epoch_of(split, DataSpec(**{**vars(plain), "flip": flip, "augment": on}))[0], dim=0)
        )
        for flip in (False, True)
        for on in (False, True)
    }
    assert distinct == {(False, False): 1, (True, False): 1, (False, True): 9, (True, True): 18}


def test_no_augment_option_reaches_the_loader() -> None:
    data = load(DataOptions(train_images=40, test_images=20, augment=False))
    assert isinstance(data.train, Split)
    images, index = epoch_of(data.train, data.spec)
    plain = torch.cat([b.images for b in loader(data.train, data.spec, 8, train=False)])
    assert torch.equal(images, plain[index])


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(InputError, match="batch size"):
        loader(tiny_split(), GRAY_SPEC, 0, train=True)


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "cifar01"}, "did you mean 'cifar10'"),
        ({"calibration": 1.5}, "data.calibration must lie between 0 and 1, not 1.5"),
        ({"calibration": 0.0}, "data.calibration must lie between 0 and 1"),
        ({"train_images": -1}, "data.train_images must lie between 0 and 100000000, not -1"),
        ({"test_images": -5}, "data.test_images must lie between 0"),
        ({"workers": -1}, "data.workers must lie between 0 and 1024"),
        ({"image_size": 100_000}, "data.image_size must lie between 0 and 4096"),
        ({"path": "cifar10.npz"}, "data.path is for data that are read; data.name=shapes are drawn"),
        ({"image_size": 3}, "data.image_size must be 0"),
        ({"name": "npz"}, "needs data.path"),
        ({"name": "folder"}, "needs data.path"),
        ({"name": "imagenet"}, "data.name=imagenet needs data.path"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        load(DataOptions(**options))
    assert says in message(error)


def test_the_rows_are_the_promised_ones() -> None:
    assert set(DATASETS) == {"shapes", "cifar10", "cifar100", "imagenet", "folder", "npz"}


# --- npz ----------------------------------------------------------------------------------------------------


def arrays(train: int = 40, test: int = 12, shape: tuple[int, ...] = (10, 10, 3), classes: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for name, count in (("train", train), ("test", test)):
        made[f"{name}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{name}_labels"] = np.arange(count) % classes
    return made


def npz_file(folder: Path, **changes: Any) -> Path:
    """An .npz file of `arrays()` with some of them replaced, or left out where None."""
    path = folder / "data.npz"
    np.savez(path, **{k: v for k, v in {**arrays(), **changes}.items() if v is not None})
    return path


def load_npz(path: Path, **options: Any) -> Dataset:
    return load(DataOptions(name="npz", path=str(path), **options))


def test_npz_rgb(tmp_path: Path) -> None:
    data = load_npz(npz_file(tmp_path), calibration=0.2)
    assert (data.spec.image_size, data.spec.classes, data.spec.channels) == (10, 4, 3)
    assert [len(data.train), len(data.calibration), len(data.test)] == [32, 8, 12]
    assert isinstance(data.test, Split)
    np.testing.assert_array_equal(data.test.images.numpy(), arrays()["test_images"])
    assert data.spec.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 1)])
def test_npz_gray_is_repeated(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = arrays(shape=shape)
    made["train_labels"] = made["train_labels"][:, None].astype(np.uint8)  # MedMNIST's form
    data = load_npz(npz_file(tmp_path, **made))
    assert isinstance(data.test, Split)
    assert data.test.images.shape == (12, 10, 10, 3)
    for channel in range(3):
        np.testing.assert_array_equal(data.test.images[..., channel].numpy().reshape(12, *shape), made["test_images"])
    assert data.train.labels.shape == (36,)
    images, _ = epoch_of(data.train, data.spec)
    assert images.shape == (36, 3, 10, 10)


def test_npz_val_is_the_calibration_split_and_train_stays_whole(tmp_path: Path) -> None:
    made = arrays()
    path = npz_file(tmp_path, val_images=made["test_images"][:6], val_labels=made["test_labels"][:6])
    data = load_npz(path)
    assert [len(data.train), len(data.calibration), len(data.test)] == [40, 6, 12]
    assert isinstance(data.calibration, Split)
    np.testing.assert_array_equal(data.calibration.images.numpy(), made["test_images"][:6])


def test_npz_superclasses_and_names(tmp_path: Path) -> None:
    made = arrays()
    path = npz_file(
        tmp_path,
        train_superclasses=made["train_labels"] // 2,
        test_superclasses=made["test_labels"] // 2,
        class_names=np.array(["cat", "dog", "oak", "elm"]),
        superclass_names=np.array(["animal", "tree"]),
    )
    spec = load_npz(path).spec
    assert (spec.superclasses, spec.superclass_of, spec.superclass_names) == (
        2,
        (0, 0, 1, 1),
        ("animal", "tree"),
    )
    assert spec.class_names == ("cat", "dog", "oak", "elm")
    data = load_npz(path)
    for batch in loader(data.test, data.spec, 5, train=False):
        assert batch.superclasses is not None
        assert torch.equal(batch.superclasses, batch.labels // 2)


def test_npz_is_resized_and_limited(tmp_path: Path) -> None:
    flat = np.full((40, 6, 12, 3), 77, np.uint8)
    data = load_npz(npz_file(tmp_path, train_images=flat))
    assert isinstance(data.train, Split)
    assert data.train.images.shape[1:] == (12, 12, 3)  # the longer side
    assert (data.train.images == 77).all()
    data = load_npz(tmp_path / "data.npz", image_size=16, train_images=20, test_images=8)
    assert isinstance(data.test, Split)
    assert [len(data.train), len(data.calibration), len(data.test)] == [18, 2, 8]
    assert data.test.images.shape == (8, 16, 16, 3)


BAD_NPZ: list[tuple[dict[str, Any], str]] = [
    ({"train_images": None}, "no array 'train_images' inside (it has: test_images"),
    ({"test_labels": None}, "no array 'test_labels'"),
    ({"train_images": np.zeros((40, 10, 10, 3), np.float32)}, "train_images must be uint8, not float32"),
    ({"train_images": np.zeros((40, 10, 10, 4), np.uint8)}, "train_images must be (N, H, W)"),
    ({"train_images": np.zeros((40, 100), np.uint8)}, "train_images must be (N, H, W)"),
    ({"test_images": np.zeros((0, 10, 10, 3), np.uint8)}, "test_images is empty"),
    ({"train_labels": np.arange(39) % 4}, "train_labels has shape (39,), but there are 40 images"),
    ({"train_labels": np.zeros((40, 14), np.int64)}, "train_labels has 14 columns"),
    ({"train_labels": np.zeros(40)}, "train_labels must be integers, not float64"),
    ({"train_labels": np.zeros(40, np.int64)}, "one class only"),
    ({"train_labels": np.arange(40) % 4 - 1}, "train_labels has a negative value, -1"),
    ({"train_labels": np.full(40, 2**63, np.uint64)}, "train_labels has a value above 2147483647"),
    ({"train_labels": np.arange(40) % 4 + 10}, "train_labels goes up to 13 and has no image of class 0; count from 0"),
    ({"class_names": np.array(["a", "b", "a", "c"])}, "class_names names two of them alike"),
    ({"train_labels": np.arange(40) * 1000}, "go up to 39000, with only 40 images"),
    ({"test_labels": np.full(12, 4)}, "test_labels goes up to 4, but there are only 4 classes"),
    ({"class_names": np.array(["a", "b"])}, "class_names has 2 names"),
    ({"val_images": np.zeros((3, 10, 10), np.uint8)}, "no array 'val_labels'"),
    ({"train_superclasses": np.arange(40) % 4}, "no array 'test_superclasses'"),
    (
        {"train_superclasses": np.arange(40) // 20, "test_superclasses": np.zeros(12, int)},
        "in two superclasses",
    ),
    ({"train_labels": np.array([object()] * 40)}, "cannot read train_labels"),
]


@pytest.mark.parametrize(("changes", "says"), BAD_NPZ, ids=[says[:30] for _, says in BAD_NPZ])
def test_bad_npz_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = npz_file(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_npz(path)
    assert message(error).startswith(f"{path}: ")
    assert says in message(error)


def test_files_that_are_no_npz_archive_are_refused(tmp_path: Path) -> None:
    good = npz_file(tmp_path).read_bytes()
    np.save(tmp_path / "array.npy", np.arange(3))
    contents = {
        "text.npz": b"hello",
        "empty.npz": b"",
        "half.npz": good[: len(good) // 2],
        "hurt.npz": good[:3000] + bytes(200) + good[3200:],
        "array.npz": (tmp_path / "array.npy").read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            load_npz(tmp_path / name)
        said = "cannot read" if name == "hurt.npz" else "not an .npz archive"
        assert message(error).startswith(f"{tmp_path / name}: {said}")
    with pytest.raises(InputError, match="no such file"):
        load_npz(tmp_path / "nowhere.npz")


# --- folders ------------------------------------------------------------------------------------------------


def image_folder(root: Path, parts: tuple[str, ...] = ("train", "val"), each: int = 4) -> Path:
    """Two classes, red and blue, as files of mixed modes and sizes; the mean colour tells the class."""
    for part in parts:
        for number, name in enumerate(("blue", "red")):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = np.zeros((20 + 7 * i, 33, 3), np.uint8)
                pixels[..., 2 - 2 * number] = 200
                image = Image.fromarray(pixels).convert(("RGB", "RGBA", "P", "RGB")[i % 4])
                image.save(root / part / name / f"{i}.{('png', 'png', 'png', 'jpg')[i % 4]}")
    return root


def load_folder(path: Path, **options: Any) -> Dataset:
    return load(DataOptions(**{"name": "folder", "path": str(path), "image_size": 16, "calibration": 0.25, **options}))


def test_folder_of_mixed_images_is_decoded_into_memory(tmp_path: Path) -> None:
    data = load_folder(image_folder(tmp_path))
    assert data.spec.class_names == ("blue", "red")
    assert [len(data.train), len(data.calibration), len(data.test)] == [6, 2, 8]
    for split in (data.train, data.calibration, data.test):
        assert isinstance(split, Split)
        assert split.images.shape[1:] == (16, 16, 3)
        colours = split.images.float().mean(dim=(1, 2))
        assert torch.equal((colours[:, 0] > colours[:, 2]).long(), split.labels)
        assert ((colours.amax(dim=1) - 200).abs() < 4).all()


def test_images_of_no_class_are_refused_and_hidden_ones_passed_over(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "train" / "red" / "._0.png").write_bytes(b"left by another system")
    (root / "train" / "red" / "more.png").mkdir()
    assert len(load_folder(root).train) == 6
    (root / "train" / "red" / "0.png").rename(root / "train" / "loose.png")
    with pytest.raises(InputError, match=r"loose\.png: an image outside the class folders"):
        load_folder(root)


def test_folder_gray_and_16_bit_are_scaled_to_rgb(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save(root / "val" / "red" / "a.png")
    Image.fromarray(np.full((20, 20), 90 * 256 + 200, np.uint16)).save(root / "val" / "red" / "b.png")
    Image.fromarray(np.full((20, 20), 90, np.int32)).save(root / "val" / "red" / "c.tif")  # 32 bits, of 8-bit values
    Image.fromarray(np.full((20, 20), 90 * 256 + 200, np.int32)).save(root / "val" / "red" / "d.tif")
    test = load_folder(root).test
    assert isinstance(test, Split)
    assert (test.images == 90).flatten(1).all(dim=1).sum() == 4


def test_gray_in_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: not a readable image \(gray in floating point"):
        read_image(tmp_path / "a.tif")


def test_pictures_are_stretched_as_the_images_of_an_npz_are(tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8).repeat(8, 0).repeat(12, 1)  # 24 by 48
    Image.fromarray(random).save(tmp_path / "a.png")
    spec = DataSpec("pets", 16, 2, ("cat", "dog"))
    for name, close in (("npz", True), ("folder", False)):
        (batch,) = loader(pictures([tmp_path / "a.png"], name, spec), spec, 1, train=False)
        wanted = resized(torch.from_numpy(random)[None], 16).float() / 255
        mean, std = (torch.tensor(values).view(3) for values in (spec.mean, spec.std))
        off = (batch.images[0].permute(1, 2, 0) - (wanted[0] - mean) / std).abs().max()
        assert (float(off) < 0.1) is close


def test_folder_keeps_the_centre(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(root / "val" / "red" / "wide.png")
    test = load_folder(root).test
    assert isinstance(test, Split)
    assert (test.images[-1] == 255).all()


def test_folder_with_val_and_test_calibrates_on_val(tmp_path: Path) -> None:
    image_folder(tmp_path, ("train", "val"))
    image_folder(tmp_path, ("test",), each=3)
    data = load_folder(tmp_path)
    assert [len(data.train), len(data.calibration), len(data.test)] == [8, 8, 6]


def test_imagenet_reads_val_as_test_at_224(tmp_path: Path) -> None:
    data = load(DataOptions(name="imagenet", path=str(image_folder(tmp_path))))
    assert (data.spec.image_size, data.spec.name, len(data.test)) == (224, "imagenet", 8)
    assert isinstance(data.test, FileSplit), "crops are of the whole picture, so small sets of them stay on disk too"
    (batch,) = loader(data.test, data.spec, 8, train=False, workers=1)
    assert batch.images.shape == (8, 3, 224, 224)


def test_large_folders_stay_on_disk_and_give_the_same_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_folder(image_folder(tmp_path))
    monkeypatch.setattr(folder_room, "IN_MEMORY_BYTES", 1000)
    big = load_folder(tmp_path)
    assert isinstance(big.train, FileSplit)
    assert isinstance(big.test, FileSplit)
    groups = replace(big.test, superclasses=big.test.labels * 2).take(torch.tensor([3, 1]))
    assert isinstance(groups, FileSplit) and groups.superclasses is not None
    assert torch.equal(groups.superclasses, groups.labels * 2) and groups.difficulty is None
    for a, b in zip(
        loader(small.test, small.spec, 3, train=False),
        loader(big.test, big.spec, 3, train=False),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.index, b.index)


def test_a_folder_trains_alike_from_memory_and_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe must not depend on how many images there are."""
    rng = np.random.default_rng(0)
    for file in image_folder(tmp_path).glob("train/*/*.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file)
    small = load_folder(tmp_path)
    monkeypatch.setattr(folder_room, "IN_MEMORY_BYTES", 1000)
    big = load_folder(tmp_path)
    assert isinstance(small.train, Split) and isinstance(big.train, FileSplit)
    one, two = (epoch_of(data.train, data.spec, seed=1, workers=1) for data in (small, big))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_training_from_disk_is_the_same_whatever_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_room, "IN_MEMORY_BYTES", 1000)
    root = image_folder(tmp_path)
    rng = np.random.default_rng(0)
    for file in root.glob("train/*/*.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file)
    data = load_folder(root)
    state = torch.get_rng_state()
    one, index = epoch_of(data.train, data.spec, seed=1, workers=1)
    two, _ = epoch_of(data.train, data.spec, seed=1, workers=2)
    other, other_index = epoch_of(data.train, data.spec, seed=1, epoch=1, workers=1)
    assert torch.equal(one, two)
    assert sorted(index.tolist()) == list(range(len(data.train)))
    assert not torch.equal(one[index.argsort()], other[other_index.argsort()])  # new crops in a new epoch
    assert torch.equal(state, torch.get_rng_state())
    assert one.is_contiguous(memory_format=torch.channels_last)


def test_each_file_of_an_epoch_gets_its_own_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_room, "IN_MEMORY_BYTES", 1000)
    root = image_folder(tmp_path)
    same_image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    for file in root.glob("train/*/*"):
        same_image.save(file.with_suffix(".png"))
    for file in root.glob("train/*/*.jpg"):
        file.unlink()
    data = load_folder(root)
    images, _ = epoch_of(data.train, replace(data.spec, name="imagenet"), workers=1)
    assert len(torch.unique(images, dim=0)) == len(images) == 6
    plain, _ = epoch_of(data.train, replace(data.spec, augment=False), workers=1)
    assert len(torch.unique(plain, dim=0)) == 1


def test_an_unreadable_image_is_named_in_memory_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path)
    noisy = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    bad = root / "val" / "red" / "cut.png"
    Image.fromarray(noisy).save(bad)
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(InputError) as error:
        load_folder(root)
    assert message(error).startswith(f"{bad}: not a readable image")
    monkeypatch.setattr(folder_room, "IN_MEMORY_BYTES", 1000)
    data = load_folder(root)
    with pytest.raises(InputError) as error:
        list(loader(data.test, data.spec, 4, train=False))
    assert message(error).startswith(f"{bad}: not a readable image")
    bad.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"cut\.png"):
        list(loader(data.test, data.spec, 4, train=False, workers=1))


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    def refused(root: Path) -> str:
        with pytest.raises(InputError) as error:
            load_folder(root)
        return message(error)

    assert "no folder train/" in refused(tmp_path / "nowhere")
    image_folder(tmp_path / "a", ("train",))
    assert "no folder val/ or test/" in refused(tmp_path / "a")
    (tmp_path / "a" / "test").mkdir()
    assert "no class folders" in refused(tmp_path / "a")
    image_folder(tmp_path / "b")
    (tmp_path / "b" / "train" / "empty").mkdir()
    assert f"{tmp_path / 'b' / 'train' / 'empty'}: no images" in refused(tmp_path / "b")
    image_folder(tmp_path / "c")
    (tmp_path / "c" / "val" / "green").mkdir()
    assert "train/ has no class 'green'" in refused(tmp_path / "c")
    (tmp_path / "d" / "train" / "only").mkdir(parents=True)
    assert "at least two class folders are needed, not 1" in refused(tmp_path / "d")


# --- CIFAR --------------------------------------------------------------------------------------------------


def test_cifar_tables_are_consistent() -> None:
    spec = cifar_room.CIFAR100
    assert len(spec.class_names) == len(spec.superclass_of) == 100
    assert list(spec.class_names) == sorted(spec.class_names)
    assert np.bincount(spec.superclass_of).tolist() == [5] * 20  # five classes in every superclass
    group = dict(zip(spec.class_names, (spec.superclass_names[s] for s in spec.superclass_of), strict=True))
    assert group["apple"] == "fruit_and_vegetables"
    assert group["bicycle"] == "vehicles_1"
    assert group["tank"] == "vehicles_2"
    assert group["whale"] == "aquatic_mammals"
    assert group["worm"] == "non-insect_invertebrates"
    assert {k for k, g in group.items() if g == "trees"} == {
        "maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_from_an_npz_file_keeps_cifars_names(tmp_path: Path, name: str, classes: int) -> None:
    path = npz_file(tmp_path, **arrays(train=200, test=100, shape=(32, 32, 3), classes=classes))
    data = load(DataOptions(name=name, path=str(path)))
    assert (data.spec.name, data.spec.classes, data.spec.image_size) == (name, classes, 32)
    assert data.spec.class_names[0] in ("airplane", "apple")
    assert data.spec.mean == (0.485, 0.456, 0.406)
    if name == "cifar100":
        assert data.test.superclasses is not None
        assert data.test.superclasses[:5].tolist() == [4, 1, 14, 8, 0]
    else:
        assert data.test.superclasses is None


def test_cifar_refuses_an_npz_file_of_other_labels(tmp_path: Path) -> None:
    path = npz_file(tmp_path, **arrays(train=200, classes=11))
    with pytest.raises(InputError, match=r"train_labels goes up to 10, but there are only 10 classes"):
        load(DataOptions(name="cifar10", path=str(path)))


def test_cifar_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fake:
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert root == tmp_path
            assert download
            print("progress")
            made = arrays(train=60, test=20, shape=(32, 32, 3), classes=10)
            self.data = made["train_images" if train else "test_images"]
            self.targets = made["train_labels" if train else "test_labels"].tolist()

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = load(DataOptions(name="cifar10", path=str(tmp_path), image_size=24))
    assert [len(data.train), len(data.calibration), len(data.test)] == [54, 6, 20]
    assert isinstance(data.train, Split)
    assert data.train.images.shape == (54, 24, 24, 3)
    assert data.spec.image_size == 24
    assert capsys.readouterr().out == ""  # stdout belongs to the command


@pytest.mark.parametrize("problem", [OSError("no route\nto host"), RuntimeError("File not found or corrupted.")])
def test_a_failed_cifar_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fails(**_: Any) -> None:
        raise problem

    monkeypatch.setattr("torchvision.datasets.CIFAR100", fails)
    with pytest.raises(InputError) as error:
        load(DataOptions(name="cifar100", path=str(tmp_path)))
    text = message(error)
    assert text.startswith(f"cifar100 could not be read from or downloaded into {tmp_path}")
    assert "data.name=npz data.path=FILE.npz" in text
