"""Graphs of one product over a weight in blocks, run as they are, and computed exactly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def exact(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """x times the weight, in float64."""
    weight, scales = (model.graph.initializers[name].const_value for name in ("weight", "scales"))
    assert weight is not None
    assert scales is not None
    block = weight.shape[0] // scales.shape[0]
    values = weight.numpy().astype(np.float64) * np.repeat(scales.numpy().astype(np.float64), block, axis=0)
    return x @ values
