"""ONNX files: made by PyTorch's exporter, weights put where they are used, and run by ONNX Runtime (extra `export`)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynroute.contracts import InputError

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto
    from onnxruntime import InferenceSession

INPUT = "images"
OUTPUTS = ("logits", "route", "macs")
MOST = 2**31 - 1  # bytes of an ONNX file


class Unavailable(Exception):
    """This runtime cannot run this net here; the message says why."""


def require() -> None:
    """Raise InputError where the packages of the extra `export` are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  # what torch exports with
    except ImportError as error:
        raise InputError(f"ONNX needs the package {error.name}: pip install 'dynroute[export]'") from None


@torch.no_grad()
def onnx_bytes(
    net: nn.Module,
    x_BCHW: Tensor,
    outputs: Sequence[str] = OUTPUTS[:1],
    any_batch: bool = False,
    says: Mapping[str, str] | None = None,
) -> bytes:
    """The net as an ONNX file. any_batch: for any number of images. says: what the file tells of itself.

    Raises Unavailable where the export fails, InputError where the extra `export` is not installed.
    """
    require()
    x_BCHW = x_BCHW.contiguous()
    net.eval()(x_BCHW)  # what is made when it is first needed must not be made by the exporter
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if any_batch else {}
    words: dict[str, Any] = {"input_names": [INPUT], "output_names": list(outputs), **shapes}
    try:
        with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints its progress
            program = torch.onnx.export(net, (x_BCHW,), dynamo=True, **words)
        assert program is not None
        model = program.model_proto
        _lower_weights(model.graph, {})
        _forget(model.graph)
        for key, value in (says or {}).items():
            model.metadata_props.add(key=key, value=value)
        if model.ByteSize() > MOST:
            raise Unavailable("the ONNX file would be larger than 2 GB")
        file: bytes = model.SerializeToString()
    except Unavailable:
        raise
    except Exception as error:  # an unsupported operator, ...: many types
        raise Unavailable(f"export to ONNX: {first_line(error)}") from None
    return file


def session(file: bytes, threads: int = 1) -> InferenceSession:
    """ONNX Runtime on the processor. Raises Unavailable, and InputError as `onnx_bytes` does."""
    require()
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Unavailable(f"ONNX Runtime: {first_line(error)}") from None


def _lower_weights(graph: GraphProto, above: Mapping[str, TensorProto]) -> None:
    """Weights into the branches that alone use them: ONNX Runtime packs only those that it finds beside their node.

    above: of the graphs around this one, not used there.
    """
    known = {**above, **{tensor.name: tensor for tensor in graph.initializer}}
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    used -= {name for node in graph.node for name in node.output}
    own = [known[name] for name in known if name in used]
    rest = {name: tensor for name, tensor in known.items() if name not in used}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _lower_weights(attribute.g, rest)
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in own]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _forget(graph: GraphProto) -> None:
    """Without the exporter's stack traces, which are half of a file and name folders of this machine."""
    for thing in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget(attribute.g)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and log lines, of which the compilers have many that a user can do nothing about."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def first_line(error: Exception) -> str:
    """What went wrong, in a line: what caused it, where the error itself tells of steps and of logs."""
    while isinstance(error.__cause__, Exception) and str(error.__cause__).strip():
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
