"""Trained nets for other runtimes: graphs of branches, and their ONNX files."""

from dynroute.export.files import INPUT, OUTPUTS, Unavailable, first_line, onnx_bytes, quiet, session
from dynroute.export.graphs import Scaled, SkippingGraph, StaticGraph, possible_routes

__all__ = [
    "INPUT",
    "OUTPUTS",
    "Scaled",
    "SkippingGraph",
    "StaticGraph",
    "Unavailable",
    "first_line",
    "onnx_bytes",
    "possible_routes",
    "quiet",
    "session",
]
