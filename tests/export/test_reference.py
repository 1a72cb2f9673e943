"""The oracle against transformers called directly, and against the rules it stands for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export import reference as module
from blt_edge.export.reference import Reference, ReferenceModelError, byte_ids, pick_margins
from blt_edge.runtime.errors import requirement
from support.model_store import RandomModels
from support.random_models import PARITY_TEXT, RandomModel, base_config
from support.torch_only import torch_or_skip, transformers_or_skip

torch = torch_or_skip()
transformers = transformers_or_skip()

TEXT = PARITY_TEXT[:120] + PARITY_TEXT[620:740]
PLAIN = RandomModel(
    "oracle",
    base_config(k=2, decoder={"num_key_value_heads": 2}, local_attention_window_len=32),
    share=0.4,
    seed=50,
    dtype="float16",
)
LONGEST = RandomModel("oracle_longest", base_config(max_patch_length=4), share=0.1, seed=51)
NO_PATCHER = RandomModel("oracle_bytes", base_config(patch_in_forward=False), share=None, seed=52)
SPACE = RandomModel("oracle_space", base_config(patching_mode="space"), share=None, seed=53)


@pytest.fixture
def plain(random_models: RandomModels) -> Reference:
    return random_models.reference(PLAIN)


def direct(folder: Path) -> Any:
    return transformers.BltForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_logits_are_those_of_transformers(plain: Reference, random_models: RandomModels) -> None:
    model = direct(random_models.folder(PLAIN))
    with torch.inference_mode():
        expected = model(torch.tensor([byte_ids(TEXT)]), use_cache=False).logits[0].numpy()
    assert plain.logits(TEXT).dtype == np.float32
    np.testing.assert_array_equal(plain.logits(TEXT), expected)
    assert {parameter.dtype for parameter in plain._model.parameters()} == {torch.float32}
    assert plain._model.model.local_decoder.config._attn_implementation == "eager"


def test_trace_has_every_stage(plain: Reference) -> None:
    trace, n = plain.trace(TEXT), len(TEXT)
    closed = len(trace.patch_lengths) - 1
    assert trace.ids.tolist() == byte_ids(TEXT)
    assert trace.logits.shape == (n + 1, 260)
    assert trace.byte_states.shape == (n + 1, 32)
    assert trace.global_states.shape == (closed, 64)
    assert trace.patch_values.shape == (closed, 2 * 2 * 2 * 8 * 2)
    assert trace.patcher_logits is not None
    logits = trace.patcher_logits.astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(trace.entropies, -(probabilities * np.log(probabilities)).sum(-1), atol=1e-5)


def test_boundaries_follow_the_threshold(plain: Reference) -> None:
    entropies, threshold = plain.trace(TEXT).entropies, plain.threshold
    assert entropies is not None
    assert threshold is not None
    starts = [0, 1, *(i + 1 for i in range(1, len(entropies) - 1) if entropies[i] > threshold)]
    lengths = plain.patch_lengths(TEXT)
    assert sum(lengths) == 1 + len(TEXT)
    assert [0, *np.cumsum(lengths)[:-1]] == starts
    assert sum(plain.trace(TEXT).patch_lengths) == 2 + len(TEXT)


@pytest.mark.parametrize("case", [PLAIN, LONGEST, NO_PATCHER, SPACE], ids=lambda case: case.name)
def test_prefixes_do_not_change(case: RandomModel, random_models: RandomModels) -> None:
    reference = random_models.reference(case)
    whole = reference.trace(TEXT)
    for size in (0, 1, 2, 30, 33, 34, 35, 36, 37, 239):
        prefix = reference.trace(TEXT[:size])
        np.testing.assert_allclose(prefix.logits, whole.logits[: size + 1], atol=2e-5)
        closed = len(prefix.patch_lengths) - 1
        np.testing.assert_allclose(prefix.patch_values, whole.patch_values[:closed], atol=2e-5)
        lengths = reference.patch_lengths(TEXT[:size])
        assert min(lengths) > 0
        assert sum(lengths) == size + 1


def test_patch_values_come_from_the_global_states(plain: Reference, random_models: RandomModels) -> None:
    decoder, trace = direct(random_models.folder(PLAIN)).model.local_decoder, plain.trace(TEXT)
    patches = decoder.patch_embedding_projection(torch.from_numpy(trace.global_states))
    expected = []
    for state in patches.reshape(len(patches), 2, 32):
        parts = []
        for layer in decoder.cross_attn_layers:
            normed = layer.k_norm(state)
            parts.append(layer.k_proj(normed).reshape(2, 2, 8).permute(1, 2, 0).flatten())
            parts.append(layer.v_proj(normed).reshape(2, 2, 8).permute(1, 0, 2).flatten())
        expected.append(torch.cat(parts))
    np.testing.assert_allclose(trace.patch_values, torch.stack(expected).detach().numpy(), atol=1e-5)


def test_longest_patch_splits_as_transformers_does(random_models: RandomModels) -> None:
    reference, model = random_models.reference(LONGEST), direct(random_models.folder(LONGEST))
    ids = torch.tensor([byte_ids(TEXT)])
    with torch.inference_mode():
        lengths = model.model.patcher(
            ids, patch_size=4, threshold=model.config.patching_threshold, max_patch_length=4
        )[1]
        expected = model(ids, use_cache=False).logits[0].numpy()
    assert reference.patch_lengths(TEXT) == [length for length in lengths[0].tolist() if length]
    assert max(reference.patch_lengths(TEXT)) == 4
    np.testing.assert_allclose(reference.logits(TEXT)[:-1], expected[:-1], atol=2e-5)


def test_every_byte_a_patch_without_patcher(random_models: RandomModels) -> None:
    reference = random_models.reference(NO_PATCHER)
    assert reference.patch_lengths(b"abc") == [1, 1, 1, 1]
    assert reference.threshold is None
    trace = reference.trace(b"abc")
    assert trace.patcher_logits is trace.entropies is None


def test_greedy_is_the_argmax_byte_after_byte(plain: Reference) -> None:
    prompt, count = TEXT[:40], 24
    data = plain.greedy(prompt, count)
    assert len(data) == count
    logits = plain.logits(prompt + data)[len(prompt) : -1].copy()
    logits[:, list(module.SUPPRESSED)] = -np.inf
    assert bytes((logits.argmax(-1) - 4).tolist()) == data
    lengths = lambda text: plain.trace(text).patch_lengths  # noqa: E731
    assert plain._greedy_by_steps(prompt, count, lengths) == data


def test_greedy_ends_at_eos_and_suppresses_the_others(
    plain: Reference, random_models: RandomModels, tmp_path: Path
) -> None:
    model = direct(random_models.folder(PLAIN))
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 3]] *= 10
        model.lm_head.weight[2] = model.lm_head.weight[100] * 3
    model.save_pretrained(tmp_path)
    shutil.copy(random_models.folder(PLAIN) / "config.json", tmp_path)
    changed = Reference.load(tmp_path)
    data = changed.greedy(TEXT[:40], 64)
    assert len(data) < 64
    last = changed.logits(TEXT[:40] + data)[-1]
    last[list(module.SUPPRESSED)] = -np.inf
    assert last.argmax() == 2
    with_patches = changed._greedy_by_steps(TEXT[:40], 64, lambda d: changed.trace(d).patch_lengths)
    assert with_patches == data


def test_given_patches(plain: Reference) -> None:
    own = plain.trace(TEXT).patch_lengths
    np.testing.assert_allclose(plain._run(TEXT, own).logits, plain.logits(TEXT), atol=2e-5)
    other = plain._run(TEXT, [1] * (len(TEXT) + 2)).logits
    assert np.abs(other - plain.logits(TEXT)).max() > 0.1
    for wrong in ([1] * (len(TEXT) + 1), [*own, 0], [len(TEXT) + 3, -1]):
        with pytest.raises(ValueError, match="sum to"):
            plain._run(TEXT, wrong)


def test_a_stored_generation_config_has_no_say(
    plain: Reference, random_models: RandomModels, tmp_path: Path
) -> None:
    shutil.copytree(random_models.folder(PLAIN), tmp_path, dirs_exist_ok=True)
    settings = {"repetition_penalty": 9.0, "suppress_tokens": [100], "min_new_tokens": 3, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert Reference.load(tmp_path).greedy(TEXT[:40], 8) == plain.greedy(TEXT[:40], 8)


def test_pick_margins_ignore_suppressed_ids() -> None:
    logits = np.zeros((2, 260), np.float32)
    logits[0, [0, 1, 3]] = 99
    logits[0, [2, 7]] = 5, 3
    logits[1, 50] = 1
    assert pick_margins(logits).tolist() == [2, 1]


def write_config(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match=r"no Hugging Face.*config\.json: can't be read"):
        Reference.load(tmp_path)
    with pytest.raises(ReferenceModelError, match="not of model_type blt"):
        Reference.load(write_config(tmp_path, model_type="llama"))
    with pytest.raises(ReferenceModelError, match="transformers can't load it") as error:
        Reference.load(write_config(tmp_path, **PLAIN.config))
    assert "\n" not in str(error.value)


def test_truncated_and_missing_weights(random_models: RandomModels, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(random_models.folder(PLAIN), tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ReferenceModelError, match="transformers can't load it"):
        Reference.load(tmp_path)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.patcher.lm_head.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ReferenceModelError, match=r"missing keys: model\.patcher\.lm_head\.weight"):
        Reference.load(tmp_path)


def test_missing_or_old_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert module.reference_available()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(ReferenceModelError, match=re.escape(f"pip install {requirement('validate')}")):
            Reference.load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", "5.9.1")
        with pytest.raises(ReferenceModelError, match=r"5\.9\.1 is too old"):
            Reference.load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert not module.reference_available()


def test_importing_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, blt_edge.export.validate, blt_edge.export.golden, blt_edge.export.reference as r\n"
        "r.reference_available()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numbers_may_be_written_either_way(
    plain: Reference, random_models: RandomModels, tmp_path: Path
) -> None:
    """transformers refuses 32.0 for a width and 2 for a threshold; JSON does not tell them apart."""

    def floats(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: floats(item) for name, item in value.items()}
        if isinstance(value, list):
            return [floats(item) for item in value]
        return float(value) if type(value) is int else value

    shutil.copytree(random_models.folder(PLAIN), tmp_path, dirs_exist_ok=True)
    config = floats(json.loads((tmp_path / "config.json").read_text()))
    config["global_config"]["initializer_range"] = 0
    write_config(tmp_path, **config)
    np.testing.assert_array_equal(Reference.load(tmp_path).logits(TEXT), plain.logits(TEXT))
