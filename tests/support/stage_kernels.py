"""Which kernels ONNX Runtime really runs for a bundle's stages: read from the graphs that it optimized.

A Q/DQ graph says what is meant. Whether an engine fuses it, or unpacks every weight at every step and
multiplies floats, shows in its optimized graph only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnxruntime
from blt_edge.runtime.backends.ort_session import session_options
from blt_edge.runtime.manifest import load_manifest

__all__ = ["FUSED", "stage_kernels"]

FUSED = {"int8": "MatMulIntegerToFloat", "int8w": "MatMulNBits", "int4": "MatMulNBits"}
"""What a weight product of each integer precision must become."""


def stage_kernels(bundle: Path, stage: str) -> Counter[str]:
    """How often each operator occurs in a stage's graph as ONNX Runtime runs it here.

    A MatMulNBits counts under "MatMulNBits@accuracy_level".
    """
    spec = load_manifest(bundle).stages[stage]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = session_options(onnxruntime, spec.precision, threads=None)
        options.optimized_model_filepath = str(path)
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, "optimized.data")
        graph = str(bundle / spec.file)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(path, load_external_data=False).graph.node
    levels = [{item.name: item.i for item in node.attribute}.get("accuracy_level", 0) for node in nodes]
    return Counter(
        f"{node.op_type}@{level}" if node.op_type == "MatMulNBits" else node.op_type
        for node, level in zip(nodes, levels, strict=True)
    )
