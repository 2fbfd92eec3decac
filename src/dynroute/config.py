"""Configuration: dataclass defaults < YAML < command line, then plain dataclasses. OmegaConf is seen here only."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynroute import plugins
from dynroute.backbones import BackboneOptions
from dynroute.checkpoints import BEST, LAST
from dynroute.contracts import InputError, unknown
from dynroute.data import DataOptions
from dynroute.optim import OptimOptions
from dynroute.records import base_name
from dynroute.routers import Method, ranged

CONFIG_FILE = "config.yaml"


# Options that came after rows had been published, with the values that leave things as they were: these are no part of a
# configuration's hash, so that such rows keep theirs. An option added from now on belongs here.
LATER: dict[str, dict[str, Any]] = {
    "data": {"superclasses": "auto", "flip": True},
    "backbone": {"fold": "auto"},
    "router": {"open_epochs": 0, "cooling": 0.0, "budgets_per_image": 1},
}


@dataclass
class TopOptions:
    """The keys of a configuration that stand in no section."""

    name: str = ""
    """Name of the run and of its folder; empty: made from method, backbone, data and seed."""
    seed: int = 0
    """Seed of weights, order of images, augmentation and exploration."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0: as many as this process may use. Two runs at once on the same processors want threads=1 each: threads of
    programs that share a processor wait for one another, and all of it takes many times as long."""

    def __post_init__(self) -> None:
        """Raise InputError on the first value out of range."""
        ranged("seed", self.seed, 0, 1_000_000_000)
        ranged("threads", self.threads, 0, 1024)


@dataclass
class Config:
    """A whole configuration. router: the options of the method named router_name."""

    top: TopOptions
    data: DataOptions
    backbone: BackboneOptions
    router_name: str
    router: Any
    optim: OptimOptions = field(default_factory=OptimOptions)

    @property
    def method(self) -> Method:
        """The row of ROUTERS (or of a plug-in)."""
        found: Method = plugins.find("router", self.router_name)
        return found

    @property
    def name(self) -> str:
        """The run's name, given or made."""
        made = f"{self.router_name}-{self.backbone.name}-{self.data.label}-s{self.top.seed}"
        return self.top.name or made

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, in the order of the YAML file."""
        return {
            **dataclasses.asdict(self.top),
            "data": dataclasses.asdict(self.data),
            "backbone": dataclasses.asdict(self.backbone),
            "router": {"name": self.router_name, **dataclasses.asdict(self.router)},
            "optim": dataclasses.asdict(self.optim),
        }

    def yaml(self, comments: bool = False) -> str:
        """The configuration as YAML, with each field's help sentence if asked for."""
        text: str = yaml.safe_dump(self.as_dict(), sort_keys=False, width=10_000)  # a line for each key
        return _commented(text, self._classes()) if comments else text

    def hash(self) -> str:
        """Eight hex digits of what makes the experiment: not of name, seed, machine, or where files lie.

        Other runs that it starts from or learns from count by their names less the seed, so that the seeds of an experiment
        of several stages have one hash.
        """
        values = self.as_dict()
        for key in dataclasses.asdict(self.top):
            del values[key]
        values["data"] |= {"name": self.data.label}
        values["data"].pop("path")
        values["data"].pop("workers")
        for section, unused in LATER.items():
            for key, value in unused.items():
                if values[section].get(key) == value:
                    del values[section][key]
        body = values["backbone"]
        for section, key in ((body, "weights"), (values["optim"], "teacher")):
            if section[key]:
                section[key] = _unseeded(origin(section[key]))
        body["nets"] = [_unseeded(origin(run)) for run in body["nets"]]
        for section in ("backbone", "optim"):  # lists not used leave hashes as they were
            values[section] = {k: v for k, v in values[section].items() if v != []}
        for key in ("path_width", "path_least") if body["unit"] != "paths" else ():
            values["backbone"].pop(key)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def origins(self) -> list[str]:
        """The names of the runs and files that training starts from and learns from, the seed in them included."""
        return [origin(name) for name in (self.backbone.weights, self.optim.teacher, *self.backbone.nets) if name]

    def _classes(self) -> dict[str, type]:
        sections = ("data", "backbone", "router", "optim")
        return {"": TopOptions, **{name: type(getattr(self, name)) for name in sections}}


def origin(name: str) -> str:
    """What a run or file that is started from is called, wherever it lies: a last.pt or best.pt by its folder."""
    path = Path(name)
    if path.name not in (LAST, BEST):
        return path.name
    folder = path.absolute().parent.name
    return folder if path.name == LAST else f"{folder}/{BEST}"


def _unseeded(name: str) -> str:
    """The name of a run, of its best.pt or of a file, less the seed."""
    run, slash, file = name.partition("/")
    suffix = "" if slash else Path(run).suffix
    return (base_name(run.removesuffix(suffix)) or run) + suffix + slash + file


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and key=value overrides. Raises InputError: one line with the nearest valid key."""
    source = str(path) if path else "the command line"
    values = _read_yaml(path) if path else {}
    for text in overrides or []:
        _override(values, text)
    return from_values(values, source, {text.partition("=")[0] for text in overrides or []})


def from_text(text: str, source: str) -> Config:
    """A configuration from YAML text, as checkpoints carry it."""
    return from_values(_parse_yaml(text, source), source)


def from_values(values: dict[str, Any], source: str, overridden: Collection[str] = ()) -> Config:
    """A configuration from nested plain values. Raises InputError naming the source: for keys overridden, the command line."""
    top = {k: values.pop(k) for k in list(values) if not isinstance(values[k], dict)}
    sections: dict[str, type] = {
        "data": DataOptions,
        "backbone": BackboneOptions,
        "router": object,
        "optim": OptimOptions,
    }
    keys = [*sections, *(f.name for f in dataclasses.fields(TopOptions))]
    for key in [*values, *top]:
        if key not in keys or (key in sections) != (key in values):
            raise (
                _bad_key(key, keys, source, overridden)
                if key not in keys
                else InputError(f"{source}: {key} has the wrong kind of value")
            )
    router = dict(values.get("router", {}))
    name = router.pop("name", "dmnn")
    options = plugins.find("router", str(name)).options
    plain = [(s, cls, values.get(s, {})) for s, cls in sections.items() if s != "router"]
    made = {s: _build(s, cls, given, source, overridden) for s, cls, given in plain}
    built = _build("router", options, router, source, overridden)
    own = _build("", TopOptions, top, source, overridden)
    config = Config(own, made["data"], made["backbone"], str(name), built, made["optim"])
    _check(config)
    config.backbone = config.backbone.resolved(config.method.unit)
    return config


def _check(config: Config) -> None:
    """What no single section can see."""
    plugins.find("backbone", config.backbone.name)
    plugins.find("dataset", config.data.name)
    if re.search(r"[^\w.+=-]", config.name) or config.name.startswith("."):
        raise InputError(f"name must be a plain folder name of letters, digits and . _ + = -, not {config.name!r}")
    needed = (config.method.unit, *config.method.also)
    if "any" not in needed and config.backbone.unit not in ("auto", *needed):
        raise InputError(
            f"router {config.router_name!r} needs backbone.unit={' or '.join(needed)} (or auto), "
            f"not {config.backbone.unit!r}"
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return _parse_yaml(text, str(path))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which here refuses a key that is given twice: one of the two would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(f"{source}{where}: not YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise InputError(f"{source} must hold keys and values, not a {type(values).__name__}")
    return values


def _override(values: dict[str, Any], text: str) -> None:
    """Apply one key=value, dots going into sections."""
    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)?", key):
        raise InputError(f"{text!r} is not of the form key=value (for example data.name=cifar10)")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (OmegaConfBaseException, yaml.YAMLError):
        raise InputError(f"{text!r}: the value cannot be parsed") from None
    assert isinstance(parsed, dict)
    for top, value in parsed.items():
        if isinstance(value, dict) and isinstance(values.get(str(top)), dict):
            values[str(top)].update(value)
        else:
            values[str(top)] = value


def _build(section: str, cls: type, values: dict[str, Any], source: str, overridden: Collection[str]) -> Any:
    """One section as its dataclass, types checked."""
    prefix = f"{section}." if section else ""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise _bad_key(f"{prefix}{key}", [f"{prefix}{k}" for k in known], source, overridden)
    hints = get_type_hints(cls)
    for key, value in values.items():
        try:
            node = OmegaConf.structured(cls)
            OmegaConf.update(node, key, value)  # merging would pass over "???" without a word
            value = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)[key]  # type: ignore[call-overload, index]
        except OmegaConfBaseException:
            kind = getattr(hints[key], "__name__", None) or str(hints[key])
            raise InputError(f"{prefix}{key} must be {_spoken(str(hints[key]), kind)}, not {value!r}") from None
        values = {**values, key: value}
    return cls(**values)


def _spoken(full: str, name: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    if "list[" in full:
        return "a list of numbers" if "float" in full else "a list of names"
    return words.get(name, "text" if "str" in full else name)


def _bad_key(key: str, known: list[str], source: str, overridden: Collection[str]) -> InputError:
    typed = any(key == text or text.startswith(f"{key}.") for text in overridden)
    return InputError(f"{'the command line' if typed else source}: {unknown('key', key, known)}")


def field_sentences(cls: type) -> dict[str, str]:
    """The sentence under each field of an options dataclass, inherited ones included: its help text."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for line, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                out[line.target.id] = " ".join(ast.literal_eval(below.value).split())
    return out


def describe_fields() -> str:
    """All keys with defaults and help sentences, for --help."""
    sections: list[tuple[str, str, type]] = [("", "", TopOptions), ("data", "", DataOptions)]
    sections += [("backbone", "", BackboneOptions), ("optim", "", OptimOptions)]
    lines, broken = ["Configuration keys (dataclass defaults < YAML < command line):"], []
    for name in plugins.names("router"):
        try:
            sections.append(("router", f" (router.name={name})", plugins.find("router", name).options))
        except InputError as error:  # another package's, which must not hide all the rest
            broken += ["", f"[router] (router.name={name}): {error}"]
    for section, note, cls in sections:
        lines += ["", f"[{section or 'top'}]{note}"]
        lines += (
            ["  router.name = dmnn\n      Which method; `dynroute list routers` names them."]
            if note and "static" in note
            else []
        )
        sentences = field_sentences(cls)
        for f in dataclasses.fields(cls):
            key = f"{section}.{f.name}" if section else f.name
            lines += [
                f"  {key} = {json.dumps(_default(f))}",
                f"      {sentences.get(f.name, '')}",
            ]
    return "\n".join(lines + broken)


def _default(field_of: dataclasses.Field[Any]) -> Any:
    if field_of.default_factory is not dataclasses.MISSING:
        return field_of.default_factory()
    return None if field_of.default is dataclasses.MISSING else field_of.default


def _commented(text: str, classes: dict[str, type]) -> str:
    section, out = "", []
    for line in text.splitlines():
        key = line.strip().split(":")[0]
        if not line.startswith((" ", "-")):
            section = key if key in classes else ""
        sentence = field_sentences(classes[section]).get(key)
        if sentence and line.strip() != f"{section}:":
            out.append(f"{line[: len(line) - len(line.lstrip())]}# {sentence}")
        out.append(line)
    return "\n".join(out) + "\n"
