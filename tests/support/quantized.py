"""A small model whose every matrix has blocks of 32; stages with random weights, and inputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from blt_edge.export.bundle import save_stage
from blt_edge.graphs.config import ModelConfig, parse_config
from blt_edge.graphs.layers import Weight
from blt_edge.graphs.quantize import Recipe, rewrite_stage
from blt_edge.graphs.stages import build_stage
from blt_edge.runtime.backends.ort_session import session_options

from .random_models import RandomModel, base_config

__all__ = [
    "BLOCKY",
    "SPREAD",
    "Session",
    "UnitRanges",
    "build",
    "config_of",
    "give_weights",
    "one_row",
    "random_feeds",
    "save_random_stage",
    "session",
]

BLOCKY = RandomModel(
    "blocky",
    base_config(
        width=32,
        patcher={"hidden_size": 64, "intermediate_size": 96},
        encoder={"intermediate_size": 64},
        decoder={"intermediate_size": 96, "num_key_value_heads": 2},
        global_stack={"intermediate_size": 96},
    ),
)
SPREAD = 6.0
"""The range that `UnitRanges` gives every activation."""

Session = onnxruntime.InferenceSession


class UnitRanges:
    """Ranges as calibration would find them for activations of unit scale."""

    def scale(self, weight_name: str) -> float:
        """Six deviations."""
        return SPREAD


def config_of(model: RandomModel, **top: Any) -> ModelConfig:
    """The model's config as graphs take it."""
    return parse_config({**model.config, **top})


def give_weights(model: ir.Model, random: np.random.Generator | None = None) -> None:
    """Random values for every weight of a stage, of a size that keeps activations near unit scale."""
    random = random or np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if isinstance(value, Weight):
            shape = tuple(value.shape.numpy())
            norm = len(shape) == 1
            data = random.normal(1.0 if norm else 0.0, 0.2 if norm else shape[0] ** -0.5, shape)
            value.const_value = ir.tensor(data.astype(np.float32), name=value.name)


def build(config: ModelConfig, stage: str, recipe: Recipe, seed: int = 0) -> ir.Model:
    """A stage with random weights, rewritten."""
    model = build_stage(config, stage)
    give_weights(model, np.random.default_rng(seed))
    rewrite_stage(model, recipe)
    return model


def save_random_stage(folder: Path, config: ModelConfig, stage: str, recipe: Recipe) -> Path:
    """Write `build` to a folder; returns the graph's path."""
    save_stage(folder, stage, build(config, stage, recipe), lambda _count: None)
    return folder / f"{stage}.onnx"


def session(model: ir.Model, precision: str = "fp32") -> Session:
    """The model in ONNX Runtime, as the runtime sets it up for a stage of this precision."""
    options = session_options(onnxruntime, precision, threads=1)
    data = ir.to_proto(model).SerializeToString()
    return Session(data, options, providers=["CPUExecutionProvider"])


def random_feeds(
    graph: Session, count: int, *, batch: int = 1, slots: int = 7, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of `count` positions of their own, after caches in a shuffled order with some empty slots."""
    random = np.random.default_rng(seed)
    sizes = {"batch": batch, "bytes": count, "patches": count, "past": slots, "patch_length": 4}
    bounds = {"byte_ids": (4, 260), "patch_lengths": (1, 5), "patch_index": (0, 5)}
    result: dict[str, np.ndarray] = {}
    for value in graph.get_inputs():
        shape = [sizes.get(axis, 5) if isinstance(axis, str) else axis for axis in value.shape]
        if value.type == "tensor(float)":
            result[value.name] = random.normal(size=shape).astype(np.float32)
        else:
            result[value.name] = random.integers(*bounds.get(value.name, (0, 1)), shape)
    first = slots + random.integers(0, 20, (batch, 1))
    held = first - 1 - random.permuted(np.tile(np.arange(slots), (batch, 1)), axis=1)
    held[random.random(held.shape) < 0.3] = -1
    return {**result, "positions": first + np.arange(count), "past_positions": held}


def one_row(inputs: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    """One row of `random_feeds`; patch values have none."""
    return {name: value if name == "patch_values" else value[row : row + 1] for name, value in inputs.items()}
