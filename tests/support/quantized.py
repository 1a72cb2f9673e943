"""A small model whose every matrix has blocks of 32, and stages with random weights at any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from blt_edge.export.bundle import save_stage
from blt_edge.graphs.config import ModelConfig, parse_config
from blt_edge.graphs.layers import Weight
from blt_edge.graphs.quantize import Recipe, rewrite_stage
from blt_edge.graphs.stages import build_stage

from .random_models import RandomModel, base_config

__all__ = ["BLOCKY", "SPREAD", "UnitRanges", "build", "config_of", "save_random_stage"]

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


class UnitRanges:
    """Ranges as calibration would find them for activations of unit scale."""

    def scale(self, weight_name: str) -> float:
        """Six deviations."""
        return SPREAD


def config_of(model: RandomModel, **top: Any) -> ModelConfig:
    """The model's config as graphs take it."""
    return parse_config({**model.config, **top})


def build(config: ModelConfig, stage: str, recipe: Recipe, seed: int = 0) -> ir.Model:
    """A stage with random weights, rewritten."""
    model = build_stage(config, stage)
    random = np.random.default_rng(seed)
    for value in model.graph.initializers.values():
        if isinstance(value, Weight):
            shape = tuple(value.shape.numpy())
            norm = len(shape) == 1
            data = random.normal(1.0 if norm else 0.0, 0.2 if norm else shape[0] ** -0.5, shape)
            value.const_value = ir.tensor(data.astype(np.float32), name=value.name)
    rewrite_stage(model, recipe)
    return model


def save_random_stage(folder: Path, config: ModelConfig, stage: str, recipe: Recipe) -> Path:
    """Write `build` to a folder; returns the graph's path."""
    save_stage(folder, stage, build(config, stage, recipe), lambda _count: None)
    return folder / f"{stage}.onnx"
