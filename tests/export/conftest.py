"""What several tests of exports start from."""

from __future__ import annotations

import pytest
from blt_edge.runtime.backends.tensorrt import TensorRtModule, load_tensorrt


@pytest.fixture(scope="session")
def rtx() -> TensorRtModule:
    """TensorRT-RTX, which builds for GPUs that are not here."""
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    return load_tensorrt("tensorrt-rtx")
