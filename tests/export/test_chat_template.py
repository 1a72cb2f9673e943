"""Which chat template a bundle gets, from where, and what is not taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blt_edge.export import export_checkpoint, plan_export
from blt_edge.export.chat_template import find_chat_template
from blt_edge.export.checkpoint_base import CheckpointError
from blt_edge.export.quantize import quantize_bundle
from blt_edge.runtime import chat_template
from blt_edge.runtime.chat_spec import ChatSpec
from blt_edge.runtime.chat_template import load_chat_template
from blt_edge.runtime.errors import BltError, OptionError
from blt_edge.runtime.integrity import check_files
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.names import CHAT_TEMPLATE_NAME
from blt_edge.tools.models.random_checkpoint import scaled_config, write_random_checkpoint
from support.chat_templates import CHATML, TEMPLATES

pytest.importorskip("jinja2", reason="needs jinja2: pip install 'blt-edge[serve]'")

CONFIG = scaled_config("tiny", hash_vocab=53)
OTHER = TEMPLATES["tags"]


def configure(folder: Path, **fields: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


# 1. Where it comes from.


def test_without_one_there_is_none(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    configure(tmp_path, eos_token="</s>", chat_template=None)
    assert find_chat_template(tmp_path) is None


def test_the_file_wins_over_the_config_and_a_given_one_over_both(tmp_path: Path) -> None:
    configure(tmp_path, chat_template=OTHER)
    plan = find_chat_template(tmp_path)
    assert (plan.text, plan.origin) == (OTHER, f"{tmp_path / 'tokenizer_config.json'}, chat_template")
    (tmp_path / CHAT_TEMPLATE_NAME).write_text(CHATML)
    plan = find_chat_template(tmp_path)
    assert (plan.text, plan.origin) == (CHATML, str(tmp_path / CHAT_TEMPLATE_NAME))
    given = tmp_path / "given"
    given.write_text(TEMPLATES["turns"])
    plan = find_chat_template(tmp_path, given)
    assert (plan.text, plan.origin) == (TEMPLATES["turns"], str(given))
    assert find_chat_template(tmp_path, "none") is None


def test_of_named_ones_it_is_the_default(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "{% if %}"}, {"name": "default", "template": CHATML}]
    configure(tmp_path, chat_template=named)
    plan = find_chat_template(tmp_path)
    assert plan.text == CHATML
    assert plan.origin.endswith('tokenizer_config.json, chat_template "default" of rag, default')


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, r"chat_template is 5; allowed are a text and a list of named ones"),
        ({}, r"chat_template is an object"),
        (["x"], r"chat_template is \['x'\]"),
        ([], r'none named "default" \(there are: none\)'),
        ([{"name": "rag\x1b", "template": CHATML}], r"there are: 'rag\\x1b'\)"),
        ([{"name": "default", "template": 5}], r"there are: default\)"),
        ("a\ud800", r"half a character"),
        ("", r"leaves out what a user says"),
        ("{% if %}", r"TemplateSyntaxError in line 1"),
        ("x" * 300_000, r"at most 262144 bytes"),
    ],
)
def test_what_is_none_is_refused_and_how_to_go_on_told(tmp_path: Path, value: Any, words: str) -> None:
    configure(tmp_path, chat_template=value)
    with pytest.raises(CheckpointError, match=words) as refused:
        find_chat_template(tmp_path)
    told = str(refused.value)
    assert told.isprintable()
    assert told.startswith(f"{tmp_path / 'tokenizer_config.json'}")
    assert told.endswith(
        "; give another with --chat-template FILE, or leave it out with --chat-template none"
    )
    assert find_chat_template(tmp_path, "none") is None


def test_a_mark_of_the_encoding_is_no_part_of_it(tmp_path: Path) -> None:
    """As editors on Windows write it; else each prompt would begin with it."""
    (tmp_path / CHAT_TEMPLATE_NAME).write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert find_chat_template(tmp_path).text == CHATML


def test_of_a_tokenizer_that_can_t_be_read_it_is_told_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    configure(tmp_path, eos_token="</s>")
    assert find_chat_template(tmp_path) is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        configure(tmp_path, eos_token="</s>", chat_template=CHATML)
        (tmp_path / name).write_text("{")
        with pytest.raises(CheckpointError, match=rf"{name}: not valid JSON.*--chat-template none$"):
            find_chat_template(tmp_path)
        assert find_chat_template(tmp_path, "none") is None


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    for given, words in (
        ("binary", "UTF-8"),
        ("nothing", "can't be read: No such file"),
        (".", "can't be read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            find_chat_template(tmp_path, tmp_path / given)


def test_without_jinja_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        def ask(self, request: Any, patience: float) -> Any:
            raise OptionError("chat templates need jinja2: pip install x")

    monkeypatch.setattr(chat_template, "_worker", Without)
    assert find_chat_template(tmp_path) is None
    configure(tmp_path, chat_template=CHATML)
    with pytest.raises(
        OptionError, match=r"pip install x; or leave the template out with --chat-template none"
    ):
        find_chat_template(tmp_path)


# 2. What its eos_token is.


def test_an_end_is_text_unless_the_tokenizer_has_it_as_an_id_without_bytes(tmp_path: Path) -> None:
    (tmp_path / CHAT_TEMPLATE_NAME).write_text(CHATML)
    text, none = ChatSpec("<end>"), ChatSpec(None)
    for fields, tokenizer, expected in (
        ({}, {}, none),
        ({"eos_token": None}, {}, none),
        ({"eos_token": ""}, {}, none),
        ({"eos_token": "<end>"}, {}, text),
        ({"eos_token": {"content": "<end>", "lstrip": False}}, {}, text),
        ({"eos_token": "<end>", "added_tokens_decoder": {"2": {"content": "<end>"}}}, {}, none),
        ({"eos_token": "<end>", "added_tokens_decoder": {"2": {"content": "</s>"}}}, {}, text),
        ({"eos_token": "<end>", "added_tokens_decoder": {"70": {"content": "<end>"}}}, {}, text),
        ({"eos_token": "<end>", "added_tokens_decoder": {"2": None, "3": {}}}, {}, text),
        ({"eos_token": "<end>"}, {"added_tokens": [{"id": 2, "content": "<end>"}]}, none),
        ({"eos_token": "<end>"}, {"added_tokens": [{"id": 260, "content": "<end>"}, 5]}, text),
        ({"eos_token": "<end>"}, {"model": {"vocab": {"<end>": 2}}}, none),
        ({"eos_token": "<end>"}, {"model": {"vocab": {"<end>": "2", "a": []}}}, none),
        ({"eos_token": "<end>"}, {"model": 5, "added_tokens": 5}, text),
    ):
        configure(tmp_path, **fields)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert find_chat_template(tmp_path).spec == expected, (fields, tokenizer)
    for wrong in (5, ["<end>"], "\x1b[2J", "x" * 101, {"content": 5}):
        configure(tmp_path, eos_token=wrong)
        with pytest.raises(
            CheckpointError, match=r"eos_token is .*; allowed is printable text of at most 100"
        ):
            find_chat_template(tmp_path)


# 3. In bundles.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    write_random_checkpoint(folder, CONFIG, choose_threshold=False)
    configure(folder, eos_token="<end>", chat_template=OTHER)
    return folder


def test_a_bundle_keeps_it_and_so_does_its_quantized_one(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_checkpoint(checkpoint, tmp_path / "fp32")
    for path in (bundle, quantize_bundle(bundle, tmp_path / "int8w", precision="int8w")):
        manifest = load_manifest(path)
        check_files(path, manifest)
        assert manifest.chat == ChatSpec("<end>")
        template = load_chat_template(path, manifest)
        assert (template.text, template.stop) == (OTHER, (b"<end>",))
    bare = export_checkpoint(checkpoint, tmp_path / "bare", chat_template="none")
    assert load_manifest(bare).chat is None
    assert not (bare / CHAT_TEMPLATE_NAME).exists()
    assert replace(load_manifest(bundle), chat=None, files={}) == replace(load_manifest(bare), files={})
    assert load_manifest(bundle).fingerprint == load_manifest(bare).fingerprint


def test_a_changed_template_is_found(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_checkpoint(checkpoint, tmp_path / "fp32")
    with (bundle / CHAT_TEMPLATE_NAME).open("ab") as file:
        file.write(b" ")
    with pytest.raises(BltError, match=f"{CHAT_TEMPLATE_NAME} has extra bytes"):
        check_files(bundle, load_manifest(bundle))


def test_a_bad_one_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_text("{{ raise_exception('never') }}")
    for ask in (
        lambda: plan_export(str(checkpoint), chat_template=given),
        lambda: export_checkpoint(checkpoint, tmp_path / "bundle", chat_template=given),
    ):
        with pytest.raises(
            CheckpointError, match=r"given: the chat template renders no simple conv.*: never; give"
        ):
            ask()
    assert list(tmp_path.iterdir()) == [given]
