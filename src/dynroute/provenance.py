"""Where a number comes from: the machine, its processors, the source tree, the configuration."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from dynroute.config import Config
from dynroute.processors import affinity


def bench_labels(config: Config, device: torch.device) -> dict[str, str]:
    """The columns of a BenchRow that say what was timed where."""
    return {
        "run": config.name,
        "method": config.router_name,
        "backbone": config.backbone.name,
        "dataset": config.data.label,
        "affinity": affinity(),
        "machine": machine(device),
        "commit": commit(),
        "config_hash": config.hash(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit of the source tree this package runs from, with + where it has local changes; empty if not a checkout."""
    here = Path(__file__)
    tracked = _git("ls-files", "--error-unmatch", here.name)  # not a checkout of some other project around us
    revision = _git("rev-parse", "--short=10", "HEAD")
    if tracked is None or revision is None:
        return ""
    return revision + ("+" if _git("status", "--porcelain", "--", str(here.parent)) else "")


def _git(*words: str) -> str | None:
    """What git prints, or None where it fails or is not installed."""
    try:
        run = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def machine(device: torch.device) -> str:
    """Processor, threads and system, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def environment() -> str:
    """Processor and PyTorch: what is fastest on one is not on another."""
    return f"{processor()}, torch {torch.__version__}"


def processor() -> str:
    """The model of the processor, and what PyTorch uses of it: a virtual machine may hide the model, as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"
