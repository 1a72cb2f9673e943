"""Building a stage's graph in TensorRT-RTX for a device that is not there: no GPU is needed, nothing runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from blt_edge.graphs.stages import AxisRange
from blt_edge.runtime.manifest import Axis

__all__ = ["BuildError", "engine_bytes"]

Axes = Mapping[str, Axis] | Mapping[str, AxisRange]

_PREFILL, _DECODE = 128, 1


class BuildError(AssertionError):
    """TensorRT refused the graph; the message has its reasons."""


def engine_bytes(path: Path, axes: Axes) -> int:
    """Size of a graph's engine for SM86 (Orin's generation), with a prefill and a decode profile."""
    import tensorrt_rtx_bindings as trt

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    # Parser and builder keep plain pointers to the network: it must stay referenced.
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse_from_file(str(path)):
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(f"{path.name}: not parsed: {'; '.join(errors)[:2000]}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    graph = onnx.load(path, load_external_data=False).graph
    for count in (_PREFILL, _DECODE):
        profile = builder.create_optimization_profile()
        for value in graph.input:
            sizes = [_sizes(axis, axes, count) for axis in value.type.tensor_type.shape.dim]
            profile.set_shape(value.name, *([size[place] for size in sizes] for place in range(3)))
        assert config.add_optimization_profile(profile) >= 0, f"{path.name}: profile for {count} refused"
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{path.name}: not built")
    return int(plan.nbytes)


def _sizes(axis: Any, axes: Axes, count: int) -> tuple[int, int, int]:
    """(smallest, typical, largest) of one axis in a profile for `count` new positions."""
    if not axis.dim_param:
        return axis.dim_value, axis.dim_value, axis.dim_value
    limits = axes[axis.dim_param]
    if axis.dim_param == "batch":
        return 1, 1, 1
    if axis.dim_param in ("bytes", "patches"):
        largest = 1 if count == 1 else limits.max
        return 1, min(count, largest), largest
    return limits.min, limits.opt, limits.max
