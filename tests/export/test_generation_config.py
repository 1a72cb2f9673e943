"""What a checkpoint says of generating: ids that end texts, defaults of sampling, nothing lost in silence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from blt_edge.export import export_checkpoint
from blt_edge.export.checkpoint import CheckpointError
from blt_edge.export.generation_config import read_generation
from blt_edge.runtime import BltModel, BundleError, GenerationOptions
from blt_edge.runtime.generation_spec import GenerationSpec
from support.model_store import RandomModels
from support.parity_cases import CASES
from support.random_models import PARITY_TEXT
from support.torch_only import torch_or_skip, transformers_or_skip

PROMPT = PARITY_TEXT[:60]


@pytest.fixture
def source(random_models: RandomModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_models.folder(CASES[0]), tmp_path / "checkpoint"))


def says(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **fields}))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_text_ends_where_transformers_ends_it(source: Path, tmp_path: Path, name: str) -> None:
    torch, transformers = torch_or_skip(), transformers_or_skip()

    whole = BltModel.load(export_checkpoint(source, tmp_path / "plain"), threads=1)
    free = whole.generate(PROMPT, GenerationOptions(max_new_bytes=24)).data
    end = free[8]
    says(source, name, eos_token_id=[2, 4 + end])
    model = BltModel.load(export_checkpoint(source, tmp_path / "bundle"), threads=1)
    assert model.manifest.generation.end_ids == (2, 4 + end)
    reference = transformers.BltForCausalLM.from_pretrained(source, attn_implementation="eager")
    ids = torch.tensor([[1, *(byte + 4 for byte in PROMPT)]])
    out = reference.generate(
        ids, max_new_tokens=24, use_cache=False, do_sample=False, suppress_tokens=[0, 1, 3], pad_token_id=2
    )
    *kept, last = out[0, ids.shape[1] :].tolist()
    assert last == 4 + end
    assert len(kept) < 9
    for draft in ("none", "auto", "decoder", "patcher", "lookup"):
        result = model.generate(PROMPT, GenerationOptions(max_new_bytes=24, draft=draft, logprobs=1))
        assert (result.data, result.finish_reason) == (bytes(token - 4 for token in kept), "eos"), draft
        assert len(result.details) == len(result.data)
        assert free.startswith(result.data)


def test_a_text_goes_on_behind_its_end(source: Path, tmp_path: Path) -> None:
    plain = BltModel.load(export_checkpoint(source, tmp_path / "plain"), threads=1)
    end = plain.generate(PROMPT, GenerationOptions(max_new_bytes=9)).data[8]
    says(source, "generation_config.json", eos_token_id=4 + end)
    model = BltModel.load(export_checkpoint(source, tmp_path / "bundle"), threads=1)
    sequence = model.sequence()
    # A prompt may hold the byte: only choosing it ends a text.
    prompt = PROMPT + bytes([end]) + b"more"
    options = GenerationOptions(max_new_bytes=24, prompt_details=True)
    result = model.generate(prompt, options, sequence=sequence)
    assert bytes(detail.byte for detail in result.prompt_details) == prompt
    assert sequence.length == 1 + len(prompt) + len(result.data)
    again = model.generate(b"x", options, sequence=sequence)
    assert again.data == model.generate(prompt + result.data + b"x", options).data


def test_a_special_id_that_ends_texts_may_be_chosen() -> None:
    assert GenerationSpec((0, 2)).suppressed == (1, 3)
    assert GenerationSpec().suppressed == (0, 1, 3)


def test_a_manifest_without_the_end_of_all_texts_is_refused() -> None:
    with pytest.raises(BundleError, match="end_ids: id 2 is missing"):
        GenerationSpec((5,))


SAMPLED = {"temperature": 1.0, "top_k": 50}


@pytest.mark.parametrize(
    ("config", "stored", "ends", "options", "left_out"),
    [
        ({}, None, (2,), {}, ()),
        ({"eos_token_id": None}, None, (2,), {}, ()),
        ({"eos_token_id": [2, 48]}, None, (2, 48), {}, ()),
        ({"eos_token_id": [2, 48]}, {}, (2, 48), {}, ()),
        ({"eos_token_id": 48}, {"eos_token_id": [5, 0]}, (0, 2, 5), {}, ()),
        ({"temperature": 0.5, "do_sample": True}, None, (2,), {"temperature": 0.5, "top_k": 50}, ()),
        ({"temperature": 0.5, "do_sample": True}, {}, (2,), {}, ()),
        ({}, {"do_sample": True}, (2,), SAMPLED, ()),
        ({}, {"do_sample": True, "top_k": 0, "top_p": 0.9}, (2,), {"temperature": 1.0, "top_p": 0.9}, ()),
        ({}, {"temperature": 0.6}, (2,), {}, ("temperature=0.6 (without do_sample)",)),
        ({}, {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1}, (2,), {}, ()),
        ({}, {"max_new_tokens": 99, "repetition_penalty": 1.2, "stop_strings": "end"}, (2,),
         {"repetition_penalty": 1.2, "max_new_bytes": 99, "stop": ["end"]}, ()),
        ({}, {"num_beams": 4, "typical_p": 0.9, "new_idea": 3, "length_penalty": 2.0}, (2,), {},
         ("num_beams=4", "typical_p=0.9", "new_idea=3")),
        ({}, {"num_beams": 1, "pad_token_id": -1, "max_length": 20, "bad_words_ids": None}, (2,), {}, ()),
        ({"eos_token_id": 48.0}, {"top_k": 9.0, "max_new_tokens": 5.0, "do_sample": True}, (2, 48),
         {"temperature": 1.0, "top_k": 9, "max_new_bytes": 5}, ()),
        ({}, {"suppress_tokens": [3, 0]}, (2,), {}, ()),
        ({}, {"suppress_tokens": [3, 100]}, (2,), {}, ("suppress_tokens=[3, 100]",)),
        ({}, {"eos_token_id": [3], "suppress_tokens": [3]}, (2, 3), {}, ("suppress_tokens=[3]",)),
        ({}, {"a\x1b[2J": 1}, (2,), {}, ("'a\\x1b[2J'=1",)),
    ],
)  # fmt: skip
def test_every_field_has_an_effect_or_is_named(
    tmp_path: Path,
    config: dict[str, Any],
    stored: dict[str, Any] | None,
    ends: tuple[int, ...],
    options: dict[str, Any],
    left_out: tuple[str, ...],
) -> None:
    if stored is not None:
        says(tmp_path, "generation_config.json", **stored)
    assert read_generation(tmp_path, config) == GenerationSpec(ends, options, left_out)


def test_every_field_of_transformers_is_known(tmp_path: Path) -> None:
    transformers = transformers_or_skip()

    transformers.GenerationConfig().save_pretrained(tmp_path)
    says(tmp_path, "generation_config.json", **transformers.GenerationConfig().to_dict())
    assert read_generation(tmp_path, {}) == GenerationSpec()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"eos_token_id": -1}, "eos_token_id: -1 is no id; allowed are ids from 0 to 259"),
        ({"eos_token_id": [2, True]}, "eos_token_id: True is no id"),
        ({"eos_token_id": "2"}, "eos_token_id: '2' is no id"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'; allowed is a finite number"),
        ({"do_sample": True, "top_p": 2}, "top_p is 2; allowed is a finite number > 0 and <= 1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3; allowed is a whole number"),
        ({"stop_strings": [1]}, "a stop string is 1; allowed are strings and bytes"),
        ({"stop_strings": 7}, "stop is 7; allowed is a list or tuple of strings or bytes"),
    ],
)
def test_what_is_out_of_range_is_refused(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    says(tmp_path, "generation_config.json", **fields)
    with pytest.raises(CheckpointError, match=re.escape(told)) as error:
        read_generation(tmp_path, {})
    assert str(tmp_path / "generation_config.json") in str(error.value)


def test_defaults_come_with_the_bundle(source: Path, tmp_path: Path) -> None:
    settings = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "max_new_tokens": 12,
        "stop_strings": ["~"],
    }
    says(source, "generation_config.json", **settings)
    model = BltModel.load(export_checkpoint(source, tmp_path / "bundle"), threads=1)
    assert model.defaults == GenerationOptions(max_new_bytes=12, temperature=0.7, stop=("~",))
    assert len(model.generate(PROMPT).data) <= 12
    assert len(model.generate(PROMPT, GenerationOptions(max_new_bytes=20)).data) == 20


def test_a_whole_number_is_what_a_manifest_gives_back(tmp_path: Path) -> None:
    text = json.dumps({"do_sample": True, "temperature": 2**63 - 1})
    (tmp_path / "generation_config.json").write_text(text)
    temperature = read_generation(tmp_path, {}).options["temperature"]
    assert (type(temperature), temperature) == (float, 2.0**63)
