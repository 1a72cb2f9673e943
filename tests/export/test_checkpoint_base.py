"""The list of expected tensors against transformers' own modules, and the checks before an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from blt_edge.export.checkpoint_base import (
    PARTS,
    StoredTensor,
    check_tensors,
    expected_tensors,
    parameter_counts,
)
from blt_edge.graphs.config import parse_config
from blt_edge.tools.models.random_checkpoint import SHAPES, scaled_config, write_random_checkpoint
from support.torch_only import transformers_or_skip

TINY = scaled_config("tiny", hash_vocab=53)


def changed(**sections: Any) -> dict[str, Any]:
    merged = {key: {**TINY[key], **new} for key, new in sections.items() if isinstance(new, dict)}
    return {**TINY, **sections, **merged}


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        changed(
            encoder_config={"num_hidden_layers": 3, "cross_attn_all_layers": True, "num_key_value_heads": 2},
            decoder_config={"cross_attn_all_layers": False, "num_key_value_heads": 1},
            global_config={"num_key_value_heads": 2},
            patcher_config={"num_key_value_heads": 1},
        ),
        changed(
            decoder_config={"hidden_size_global": 96},
            global_config={"hidden_size": 96},
            encoder_hash_byte_group_nb_functions=2,
            encoder_hash_byte_group_size=[2, 9],
        ),
        changed(patch_in_forward=False),
        changed(tie_word_embeddings=True),
    ],
)
def test_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    transformers = transformers_or_skip()
    model = transformers.BltForCausalLM(transformers.BltConfig(**config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_tensors(parse_config(config)) == theirs


def test_released_sizes() -> None:
    counts = parameter_counts(parse_config(SHAPES["blt-1b"]))
    assert tuple(counts) == PARTS
    assert counts["patcher"] == 99_512_064
    assert counts["tables"] == (6 * 500_002 + 260) * 1024
    assert sum(counts.values()) == pytest.approx(4.63e9, rel=2e-3)
    decoder_reading = 9 * (2 * 1024 * 1024 + 1024) + 2048 * 2048
    pooling = 4 * 1024 * 1024 + 2 * 1024 + 2 * 1024 * 1024
    assert counts["encoder"] == 4 * 1024 * 1024 + 3 * 1024 * 2816 + 2 * 1024
    assert counts["latent"] == 1_284_608_000 + decoder_reading + pooling


def test_counts_leave_out_pooling_layers_without_effect() -> None:
    three = changed(encoder_config={"num_hidden_layers": 3, "cross_attn_all_layers": True})
    one = changed(encoder_config={"num_hidden_layers": 3})
    assert parameter_counts(parse_config(three)) == parameter_counts(parse_config(one))
    assert parameter_counts(parse_config(changed(patch_in_forward=False)))["patcher"] == 0


class Stored:
    """A tensor file with shapes and no data."""

    path = Path("stored")

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shape = shapes.__getitem__

    def dtype(self, name: str) -> str:
        return "float16"


def holding(shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    file = Stored(shapes)
    return Checkpoint("some model", "huggingface", {}, {name: [StoredTensor(file, name)] for name in shapes})


def test_what_is_wrong_is_named() -> None:
    config = parse_config(TINY)
    shapes = expected_tensors(config)
    check_tensors(holding(shapes), config)
    name = "model.global_transformer.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"{name} is missing; "):
        check_tensors(holding({key: shape for key, shape in shapes.items() if key != name}), config)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 3\], its config asks for \[192, 128\]"):
        check_tensors(holding({**shapes, name: (3, 3)}), config)
    bias = "model.global_transformer.layers.1.mlp.up_proj.bias"
    with pytest.raises(CheckpointError, match=f"{bias} is not part"):
        check_tensors(holding({**shapes, bias: (192,)}), config)
    for unread in ("model.patcher.rotary_emb.inv_freq", "model.local_decoder.embed_tokens.weight"):
        check_tensors(holding({**shapes, unread: (8,)}), config)
    # A patcher may stay behind where none is asked.
    check_tensors(holding(shapes), parse_config(changed(patching_mode="space")))


def test_a_real_checkpoint_passes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "a", TINY, choose_threshold=False)
    with open_checkpoint(tmp_path / "a") as checkpoint:
        check_tensors(checkpoint, parse_config(checkpoint.config))
        assert np.isfinite(checkpoint.tensor("lm_head.weight")).all()
