"""`blt-edge generate`: what goes to stdout, what to stderr, and every option on its way to the runtime."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel, GenerationOptions

PROMPT = "Once upon a time"


def test_text_on_stdout_figures_on_stderr(cli, tiny_model, model: BltModel) -> None:
    result = cli("generate", "-m", tiny_model.bundle, "-p", PROMPT, "-n", 40, "--threads", 1)
    assert result.exit_code == 0
    expected = model.generate(PROMPT, GenerationOptions(max_new_bytes=40))
    assert result.stdout == expected.text
    assert result.stderr.startswith("\n16 prompt bytes, 40 new bytes, ")
    for figure in ("bytes each", "first byte after", "bytes/s", "ms/byte", "patcher", "decoder", "at peak"):
        assert figure in result.stderr


def test_quiet(cli, tiny_model) -> None:
    result = cli("generate", "-m", tiny_model.bundle, "-p", PROMPT, "-n", 5, "-q")
    assert (result.exit_code, result.stderr) == (0, "")


def test_options_reach_the_runtime(cli, tiny_model, model: BltModel) -> None:
    asked = GenerationOptions(30, 0.9, 50, 0.95, 0.01, 1.1, 7, (b"\x00", "é"))
    sampling = "-n 30 --temp 0.9 --top-k 50 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.1 --seed 7"
    flags = [*sampling.split(), "--stop", r"\x00", "--stop", r"\u00e9", "--json", "-"]
    engine = ["--prefill-chunk", "3", "--device", "cpu", "--verify"]
    result = cli("generate", "-m", tiny_model.bundle, "-p", PROMPT, *flags, *engine)
    document = json.loads(result.stdout)
    expected = model.generate(PROMPT, asked)
    assert base64.b64decode(document["data_base64"]) == expected.data
    assert document["text"] == expected.text
    assert document["finish_reason"] == expected.finish_reason
    assert document["options"]["stop"] == ["\x00", "é"]
    assert document["options"]["seed"] == 7
    assert document["stats"]["new_bytes"] == expected.stats.new_bytes
    assert document["stats"]["patches"] == expected.stats.patches - 1
    assert sum(document["stats"]["stage_shares"].values()) == pytest.approx(1)


def test_stop_ends_the_text_before_it(cli, tiny_model, model: BltModel) -> None:
    data = model.generate(PROMPT, GenerationOptions(max_new_bytes=20)).data
    stop = "".join(f"\\x{byte:02x}" for byte in data[10:12])
    result = cli("generate", "-m", tiny_model.bundle, "-p", PROMPT, "--stop", stop, "--json", "-")
    document = json.loads(result.stdout)
    assert base64.b64decode(document["data_base64"]) == data[: data.index(data[10:12])]
    assert document["finish_reason"] == "stop"


def test_json_to_a_file_leaves_the_text_on_stdout(cli, tiny_model, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    result = cli("generate", "-m", tiny_model.bundle, "-p", PROMPT, "-n", 9, "--json", target)
    assert json.loads(target.read_text())["text"] == result.stdout


@pytest.mark.parametrize("data", [b"", b"\xff\x00\xfe\r\n", "早い".encode() + b"\n", bytes(range(256))])
def test_a_prompt_from_stdin_or_a_file_is_taken_byte_by_byte(
    cli, tiny_model, model: BltModel, tmp_path: Path, data: bytes
) -> None:
    (tmp_path / "prompt").write_bytes(data)
    expected = model.generate(data, GenerationOptions(max_new_bytes=8)).text
    common = ("generate", "-m", tiny_model.bundle, "-n", 8)
    assert cli(*common, "-p", "-", stdin=data).stdout == expected
    assert cli(*common, "--prompt-file", tmp_path / "prompt").stdout == expected
    assert cli(*common, "--prompt-file", "-", stdin=data).stdout == expected


def test_echo(cli, tiny_model, model: BltModel) -> None:
    result = cli("generate", "-m", tiny_model.bundle, "-p", PROMPT, "-n", 4, "--echo")
    assert result.stdout == PROMPT + model.generate(PROMPT, GenerationOptions(max_new_bytes=4)).text


def test_an_empty_prompt_is_allowed(cli, tiny_model) -> None:
    result = cli("generate", "-m", tiny_model.bundle, "-p", "", "-n", 4)
    assert result.exit_code == 0
    assert "0 prompt bytes, 4 new bytes" in result.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((), "--prompt is missing; give a text, - for stdin, or --prompt-file FILE"),
        (("-p", "x", "--prompt-file", __file__), "--prompt and --prompt-file are both given"),
        (("-p", "x", "-n", "-1"), "--max-new-bytes is -1; allowed is a whole number >= 0"),
        (("-p", "x", "--temp", "nan"), "--temperature is nan; allowed is"),
        (("-p", "x", "--repetition-penalty", "0"), "--repetition-penalty is 0.0; allowed is"),
        (("-p", "x", "--threads", "0"), "--threads: got 0, a whole number from 1"),
        (("-p", "x", "--prefill-chunk", "0"), "--prefill-chunk: got 0, a whole number from 1"),
        (("-p", "x" * 500), "the text needs 501 positions (BOS included), the model has 500; shorten it"),
    ],
)
def test_wrong_values(refused, tiny_model, flags: tuple[str, ...], line: str) -> None:
    assert refused("generate", "-m", tiny_model.bundle, *flags).startswith(line)


def test_a_damaged_bundle_is_one_line(refused, own_bundle: Path) -> None:
    data = own_bundle / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    told = refused("generate", "-m", own_bundle, "-p", "x", code=1)
    assert "decoder.onnx.data is truncated" in told


def test_more_memory_than_allowed_is_refused_before_loading(cli, refused, tiny_model) -> None:
    common = ("generate", "-m", tiny_model.bundle, "-p", "Once", "-n", 4, "--max-memory")
    told = refused(*common, "1MB", code=1)
    assert "would need about" in told
    assert "--max-memory allows 1.0 MB" in told
    assert "--max-memory: got 'plenty'" in refused(*common, "plenty")
    assert cli(*common, "2GB").exit_code == 0


def test_drafts_change_no_text_and_are_told_of(cli, refused, tiny_model) -> None:
    texts, common = set(), ("generate", "-m", tiny_model.bundle, "-p", "Once")
    for draft in ("none", "auto", "decoder", "patcher", "lookup"):
        result = cli(*common, "-n", 40, "--draft", draft, "--json", "-")
        document = json.loads(result.stdout)
        texts.add(document["data_base64"])
        assert ("guesses right" in result.stderr) == (document["stats"]["rounds"] > 0)
    assert len(texts) == 1
    for wrong in (("--draft", "best"), ("--draft-length", "0"), ("--draft-length", "33")):
        assert refused(*common, *wrong).startswith(wrong[0])
