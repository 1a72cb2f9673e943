"""Inverse frequencies against the buffers of transformers' BltRotaryEmbedding, as it runs or as it wrote."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from blt_edge.graphs.config import parse_config
from blt_edge.graphs.rope import RopeConfig, inverse_frequencies
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.rope_cases import EXAMPLES, PARTS, raw_config, read_tables, stack_of
from support.torch_only import transformers_or_skip

factors = st.floats(1.0, 40.0)
originals = st.integers(16, 100_000)
linear = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factors})
llama3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": factors,
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 9.0),
    },
    optional={"original_max_position_embeddings": originals},
)
yarn = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": factors | st.none()},
    optional={
        "original_max_position_embeddings": originals,
        "attention_factor": st.floats(0.1, 2.0),
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "mscale": st.floats(0.1, 2.0),
        "mscale_all_dim": st.floats(0.1, 2.0),
        "truncate": st.booleans(),
    },
)
default = st.fixed_dictionaries({"rope_type": st.just("default")}, optional={"factor": factors})


def of_config(raw: dict[str, Any], section: str) -> tuple[NDArray[np.float32], float]:
    """A part's inverse frequencies and factor."""
    stack = stack_of(parse_config(raw), section)
    assert stack is not None
    return inverse_frequencies(stack.rope, stack.head_dim, stack.max_positions)


@settings(max_examples=80, deadline=None)
@given(
    section=st.sampled_from(PARTS),
    rope=linear | llama3 | yarn | default,
    theta=st.floats(50.0, 1e6),
    theta_place=st.sampled_from(["inside", "beside", "none"]),
    spelling=st.sampled_from(["rope_parameters", "rope_scaling", "type"]),
    beside=st.none() | originals,
    head_dim=st.sampled_from([2, 4, 6, 32, 64, 128]),
    positions=st.integers(64, 200_000),
)
def test_frequencies_equal_transformers(
    section: str,
    rope: dict[str, Any],
    theta: float,
    theta_place: str,
    spelling: str,
    beside: int | None,
    head_dim: int,
    positions: int,
) -> None:
    transformers = transformers_or_skip()
    blt = transformers_or_skip("transformers.models.blt.modeling_blt")
    rope = dict(rope)
    part: dict[str, Any] = {"max_position_embeddings": positions}
    if theta_place == "inside":
        rope["rope_theta"] = theta
    elif theta_place == "beside":
        part["rope_theta"] = theta
    if beside is not None:
        part["original_max_position_embeddings"] = beside
    if spelling == "type":
        rope["type"] = rope.pop("rope_type")
    part["rope_scaling" if spelling == "rope_scaling" else "rope_parameters"] = rope
    raw = raw_config(section, head_dim, part)
    theirs = blt.BltRotaryEmbedding(getattr(transformers.BltConfig(**json.loads(json.dumps(raw))), section))
    ours, scale = of_config(raw, section)
    assert ours.dtype == np.float32
    assert ours.shape == (head_dim // 2,)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=3e-6, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("example", EXAMPLES)
def test_frequencies_equal_the_ones_transformers_wrote(example: str) -> None:
    section, head_dim, part = EXAMPLES[example]
    wanted = read_tables()[example]
    ours, scale = of_config(raw_config(section, head_dim, part), section)
    np.testing.assert_allclose(ours, np.float32(wanted["inverse_frequencies"]), rtol=3e-6, atol=0)
    assert scale == pytest.approx(wanted["scale"], rel=1e-12)


def test_unknown_type_and_missing_parameter() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        inverse_frequencies(RopeConfig("dynamic", 10000.0), 8, 100)
    with pytest.raises(ValueError, match="parameter"):
        inverse_frequencies(RopeConfig("linear", 10000.0), 8, 100)


@pytest.mark.parametrize(
    ("fields", "theta", "head_dim"),
    [
        # Rotations from which and up to which pairs are stretched, given or not.
        ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 3.0}, 10_000.0, 64),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0}, 10_000.0, 64),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, 10_000.0, 64),
        # The ramp's ends at the last dimension, and at one dimension.
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 10_000.0, "original": 100_000}, 50.0, 8),
        ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 4.0, "original": 16}, 10_000.0, 8),
        # The factor on cos and sin.
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3}, 10_000.0, 16),
        ({"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 0.3}, 10_000.0, 16),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, 10_000.0, 16),
        ({"rope_type": "yarn", "factor": 1.5}, 10_000.0, 16),
        ({"rope_type": "yarn", "factor": 0.5}, 10_000.0, 16),
        # A wavelength just over the longest that is blended, and just under the shortest.
        ({"rope_type": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original": 16}, 6.9, 4),
        ({"rope_type": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original": 32}, 1.425, 4),
    ],
)
def test_corners_of_the_ramps_equal_transformers(fields: dict[str, Any], theta: float, head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spelled = {
        "original": "original_max_position_embeddings",
        "low": "low_freq_factor",
        "high": "high_freq_factor",
    }
    named = {"original": "original_max_positions", "low": "low_freq_factor", "high": "high_freq_factor"}
    fields = {"original": 4096, **fields}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=16_384,
        rope_parameters={"rope_theta": theta, **{spelled.get(name, name): fields[name] for name in fields}},
    )
    wanted, scaling = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, "cpu")
    rope = RopeConfig(theta=theta, **{named.get(name, name): value for name, value in fields.items()})
    found, scale = inverse_frequencies(rope, head_dim, 16_384)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=3e-6, atol=0)
    assert scale == pytest.approx(scaling, rel=1e-12)


def test_the_ramp_s_ends_are_rounded_unless_it_says_otherwise() -> None:
    def found(**options: bool) -> NDArray[np.float32]:
        return inverse_frequencies(RopeConfig("yarn", 10_000.0, 4.0, **options), 64, 4096)[0]

    assert (found() == found(truncate=True)).all()
    assert (found() != found(truncate=False)).any()
