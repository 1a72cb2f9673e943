"""What the installed ONNX Runtime does with portable graphs, where versions differ."""

from __future__ import annotations

import onnxruntime
import pytest

__all__ = ["VERSION", "fuses_blocks"]

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])

fuses_blocks = pytest.mark.skipif(
    VERSION < (1, 25),
    reason=f"ONNX Runtime {onnxruntime.__version__} unpacks 8-bit blocks of portable graphs: pip install "
    "'onnxruntime>=1.25'",
)
"""For tests of the kernels that portable graphs are fused into; engines have them in every version."""
