"""The README's example router keeps the contract, and its commands and keys exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dynroute.cli import app
from dynroute.net import RoutedNet
from dynroute.testing import check_agreement, check_router
from tiny import SPEC, make_backbone

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def example() -> dict[str, Any]:
    """What the README's one Python block defines."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    return names


def test_the_example_router_keeps_the_contract() -> None:
    method = example()["METHOD"]
    for unit in ("channels", "paths"):
        backbone = make_backbone(unit=unit)
        router = method.router(backbone.specs, method.options(), 0)
        check_router(router)
        check_agreement(RoutedNet(backbone, router), torch.randn(4, 3, SPEC.image_size, SPEC.image_size))


def test_every_command_named_exists() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"^dynroute (\w+)", README, re.MULTILINE))
    assert named
    assert named <= known


def test_make_targets_named_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)`?  ?", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_results_table_has_its_markers() -> None:
    assert README.count("<!-- results: begin -->") == README.count("<!-- results: end -->") == 1
