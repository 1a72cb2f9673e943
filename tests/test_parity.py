"""A bundle must compute what transformers computes: random checkpoints of many shapes, a hard text, float32.

The text holds every byte value and is longer than every window. Logits may differ by 1e-4 of their scale,
patch boundaries and greedy bytes not at all, and the size of the prefill chunks must not show.

The judge is what transformers once wrote into tests/data/golden, on every platform. Where torch is installed,
transformers runs as well: all rows are compared with it, and the golden files are checked against it.
Elsewhere a BLT in numpy takes its place, which the golden files judge too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.reference import SUPPRESSED, byte_ids
from blt_edge.graphs.config import parse_config
from blt_edge.runtime import BltModel, GenerationOptions
from support.goldens import OUTPUTS, read_golden, sample
from support.model_store import RandomModels
from support.parity_cases import CASES, GREEDY_BYTES, RULE_CASES, RULE_GREEDY_BYTES
from support.random_models import PARITY_TEXT, RandomModel, choose_threshold, write_random_model

Bundle = Callable[[RandomModel], Path]

WITH_THRESHOLD = [case for case in CASES + RULE_CASES if case.share is not None]

by_name = pytest.mark.parametrize("case", CASES + RULE_CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def bundle(random_models: RandomModels, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The exported bundle of a case, made once."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def export(case: RandomModel) -> Path:
        if case.name not in made:
            made[case.name] = export_checkpoint(random_models.folder(case), folder / case.name)
        return made[case.name]

    return export


def close(found: np.ndarray, wanted: np.ndarray, share: float) -> None:
    """Both of one shape, and no value further off than this share of the scale (at least 1)."""
    assert found.shape == wanted.shape
    scale = max(1.0, float(np.abs(wanted).max()))
    assert float(np.abs(found.astype(np.float64) - wanted).max()) <= share * scale


def closed_or_open(lengths: tuple[int, ...]) -> list[int]:
    """A trace's lengths, which cover the position after the text too, as lengths over the text alone."""
    *closed, last = lengths
    return [*closed, last - 1] if last > 1 else closed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_texts_that_share_passes(case: RandomModel, random_models: RandomModels, tmp_path: Path) -> None:
    """Ragged texts in one pass: like each alone to 1e-5 of scale, and like the reference."""
    texts = [PARITY_TEXT[:300], PARITY_TEXT[900:1000], b"", PARITY_TEXT[1200:1201]]
    bundle = export_checkpoint(random_models.folder(case), tmp_path / "bundle", rows=(4,))
    model = BltModel.load(bundle, threads=1, prefill_chunk=64)
    found: dict[int, np.ndarray] = {}

    def read(number: int) -> None:
        found[number] = model.logits(texts[number])

    batch = model.batch()
    tasks = [batch.start(partial(read, number)) for number in range(len(texts))]
    while batch.step():
        pass
    assert [task.error for task in tasks] == [None] * len(texts)
    for number, text in enumerate(texts):
        close(found[number], model.logits(text), 1e-5)
    close(found[0], random_models.reference(case).trace(PARITY_TEXT).logits[: 1 + len(texts[0])], 1e-4)


@by_name
def test_every_stage_row_and_boundary(case: RandomModel, random_models: RandomModels, bundle: Bundle) -> None:
    golden, wanted = random_models.golden(case), random_models.reference(case).trace(PARITY_TEXT)
    model = BltModel.load(bundle(case), threads=1)
    found = model.trace(PARITY_TEXT)
    assert golden.reference.startswith("transformers 5")
    assert float(np.abs(golden.samples["logits"]).max()) > 1.0, "logits too small to compare"
    assert wanted.patch_lengths == golden.patch_lengths
    assert model.patch_lengths(PARITY_TEXT) == closed_or_open(golden.patch_lengths)
    for name in OUTPUTS:
        expected = getattr(wanted, name)
        assert (name in golden.samples) == (name in found) == (expected is not None)
        if expected is not None:
            close(sample(found[name]), golden.samples[name], 1e-4)
            close(found[name], expected, 1e-4)
            # Neither may the file be stale, nor, without torch, the reference wrong.
            close(sample(expected), golden.samples[name], 3e-5)
    assert (wanted.entropies is None) == (golden.entropies is None) == ("entropies" not in found)
    if golden.entropies is not None:
        for entropies in (model.entropies(PARITY_TEXT), found["entropies"]):
            assert np.abs(entropies - golden.entropies).max() <= 1e-4
            assert np.abs(entropies - wanted.entropies).max() <= 1e-4
        assert np.abs(golden.entropies - wanted.entropies).max() <= 3e-5


@by_name
def test_greedy_bytes(case: RandomModel, random_models: RandomModels, bundle: Bundle) -> None:
    count = GREEDY_BYTES if case in CASES else RULE_GREEDY_BYTES
    greedy = random_models.greedy(case, count)
    model = BltModel.load(bundle(case), threads=1)
    result = model.generate(greedy.prompt, GenerationOptions(max_new_bytes=count))
    assert result.data == greedy.data
    assert len(result.data) == count
    assert result.finish_reason == "length"
    # A model is causal, so one pass over prompt and bytes says what each of the reference's steps would pick.
    greedy = random_models.golden(case).greedy
    logits = random_models.reference(case).logits(greedy.prompt + greedy.data)[len(greedy.prompt) : -1].copy()
    logits[:, list(SUPPRESSED)] = -np.inf
    assert logits.argmax(axis=1).tolist() == byte_ids(greedy.data)[1:]


@by_name
def test_prefill_chunks_do_not_show(case: RandomModel, random_models: RandomModels, bundle: Bundle) -> None:
    wanted = random_models.golden(case).samples["logits"]
    by_size = {
        size: BltModel.load(bundle(case), threads=1, prefill_chunk=size).logits(PARITY_TEXT)
        for size in (1, 7, 256)
    }
    for found in by_size.values():
        close(found, by_size[256], 1e-5)
        close(sample(found), wanted, 1e-4)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], RULE_CASES[0]], ids=lambda case: case.name)
def test_short_texts(case: RandomModel, random_models: RandomModels, bundle: Bundle) -> None:
    # where windows, patches and hashes are not full yet, and at an end inside or at the end of a patch
    model, reference = BltModel.load(bundle(case), threads=1), random_models.reference(case)
    whole = reference.logits(PARITY_TEXT)
    for size in (0, 1, 2, 3, 7, 16, 17, 40, 129):
        text = PARITY_TEXT[:size]
        close(model.logits(text), whole[: 1 + size], 1e-4)
        assert model.patch_lengths(text) == reference.patch_lengths(text)


def test_the_text_is_hard() -> None:
    assert len(PARITY_TEXT) > 1600
    assert set(PARITY_TEXT) == set(range(256))
    assert sum(byte >= 0x80 for byte in PARITY_TEXT) > 300


# Of a field of a section (None: of the whole config), values that some case has.
COVERED: dict[tuple[str | None, str], set[Any]] = {
    ("encoder_config", "cross_attn_k"): {1, 2, 4},
    (None, "encoder_hash_byte_group_nb_functions"): {1, 2},
    (None, "local_attention_window_len"): {16, 128, None, "missing"},
    ("patcher_config", "sliding_window"): {16, 128, None, "missing"},
    ("encoder_config", "num_hidden_layers"): {1, 3},
    ("encoder_config", "cross_attn_all_layers"): {True, False},
    ("decoder_config", "cross_attn_all_layers"): {False, "missing"},
    (None, "tie_word_embeddings"): {True, "missing"},
    (None, "patch_in_forward"): {False, "missing"},
}
PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")


def test_the_cases_cover_every_shape() -> None:
    configs = [case.config for case in CASES]

    def values(section: str | None, name: str) -> list[Any]:
        return [(config[section] if section else config).get(name, "missing") for config in configs]

    for place, wanted in COVERED.items():
        assert wanted <= set(values(*place)), place
    for part, name in product(PARTS, ("num_key_value_heads", "hidden_act")):
        assert len(set(values(part, name))) > 1
    assert len(set(map(str, values(None, "encoder_hash_byte_group_size")))) >= 3
    assert {0.0, 1.0} <= {case.share for case in CASES}
    for spelling in ("rope_theta", "rope_parameters", "rope_scaling"):
        assert any(spelling in config["encoder_config"] for config in configs)
    parsed = [parse_config({**config, "patching_mode": "entropy"}) for config in configs]
    assert {config.token_projection for config in parsed} == {True, False}


@pytest.mark.parametrize("case", WITH_THRESHOLD, ids=lambda case: case.name)
def test_thresholds_hang_on_no_rounding(case: RandomModel, random_models: RandomModels) -> None:
    """Else a processor that rounds otherwise would write another config, and no golden file would fit."""
    entropies, noise = random_models.golden(case).entropies, np.random.default_rng(0)
    written = json.loads((random_models.folder(case) / "config.json").read_text())
    assert entropies is not None
    assert case.share is not None
    for _ in range(10):
        other = (entropies + noise.uniform(-2e-5, 2e-5, entropies.shape)).astype(np.float32)
        assert choose_threshold(other, case.config, case.share) == written["patching_threshold"]


def test_a_golden_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    other = replace(CASES[0], seed=99)
    folder = write_random_model(other, tmp_path)
    with pytest.raises(
        AssertionError, match=r"was made from other weights.*: python tests/support/write_gol"
    ):
        read_golden(other, folder)
    with pytest.raises(AssertionError, match=r"none\.safetensors is missing"):
        read_golden(replace(other, name="none"), folder)
