"""`blt-edge generate`: what goes to stdout, what to stderr, and every option on its way to the runtime."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, GenerationOptions

PROMPT = "Once upon a time"


@pytest.fixture
def generate(cli, tiny_model) -> Callable[..., Any]:
    """`generate("-n", 4, ...)` -> click's Result, of the tiny model."""
    return partial(cli, "generate", "-m", tiny_model.bundle)


def test_text_on_stdout_figures_on_stderr(generate, model: BltModel) -> None:
    result = generate("-p", PROMPT, "-n", 40, "--threads", 1)
    assert result.exit_code == 0
    expected = model.generate(PROMPT, GenerationOptions(max_new_bytes=40)).text
    assert result.stdout == expected
    assert result.stderr.startswith("\n16 prompt bytes, 40 new bytes, ")
    for figure in ("bytes each", "first byte after", "bytes/s", "ms/byte", "patcher", "decoder", "at peak"):
        assert figure in result.stderr
    quiet = generate("-p", PROMPT, "-n", 40, "-q", "--echo")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, PROMPT + expected, "")


def test_options_reach_the_runtime(generate, model: BltModel) -> None:
    asked = GenerationOptions(30, 0.9, 50, 0.95, 0.01, 1.1, 7, (b"\x00", "é"))
    sampling = "-n 30 --temp 0.9 --top-k 50 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.1 --seed 7"
    flags = [*sampling.split(), "--stop", r"\x00", "--stop", r"\u00e9", "--json", "-"]
    engine = ["--prefill-chunk", "3", "--device", "cpu", "--verify"]
    document = json.loads(generate("-p", PROMPT, *flags, *engine).stdout)
    expected = model.generate(PROMPT, asked)
    assert base64.b64decode(document["data_base64"]) == expected.data
    assert (document["text"], document["finish_reason"]) == (expected.text, expected.finish_reason)
    assert (document["options"]["stop"], document["options"]["seed"]) == (["\x00", "é"], 7)
    stats = document["stats"]
    assert (stats["new_bytes"], stats["patches"]) == (expected.stats.new_bytes, expected.stats.patches - 1)
    assert sum(stats["stage_shares"].values()) == pytest.approx(1)


def test_stop_ends_the_text_before_it(generate, model: BltModel) -> None:
    data = model.generate(PROMPT, GenerationOptions(max_new_bytes=20)).data
    stop = "".join(f"\\x{byte:02x}" for byte in data[10:12])
    document = json.loads(generate("-p", PROMPT, "--stop", stop, "--json", "-").stdout)
    assert base64.b64decode(document["data_base64"]) == data[: data.index(data[10:12])]
    assert document["finish_reason"] == "stop"


def test_json_to_a_file_leaves_the_text_on_stdout(generate, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    result = generate("-p", PROMPT, "-n", 9, "--json", target)
    assert json.loads(target.read_text())["text"] == result.stdout


@pytest.mark.parametrize("data", [b"", b"\xff\x00\xfe\r\n", "早い".encode() + b"\n", bytes(range(256))])
def test_a_prompt_from_stdin_or_a_file_is_taken_byte_by_byte(
    generate, model: BltModel, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "prompt").write_bytes(data)
    expected = model.generate(data, GenerationOptions(max_new_bytes=8)).text
    for flags in (("-p", "-"), ("--prompt-file", tmp_path / "prompt"), ("--prompt-file", "-")):
        assert generate("-n", 8, *flags, stdin=data).stdout == expected


def test_an_empty_prompt_is_allowed(generate) -> None:
    result = generate("-p", "", "-n", 4)
    assert result.exit_code == 0
    assert "0 prompt bytes, 4 new bytes" in result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--prompt is missing"),
        (("-p", "x", "--prompt-file", __file__), "--prompt and --prompt-file are both given"),
        (("-p", "x", "-n", "-1"), "--max-new-bytes is -1"),
        (("-p", "x", "--temp", "nan"), "--temperature is nan"),
        (("-p", "x", "--repetition-penalty", "0"), "--repetition-penalty is 0.0"),
        (("-p", "x", "--threads", "0"), "--threads is 0"),
        (("-p", "x", "--prefill-chunk", "0"), "--prefill-chunk is 0"),
        (("-p", "x", "--draft", "best"), "--draft"),
        (("-p", "x", "--draft-length", "0"), "--draft-length"),
        (("-p", "x", "--draft-length", "33"), "--draft-length"),
        (("-p", "x", "--max-memory", "plenty"), "--max-memory: got 'plenty'"),
        (("-p", "x" * 500), "the text needs 501 positions"),
    ],
)
def test_wrong_values(refused, tiny_model, flags: tuple[str, ...], words: str) -> None:
    assert refused("generate", "-m", tiny_model.bundle, *flags).startswith(words)


def test_a_damaged_bundle_is_one_line(refused, own_bundle: Path) -> None:
    data = own_bundle / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "decoder.onnx.data is truncated" in refused("generate", "-m", own_bundle, "-p", "x", code=1)


def test_more_memory_than_allowed_is_refused_before_loading(generate, refused, tiny_model) -> None:
    told = refused("generate", "-m", tiny_model.bundle, "-p", "Once", "--max-memory", "1MB", code=1)
    assert re.search("would need about .*--max-memory allows 1.0 MB", told)
    assert generate("-p", "Once", "-n", 4, "--max-memory", "2GB").exit_code == 0


def test_drafts_change_no_text_and_are_told_of(generate) -> None:
    texts = set()
    for draft in ("none", "auto", "decoder", "patcher", "lookup"):
        result = generate("-p", "Once", "-n", 40, "--draft", draft, "--json", "-")
        document = json.loads(result.stdout)
        texts.add(document["data_base64"])
        assert ("guesses right" in result.stderr) == (document["stats"]["rounds"] > 0)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("verb", "flags", "stdin"),
    [
        ("generate", ("--prompt-file", "/dev/zero"), b""),
        ("generate", ("-p", "-"), b"x" * 500),
        ("chat", ("--prompt-file", "/dev/zero"), b""),
        ("chat", (), b"x" * 500),
    ],
)
def test_no_more_is_read_than_the_model_can_hold(cli, tiny_model, verb: str, flags, stdin: bytes) -> None:
    """/dev/zero has no end."""
    told = cli(verb, "-q", "-m", tiny_model.bundle, *flags, stdin=stdin, code=2).stderr
    assert "has more than 499 bytes, all that this model has positions for; give" in told
