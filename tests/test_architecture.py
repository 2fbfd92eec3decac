"""The rooms: a file imports only from rooms below its own; every file and every public name says what it is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dynroute

SOURCE = Path(dynroute.__file__).parent
ROOT = Path(__file__).parent.parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = [
    "contracts",
    "processors",
    "records",
    "calibration",
    "data",
    "cost",
    "units",
    "backbones",
    "routers",
    "net",
    "checkpoints",
    "optim",
    "skipping",
    "export",
    "measure",
    "bench",
    "controls",
    "exhibits",
    "fit",
    "report",
    "plugins",
    "config",
    "provenance",
    "assembly",
    "latency",
    "evaluation",
    "runs",
    "timing",
    "prediction",
    "deployment",
    "catalogue",
    "testing",
    "console",
    "cli",
    "__main__",
]
ONLY_IN = {"typer": {"cli"}, "omegaconf": {"config"}}
WITHOUT_TORCH = {"cli", "console", "report", "records", "calibration", "contracts", "processors", "__main__"}


def named(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(nodes: list[ast.stmt], top: bool = False) -> Iterator[str]:
    """Dotted names imported by statements, those inside functions too unless `top`; TYPE_CHECKING blocks are left out."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module == "dynroute":
                yield from (f"dynroute.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)], top)


def found(path: Path, top: bool = False) -> set[str]:
    return set(imports(ast.parse(path.read_text()).body, top))


def violations(own: str, names: set[str]) -> list[str]:
    """What a file of the room `own` may not import."""
    bad = []
    for name in sorted(names):
        head, _, rest = name.partition(".")
        inner = rest.split(".")[0]
        if head == "dynroute" and inner in ROOMS:
            upwards = ROOMS.index(inner) > ROOMS.index(own)
            stranger = own == "report" and inner not in ("report", "records", "contracts", "processors")
            bad += [name] if upwards or stranger else []
        elif own not in ONLY_IN.get(head, {own}):
            bad.append(name)
    return bad


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_run_downwards(path: Path) -> None:
    own = room(path)
    assert violations("contracts" if own == "__init__" else own, found(path)) == []


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in WITHOUT_TORCH], ids=named)
def test_these_rooms_open_without_torch(path: Path) -> None:
    names = found(path, top=room(path) == "cli")
    assert not {name.split(".")[0] for name in names} & {"torch", "torchvision"}
    if room(path) == "cli":
        inner = {name.split(".")[1] for name in names if name.startswith("dynroute.")}
        assert inner & set(ROOMS) <= {"contracts", "records", "console"}


def test_the_command_line_and_reports_load_no_torch() -> None:
    code = "import sys, dynroute.cli, dynroute.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize(
    ("own", "source", "bad"),
    [
        ("routers", "from dynroute.net import RoutedNet", ["dynroute.net"]),
        ("routers", "def f():\n    from dynroute.net import RoutedNet", ["dynroute.net"]),
        ("routers", "if TYPE_CHECKING:\n    from dynroute.net import RoutedNet", []),
        ("backbones", "from dynroute import routers", ["dynroute.routers"]),
        ("backbones", "from dynroute.backbones.base import Backbone", []),
        ("report", "from dynroute.units import BASIC", ["dynroute.units"]),
        ("report", "try:\n    import omegaconf\nexcept ImportError:\n    pass", ["omegaconf"]),
        ("evaluation", "import typer.core", ["typer.core"]),
        ("config", "from omegaconf import OmegaConf", []),
    ],
)
def test_this_test_can_fail(own: str, source: str, bad: list[str]) -> None:
    assert violations(own, set(imports(ast.parse(source).body))) == bad


SCRIPTS = sorted(path for room in ("experiments", "benchmarks") for path in (ROOT / room).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_find_what_they_import(path: Path) -> None:
    """Read, not run: some need packages that are not here."""
    froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    wanted = [(node.module, alias.name) for node in froms for alias in node.names if "dynroute" in (node.module or "")]
    assert wanted
    assert [f"{module}.{name}" for module, name in wanted if not there(module or "", name)] == []


def there(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


# --- docstrings -------------------------------------------------------------------------------------------------

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public classes, functions and methods without a docstring; __init__ and other special methods speak for themselves."""
    for node in nodes:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=named)
def test_everything_public_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file has no docstring"
    assert list(undocumented(tree.body)) == []


def test_a_missing_docstring_is_seen() -> None:
    source = 'def f():\n    pass\n\nclass A:\n    """Yes."""\n    def g(self):\n        pass\n    def _h(self):\n        pass'
    assert list(undocumented(ast.parse(source).body)) == ["f", "A.g"]
