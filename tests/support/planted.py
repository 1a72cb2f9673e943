"""Mistakes planted into stage graphs, as an engine with a defect would compute them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
from blt_edge.runtime.integrity import file_record

__all__ = ["ALIKE", "MISTAKES", "plant", "reseal"]


def _longer_window(graph: ir.Graph) -> None:
    """A query sees one key more."""
    (below,) = [node for node in graph if node.op_type == "Sub" and "attention_mask" in str(node.name)]
    window = below.inputs[1]
    assert window is not None
    assert window.const_value is not None
    values = np.asarray(window.const_value.numpy()) + 1
    longer = ir.tensor(values, name="planted.window")
    value = ir.Value(
        name="planted.window",
        shape=ir.Shape(values.shape),
        type=ir.TensorType(longer.dtype),
        const_value=longer,
    )
    graph.register_initializer(value)
    below.replace_input_with(1, value)


def _other_operator(graph: ir.Graph) -> None:
    """The last residual is subtracted."""
    last = [node for node in graph if node.op_type == "Add" and "/layers." in f"/{node.name}"][-1]
    last.op_type = "Sub"


def _nothing(graph: ir.Graph) -> None:
    """No mistake at all."""


MISTAKES: dict[str, Callable[[ir.Graph], None]] = {
    "a longer window": _longer_window,
    "another operator": _other_operator,
}
"""By name, what changes a graph in place."""
ALIKE = {"none": _nothing, **MISTAKES}
"""Likewise, and what changes nothing."""


def plant(graph: Path, mistake: Callable[[ir.Graph], None]) -> Path:
    """A copy of a portable graph with a mistake, beside it, over the same weights."""
    model = ir.load(graph)
    mistake(model.graph)
    wrong = graph.with_name(f"wrong-{graph.name}")
    wrong.write_bytes(ir.to_proto(model).SerializeToString())
    return wrong


def reseal(engine: Path) -> None:
    """Write the records of an engine's changed files anew, as if it had been built like this."""
    path = engine / "engine.json"
    payload = json.loads(path.read_text())
    payload["files"] = {name: asdict(file_record(engine / name)) for name in payload["files"]}
    path.write_text(json.dumps(payload))
