"""Which kernels ONNX Runtime really runs for a bundle's stages: read from the graphs that it optimized.

A Q/DQ graph says what is meant. Whether an engine fuses it, or unpacks every weight at every step and
multiplies floats, shows in its optimized graph only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from ..runtime.backends.ort import session_options
from ..runtime.errors import BackendError
from ..runtime.manifest import load_manifest

__all__ = ["FUSED", "StageKernels", "stage_kernels"]

FUSED = {"int8": "MatMulIntegerToFloat", "int8w": "MatMulNBits", "int4": "MatMulNBits"}
"""What a weight product of each integer precision must become."""

StageKernels = Counter[str]
"""Operator -> how many nodes; a MatMulNBits counts under "MatMulNBits@accuracy_level"."""


def stage_kernels(bundle: str | Path, stage: str) -> StageKernels:
    """Operators of a stage's graph as ONNX Runtime runs it here.

    Loads the stage and writes what it optimized, weights too, to a temporary folder: this takes as much disk
    and memory as the stage. Raises BackendError when ONNX Runtime refuses the graph.
    """
    import onnxruntime

    directory = Path(bundle)
    spec = load_manifest(directory).stages[stage]
    with TemporaryDirectory(prefix="blt-edge-kernels-") as folder:
        path = Path(folder) / "optimized.onnx"
        options = session_options(onnxruntime, spec.precision, threads=None)
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        try:
            onnxruntime.InferenceSession(
                str(directory / spec.file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises many kinds
            raise BackendError(f"{spec.file}: ONNX Runtime refused it: {str(error)[:300]}") from error
        graph = onnx.load(path, load_external_data=False).graph
    return Counter(_operator(node) for node in graph.node)


def _operator(node: Any) -> str:
    if node.op_type != "MatMulNBits":
        return str(node.op_type)
    level = next((item.i for item in node.attribute if item.name == "accuracy_level"), 0)
    return f"MatMulNBits@{level}"
