"""Small graphs of x [bytes, 4] to y [bytes, 4], for builders that have to take or refuse them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["FEW", "plain_product", "save_graph"]

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["bytes", 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["bytes", 4])
FEW: tuple[dict[str, tuple[int, int, int]], ...] = ({"bytes": (1, 2, 4)},)
"""One profile for them."""


def save_graph(
    folder: Path, nodes: list[Any], inits: list[Any] | None = None, inputs: list[Any] | None = None
) -> Path:
    """Write `broken.onnx` with these nodes, initializers and further inputs; returns its path."""
    graph = helper.make_graph(nodes, "g", [X, *(inputs or [])], [Y], inits or [])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "broken.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def plain_product(folder: Path) -> Path:
    """A graph that everybody takes."""
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    return save_graph(folder, [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], [weight])
