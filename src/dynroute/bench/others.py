"""Nets as other runtimes run them: what a user would pick instead. Optional rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynroute.export import INPUT, OUTPUTS, Unavailable, first_line, onnx_bytes, quiet, session

Run = Callable[[Tensor], Any]


def compiled(dense: nn.Module, x_BCHW: Tensor) -> Run:
    """torch.compile by inductor, weights frozen, for this shape. Raises Unavailable where it fails."""
    import torch._inductor.config as inductor

    try:
        torch.compiler.reset()
        made = torch.compile(dense, dynamic=False)
        with quiet(), inductor.patch(freezing=True):
            made(x_BCHW)
    except Exception as error:  # no compiler, an unsupported operator, ...: many types
        raise Unavailable(f"torch.compile: {first_line(error)}") from None
    run: Run = made
    return run


def onnxruntime(net: nn.Module, x_BCHW: Tensor, outputs: Sequence[str] = OUTPUTS[:1]) -> Run:
    """ONNX Runtime on the processor, with as many threads as torch, the net exported for this shape: all its outputs.

    Raises Unavailable where the export fails, InputError where the packages of the extra `export` are not installed.
    """
    run = session(onnx_bytes(net, x_BCHW, outputs), torch.get_num_threads())
    return lambda x_BCHW: run.run(None, {INPUT: x_BCHW.contiguous().numpy()})
