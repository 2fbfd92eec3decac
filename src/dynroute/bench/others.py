"""The dense net as other runtimes run it: what a user would pick instead. Optional rows."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from dynroute.contracts import InputError

Run = Callable[[Tensor], Any]


class Unavailable(Exception):
    """This runtime cannot run this net here; the message says why."""


def compiled(dense: nn.Module, x_BCHW: Tensor) -> Run:
    """torch.compile by inductor, weights frozen, for this shape. Raises Unavailable where it fails."""
    import torch._inductor.config as inductor

    try:
        torch.compiler.reset()
        made = torch.compile(dense, dynamic=False)
        with _quiet(), inductor.patch(freezing=True):
            made(x_BCHW)
    except Exception as error:  # no compiler, an unsupported operator, ...: many types
        raise Unavailable(f"torch.compile: {_first_line(error)}") from None
    run: Run = made
    return run


def onnxruntime(dense: nn.Module, x_BCHW: Tensor) -> Run:
    """ONNX Runtime on the processor, with as many threads as torch, the net exported for this shape.

    Raises Unavailable where the export fails, InputError where the packages of the extra `export` are not installed.
    """
    try:
        import onnxruntime as ort
        import onnxscript  # noqa: F401  # what torch exports with
    except ImportError:
        raise InputError("--onnx needs ONNX Runtime: pip install 'dynroute[export]'") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    try:
        session = ort.InferenceSession(_exported(dense, x_BCHW), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unavailable(f"ONNX Runtime: {_first_line(error)}") from None
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.contiguous().numpy()})


def _exported(dense: nn.Module, x_BCHW: Tensor) -> bytes:
    """The net as an ONNX file."""
    with _quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the exporter prints its progress
        program = torch.onnx.export(dense, (x_BCHW.contiguous(),), dynamo=True)
    assert program is not None
    file: bytes = program.model_proto.SerializeToString()
    return file


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and log lines, of which the compilers have many that a user can do nothing about."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _first_line(error: Exception) -> str:
    """What went wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
