"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import io
import pickletools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynroute.contracts import InputError
from dynroute.records import write_file

LAST, BEST = "last.pt", "best.pt"
FORMAT = 1  # of checkpoints
# operations of a pickle that find something or call it
CALLS = frozenset(["GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"])


def save_checkpoint(
    net: nn.Module, path: Path, rows: list[dict[str, Any]], meta: dict[str, Any] | None, optimizers: dict[str, Any]
) -> None:
    """Write a checkpoint in one step: a reader finds the old file or the new one."""
    content = {
        "format": FORMAT,
        "meta": meta or {},
        "model": net.state_dict(),
        "optimizers": optimizers,
        "rows": rows,
    }
    made = io.BytesIO()  # torch says of a full disk that a zip file is broken
    torch.save(content, made)
    write_file(path, lambda file: file.write(made.getbuffer()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program. Raises InputError for anything else."""
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise InputError(f"{path} is not a checkpoint of dynroute, or of another version")
    return content


def load_tensors(path: Path) -> Any:
    """torch.load with weights_only=True, never otherwise. Raises InputError for a missing, torn or code-carrying file."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on foreign pickles; what matters becomes the error below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise a dozen types for broken or unsafe files
        what, said = f"broken or truncated ({type(error).__name__})", str(error).lower()
        if "unsupported global" in said or ("unsupported operand" in said and _calls(path)):
            what = "it holds more than tensors and could run code"
        raise InputError(f"{path} was not loaded: {what}") from None


def _calls(path: Path) -> bool:
    """Whether a file is a pickle that calls something when it is loaded, as far as it can be read; nothing is called."""
    try:
        with path.open("rb") as file:
            return any(operation.name in CALLS for operation, _, _ in pickletools.genops(file))
    except Exception:  # not a pickle: as many types as there are ways to be none
        return False


def load_weights(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises InputError with the first misfit."""
    try:
        net.load_state_dict(state)
    except InputError as error:
        raise InputError(f"{path} was not loaded: {error}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(f"{path} does not fit this architecture: {reason[0].strip()[:200]}") from None
