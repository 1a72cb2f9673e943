"""What the installed ONNX Runtime does with portable graphs, where versions differ."""

from __future__ import annotations

import onnxruntime
import pytest

__all__ = ["VERSION", "attends_in_8_bits", "fuses_blocks"]

VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])

fuses_blocks = pytest.mark.skipif(
    VERSION < (1, 25),
    reason=f"ONNX Runtime {onnxruntime.__version__} unpacks 8-bit blocks of portable graphs: pip install "
    "'onnxruntime>=1.25'",
)
"""For tests of the kernels that portable graphs are fused into; engines have them in every version."""

attends_in_8_bits = pytest.mark.skipif(
    VERSION < (1, 27),
    reason=f"ONNX Runtime {onnxruntime.__version__} has no attention over caches in 8 bits: pip install "
    "'onnxruntime>=1.27'",
)
"""For tests of engines whose caches are in 8 bits."""
