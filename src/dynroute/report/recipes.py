"""What a reported row that is not reproduced yet needs: the command, the data, the hours. No torch, no run is read."""

from __future__ import annotations

from typing import Any, NamedTuple

Row = dict[str, Any]
STATIC_FULL = ("resnet", "resnet-pytorch", "resnet-ours", "mobilenetv2", "mobilenetv2-ours")  # the plain nets
BACKBONES = {  # theirs -> ours
    ("vgg16", "cifar100"): "vgg16_cifar",
    ("resnet50", "cifar100"): "resnet50_cifar",
    ("mobilenetv2", "imagenet"): "mobilenet_v2",
    ("mobilenetv2-1.4", "imagenet"): "mobilenet_v2_140",
}
RESNEXT = "resnext-"  # reported methods that are a static net of another backbone: resnext-2x40d is resnext50_2x40d
PRUNED = {"taylor-pruning": "taylor", "filter-pruning": "l1"}  # reported method -> --by of experiments/prune.py
LACKING = {  # reported methods that dynroute does not have
    "jaderberg": "low-rank factors of trained filters (Jaderberg et al.), which dynroute does not make",
    "asymmetric": "low-rank factors of trained filters (Zhang et al.), which dynroute does not make",
}
DATA = {
    "imagenet": "ImageNet-1k (138 GB, train/WNID/* and val/WNID/*)",
    "cifar10": "CIFAR-10 (170 MB)",
    "cifar100": "CIFAR-100 (170 MB)",
}
IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000}
RATE, FASTEST = 3e13, 5000.0  # operations and images a second: see `hours`
DENSE_MACS = {  # of one image; the reported figures, where there are some
    "resnet50/imagenet": 3.96e9,
    "resnet101/imagenet": 7.67e9,
    "resnext50/imagenet": 4.2e9,
    "resnext101/imagenet": 7.9e9,
    "mobilenetv2/imagenet": 0.30e9,
    "mobilenetv2-1.4/imagenet": 0.57e9,
    "resnet50/cifar100": 0.33e9,
    "vgg16/imagenet": 15.47e9,
    "vgg16/cifar100": 0.313e9,
    "conv4/cifar10": 0.0245e9,
}
RECIPE = "optim.lr=0.1 optim.batch_size=256 optim.weight_decay=1e-4"  # on CIFAR-100; DMNN paper, section 4
EPOCHS = {"imagenet": 120, "cifar100": 200}
VARIANTS = {  # rows of the ablation, by the options that are off
    "dmnn": "",
    "dmnn-prev-cat": "",
    "dmnn-prev": "category",
    "dmnn-cat": "previous",
    "dmnn-no-prev-no-cat": "category previous",
    "convnet-aig": "aig",
}
SHORT = {"resnet50": "50", "resnet101": "101"}  # in names of YAML files
SUFFIXES = {"": "", "aig": "", "category": "_nocat", "previous": "_noprev", "category previous": "_noprev_nocat"}
RNP_SHARES = {3: "0.3333", 4: "0.25", 5: "0.2", 10: "0.1"}  # rnp:tab2, by speed-up
TUNED = 20  # epochs of fine-tuning a pruned net. Ours
VANILLA: dict[str, dict[float, int | str]] = {  # share in percent of the reported row -> experiment of the same share
    "conv4": {16.7: 17, 23.3: 23, 37.1: 37, 61.2: 61, 100.0: 100},
    "vgg16": {9.1: 9, 26.4: 26, 38.7: 39, 54.5: 55, 76.9: 77, 100.0: "baseline"},
}
HOURS_NOTE = (
    "hours: a rough estimate for one H200, never measured: epochs x images x 3 x 2 x the dense net's multiply-adds (a pass back "
    "costs two forward, a multiply-add is two operations) at 3e13 operations a second, and never above 5000 images "
    "a second; all parts of a training that earlier rows share are counted in each row. Off by a factor of three either way."
)


class Need(NamedTuple):
    """What makes a row. command: shell commands joined by &&, empty where dynroute has none, lacks then saying why.

    hours: see HOURS_NOTE; None without a command.
    """

    command: str
    data: str
    hours: float | None
    lacks: str


def need(row: Row) -> Need:
    """What a reported row needs, from its method, backbone, dataset, sub_blocks, target, speedup_macs and share."""
    place = f"{row['backbone']}/{row['dataset']}"
    steps, epochs = _steps(row)
    if not steps:
        lacks = LACKING.get(row["method"], f"dynroute has no {row['method']} for this backbone and cost yet")
        return Need("", "", None, lacks)
    command = " && ".join(step if step.startswith("python ") else f"dynroute {step}" for step in steps)
    return Need(command, DATA[row["dataset"]], hours(row["dataset"], DENSE_MACS[place], epochs), "")


def hours(dataset: str, macs: float, epochs: int) -> float:
    """Hours of training on one H200, roughly: see HOURS_NOTE. Ours, no measurement."""
    return epochs * IMAGES[dataset] * max(6 * macs / RATE, 1 / FASTEST) / 3600


def backbone(row: Row) -> str:
    """Our name of a reported row's backbone."""
    if row["method"].startswith(RESNEXT):
        return f"{row['backbone']}_{row['method'].removeprefix(RESNEXT)}"
    return BACKBONES.get((row["backbone"], row["dataset"]), str(row["backbone"]))


def _steps(row: Row) -> tuple[list[str], int]:
    """The commands that make a row, in their order, less the program's name; and their epochs together."""
    if row["method"] in VARIANTS:
        return _dmnn(row)
    if row["method"] in STATIC_FULL or row["method"].startswith(RESNEXT):
        return _full(row)
    if row["method"] in PRUNED:
        return _pruned(row)
    by_method = {"rnp": _rnp, "vanilla": _vanilla, "slimmable-0.75": _slimmable}
    return by_method[row["method"]](row) if row["method"] in by_method else ([], 0)


def _dmnn(row: Row) -> tuple[list[str], int]:
    """As in the paper, section 4: trained from scratch at its target, N sub-blocks a block, evaluated as trained."""
    epochs, target = EPOCHS[row["dataset"]], f"{row['target']:g}"
    if row["dataset"] == "imagenet":
        off = VARIANTS[row["method"]]
        net = SHORT.get(row["backbone"], f"_{row['backbone']}".replace("-", "_"))
        stem = f"convnet_aig{net}" if off == "aig" else f"dmnn{net}_n{row['sub_blocks']:g}"
        return _imagenet(f"{stem}_t{target}{SUFFIXES[off]}"), epochs
    name = f"{row['method']}_{row['backbone']}_n{row['sub_blocks']:g}_{target}"
    keys = f"router.name=dmnn router.target={target} router.epochs={epochs}"
    net = f"backbone.name={backbone(row)} backbone.parts={row['sub_blocks']:g}"
    return _made(name, f"{keys} {net} {_data(row['dataset'])} {RECIPE}"), epochs


def _full(row: Row) -> tuple[list[str], int]:
    dataset, epochs = row["dataset"], EPOCHS[row["dataset"]]
    if dataset == "imagenet":
        own = backbone(row) if row["method"].startswith(RESNEXT) else str(row["backbone"])
        return _imagenet(own.replace("-", "_")), epochs
    name = f"static_{row['backbone']}_{dataset}"
    keys = f"router.name=static router.epochs={epochs} backbone.name={backbone(row)}"
    return _made(name, f"{keys} {_data(dataset)} {RECIPE}"), epochs


def _pruned(row: Row) -> tuple[list[str], int]:
    """A dense net cut and fine-tuned: ResNet-50 is trained first, VGG-16 starts from torchvision's weights."""
    share = row["macs_ratio_pct"] / 100 if row["macs_ratio_pct"] else 1 / row["speedup_macs"]
    if row["backbone"] == "vgg16":
        keys = "router.name=static router.epochs=0 backbone.name=vgg16 backbone.weights=data/vgg16-397923af.pth"
        name, dense, epochs = "vgg16", f"train name=vgg16 {keys} {_data('imagenet')} optim.lr=1e-3", TUNED
    else:
        name, (dense, _), epochs = row["backbone"], _imagenet(row["backbone"]), EPOCHS["imagenet"] + TUNED
    asked = f"--share {share:.4g} --by {PRUNED[row['method']]} --epochs {TUNED} --lr 1e-3 --out runs/pruned"
    return [dense, f"python experiments/prune.py runs/{name} {asked}"], epochs


def _imagenet(name: str) -> list[str]:
    return [f"train -c experiments/imagenet/{name}.yaml data.path={_folder('imagenet')}", f"eval runs/{name}"]


def _slimmable(row: Row) -> tuple[list[str], int]:
    """All four widths in one run, as many passes over the images in each epoch."""
    train, evaluate = _imagenet(f"slimmable_{row['backbone']}")
    return [train, f"{evaluate} --flops-target {row['macs_ratio_pct'] / 100:g}"], 4 * EPOCHS[row["dataset"]]


def _made(name: str, keys: str) -> list[str]:
    return [f"train name={name} {keys}", f"eval runs/{name}"]


def _data(dataset: str) -> str:
    return f"data.name={dataset} data.path={_folder(dataset)}"


def _folder(dataset: str) -> str:
    return dataset.upper()


def _rnp(row: Row) -> tuple[list[str], int]:
    if row["dataset"] == "imagenet":
        times = round(row["speedup_macs"])
        name = f"rnp_vgg16_{times}x"
        train, evaluate = _imagenet(name)
        return [train, f"{evaluate} --flops-target {RNP_SHARES[times]}"], 34
    share = row["macs_ratio_pct"] / 100
    stages = {"conv4": ("start", "rnp"), "vgg16": ("baseline", "widths", "rnp")}[row["backbone"]]
    epochs = {"conv4": 16, "vgg16": 500}[row["backbone"]]
    steps = [step for stage in stages for step in _experiment(row, stage)[:1]]
    return [*steps, f"eval runs/{_kind(row)}/rnp --flops-target {share:g}"], epochs


def _vanilla(row: Row) -> tuple[list[str], int]:
    stage = VANILLA[row["backbone"]][row["macs_ratio_pct"]]
    name = stage if isinstance(stage, str) else f"vanilla_{stage}"
    return _experiment(row, name), {"conv4": 15, "vgg16": 300}[row["backbone"]]


def _experiment(row: Row, name: str) -> list[str]:
    """Training and evaluation of a file of experiments/, in the folder from which later stages start."""
    kind, folder = _kind(row), f"runs/{_kind(row)}/{name}"
    train = f"train -c experiments/{kind}/{name}.yaml data.path={_folder(row['dataset'])} --out {folder}"
    return [train, f"eval {folder}"]


def _kind(row: Row) -> str:
    """The folder of experiments/ that holds the row's configurations."""
    return "conv4" if row["backbone"] == "conv4" else str(row["dataset"])
