"""Every stage at every precision builds in TensorRT for Orin's generation of GPUs; no GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from blt_edge.calibration.precision import STAGE_PRECISIONS
from blt_edge.calibration.rewrite import Recipe
from blt_edge.graphs.stages import STAGE_NAMES, axis_ranges
from support.quantized import BLOCKY, UnitRanges, config_of, save_random_stage
from support.random_models import RandomModel, base_config
from support.tensorrt_rtx import engine_bytes

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is an optional wheel")

# One layer as wide as the released 1B's: an engine's size is then its weights, not its kernels.
WIDE = RandomModel(
    "wide",
    base_config(
        width=1024,
        encoder={"num_attention_heads": 16, "intermediate_size": 2816},
        decoder={"num_attention_heads": 16, "intermediate_size": 2816},
        global_stack={"num_attention_heads": 16, "num_hidden_layers": 1, "intermediate_size": 5632},
    ),
)


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("precision", STAGE_PRECISIONS)
def test_stage_builds_with_prefill_and_decode_profiles(stage: str, precision: str, tmp_path: Path) -> None:
    config = config_of(BLOCKY)
    path = save_random_stage(tmp_path, config, stage, Recipe(precision, ranges=UnitRanges()))
    assert engine_bytes(path, axis_ranges(config)) > 0


def test_engine_sizes_show_that_precisions_are_real(tmp_path: Path) -> None:
    config = config_of(WIDE)
    sizes = {}
    for precision in ("fp16", "int8", "int8w", "int4"):
        folder = tmp_path / precision
        folder.mkdir()
        # Plain rounding: the search would change no size.
        recipe = Recipe(precision, search="rtn", ranges=UnitRanges())
        path = save_random_stage(folder, config, "latent", recipe)
        sizes[precision] = engine_bytes(path, axis_ranges(config))
    assert sizes["int8"] <= 0.65 * sizes["fp16"]
    assert sizes["int8w"] <= 0.65 * sizes["fp16"]
    assert sizes["int4"] <= 0.4 * sizes["fp16"]
