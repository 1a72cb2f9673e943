"""The numpy layers: gates against their definitions, and a whole BLT of them against transformers' files."""

from __future__ import annotations

import math

import numpy as np
import pytest
from blt_edge.graphs.config import ACTIVATIONS
from blt_edge.tools.models.numpy_patcher import GATES, attention, causal_mask, entropies_of
from support.goldens import OUTPUTS, sample
from support.model_store import RandomModels
from support.numpy_blt import NumpyReference
from support.parity_cases import CASES, RULE_CASES
from support.random_models import PARITY_TEXT, RandomModel

NAMES = (
    "gqa_encoder_no_patcher_window",
    "gqa_global_encoder_3_layers_all_cross",
    "gqa_decoder_encoder_3_layers_one_cross",
    "other_activations",
    "tied_embeddings",
    "two_hash_functions",
    "threshold_add",
)
POINTS = [-90.0, -3.0, -0.5, 0.0, 0.5, 3.0, 90.0]
DEFINITIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "linear": lambda x: x,
}


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS.values())))
def test_gates(name: str) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = GATES[name](np.array([POINTS], np.float32))
    assert (found.dtype, found.shape) == (np.float32, (1, len(POINTS)))
    np.testing.assert_allclose(found[0], [DEFINITIONS[name](x) for x in POINTS], rtol=2e-6, atol=1e-7)


def test_a_window_counts_the_query_itself() -> None:
    assert causal_mask(4, 2).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert causal_mask(3, None).sum() == 6


def test_attention_that_sees_one_key_reads_its_value() -> None:
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(heads, 3, 2)) for heads in (4, 2, 2))
    found = attention(query, key, value, np.eye(3, dtype=np.bool_))
    np.testing.assert_allclose(found, np.concatenate([value[0], value[0], value[1], value[1]], axis=1))


def test_entropies() -> None:
    assert entropies_of(np.zeros((2, 260))) == pytest.approx([math.log(260)] * 2)
    assert entropies_of(np.array([500.0, 0.0, 0.0])) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "case", [case for case in CASES + RULE_CASES if case.name in NAMES], ids=lambda case: case.name
)
def test_a_blt_of_them_is_transformers(case: RandomModel, random_models: RandomModels) -> None:
    golden = random_models.golden(case)
    found = NumpyReference(random_models.folder(case)).trace(PARITY_TEXT)
    assert found.patch_lengths == golden.patch_lengths
    for name in OUTPUTS:
        wanted = golden.samples[name]
        scale = max(1.0, float(np.abs(wanted).max()))
        assert np.abs(sample(getattr(found, name)) - wanted).max() <= 3e-5 * scale
