"""`generate --prompt-cache`: the same text, less of the prompt read; no file lost that is not its own."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import BltModel, BltWarning, GenerationOptions
from blt_edge.runtime.generation import joined
from blt_edge.runtime.state_file import describe
from blt_edge.runtime.vocabulary import decode
from blt_edge.tools.cli.prompt_cache import PromptCache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROMPT = "Once upon a time"
POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where the file will be, alone in its folder."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "prompt.state"


@pytest.fixture
def generate(cli, tiny_model) -> Callable[..., Any]:
    """`generate("-n", 4, ...)` -> click's Result, of the tiny model."""
    return partial(cli, "generate", "-m", tiny_model.bundle, "--threads", 1)


@pytest.fixture
def made(generate, cache: Path) -> Path:
    """The file after a run with PROMPT."""
    generate("-p", PROMPT, "-n", 4, "--prompt-cache", cache, code=0)
    return cache


def document(result: Any) -> dict[str, Any]:
    return json.loads(result.stdout)


@pytest.mark.parametrize("sampling", [(), ("--temp", "0.9", "--seed", 7), ("--draft", "lookup")])
def test_the_second_run_reads_nothing_and_says_the_same(generate, cache: Path, sampling: Any) -> None:
    flags = ("-p", PROMPT * 12, "-n", 30, *sampling)
    cold = generate(*flags, code=0)
    for told in ("(0 not read again)", "(192 not read again)"):
        result = generate(*flags, "--prompt-cache", cache, code=0)
        assert result.stdout == cold.stdout
        assert f"192 prompt bytes {told}, 30 new bytes, " in result.stderr
    assert cold.stderr.split(" patches (")[0].split()[-1] == result.stderr.split(" patches (")[0].split()[-1]
    nothing = document(generate("-p", PROMPT * 12, "-n", 0, "--prompt-cache", cache, "--json", "-"))
    assert nothing["stats"]["reused_bytes"] == 192
    assert set(nothing["stats"]["stage_calls"].values()) == {0}
    assert document(generate(*flags, "--json", "-"))["stats"]["reused_bytes"] == 0
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


# At most 420 bytes in two: the model has 500 positions.
WORDS = st.lists(st.sampled_from([b"once ", b"x" * 70, b"\xff", b"a"]), max_size=3).map(b"".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=WORDS, common=WORDS, after=WORDS, read_only=st.booleans())
def test_any_file_gives_the_text_of_none(
    model: BltModel, cache: Path, before: bytes, common: bytes, after: bytes, read_only: bool
) -> None:
    first, second = common + before, common + after
    options, seen = GenerationOptions(max_new_bytes=9, draft="none"), list[int]()

    def run(prompt: bytes, *flags: bool) -> tuple[PromptCache, Any]:
        seen.clear()
        used = PromptCache(cache, model.path, *flags)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                model, "observer", lambda stage, *told: stage == "encoder" and seen.append(told[-1])
            )
            return used, joined(used.stream(model, prompt, options, threading.Event()))

    cache.unlink(missing_ok=True)
    run(first, False)
    held = cache.read_bytes()
    used, result = run(second, read_only)
    cold, reused = model.generate(second, options), result.stats.reused_bytes
    assert (result.data, result.finish_reason) == (cold.data, cold.finish_reason)
    assert result.stats.patches == cold.stats.patches
    assert result.stats.prompt_bytes == len(second)
    if cold.finish_reason == "length":
        bos = 0 if reused or (second and not first) else 1  # of a text that is begun
        assert sum(seen) == bos + len(second) - reused + cold.stats.new_bytes - 1
    shared = next((at for at, pair in enumerate(zip(first, second, strict=False)) if len({*pair}) > 1), None)
    shared = min(len(first), len(second)) if shared is None else shared
    assert reused in (0, shared)
    if shared == len(first) or len(first) - shared <= model.limits.rollback:
        assert reused == shared
    if read_only or reused == len(second):
        assert cache.read_bytes() == held
    else:
        assert decode(model.restore(cache).ids) == second
    assert not used.failed


def test_a_longer_text_is_gone_back_in(generate, made: Path) -> None:
    before = made.read_bytes()
    told = document(generate("-p", PROMPT[:9], "-n", 9, "--prompt-cache", made, "--json", "-"))
    assert told["stats"]["reused_bytes"] == 9
    assert told["text"] == generate("-p", PROMPT[:9], "-n", 9, "-q").stdout
    assert made.read_bytes() == before  # it holds this prompt, too


def test_read_only_reads_only(generate, made: Path) -> None:
    before = made.read_bytes()
    for prompt, cached in ((PROMPT + " there", 16), ("\xe9" * 200, 0), (PROMPT, 16)):
        flags = ("-p", prompt, "--prompt-cache", made, "--prompt-cache-ro", "--json", "-", "-n", 3)
        told = document(generate(*flags, code=0))
        assert told["stats"]["reused_bytes"] == cached
        assert told["text"] == generate("-p", prompt, "-n", 3, "-q").stdout
    assert made.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prompt-cache-ro",), "--prompt-cache-ro has nothing to read; give --prompt-cache FILE, too"),
        (("--prompt-cache", "gone", "--prompt-cache-ro"), "gone does not exist; without --prompt-cache-ro"),
        (("--prompt-cache", "-"), "--prompt-cache: a state is a file of its own"),
        (("--prompt-cache", "/gone/x"), "--prompt-cache: the directory /gone does not exist"),
    ],
)
def test_wrong_usage(refused, tiny_model, flags: tuple[str, ...], words: str) -> None:
    assert words in refused("generate", "-m", tiny_model.bundle, "-p", "x", *flags)


@pytest.mark.parametrize("kind", ["older", "truncated"])
def test_what_can_be_used_no_more_is_left_and_told_how_to_get_rid_of(refused, tiny_model, made, kind) -> None:
    data = made.read_bytes()
    made.write_bytes(data[:-1] if kind == "truncated" else data[:16] + b"\x01" + data[17:])
    before = made.read_bytes()
    said = refused("generate", "-m", tiny_model.bundle, "-p", "x", "--prompt-cache", made, code=1)
    assert said.endswith("; remove it to have the prompt read and the file made again\n")
    assert made.read_bytes() == before


@POSIX
@pytest.mark.parametrize(
    "kind", ["notes", "empty", "folder", "fifo", "link", "dangling", "truncated", "newer"]
)
def test_what_is_no_state_is_refused_and_left(refused, tiny_model, made: Path, kind: str) -> None:
    other = made.with_name("other")
    data = {"notes": b"my notes", "empty": b"", "truncated": made.read_bytes()[:-1]}
    data["newer"] = made.read_bytes()[:16] + b"\x09" + made.read_bytes()[17:]
    if kind in data:
        other.write_bytes(data[kind])
    elif kind == "folder":
        other.mkdir()
    elif kind == "fifo":
        os.mkfifo(other)
    else:
        other.symlink_to(made.name if kind == "link" else "nowhere")
    before = unchanging(other)
    for verb in (("generate", "-p", "x", "--prompt-cache"), ("chat", "--resume")):
        code = 2 if verb[0] == "chat" and kind in ("folder", "dangling") else 1
        assert str(other) in refused(verb[0], "-m", tiny_model.bundle, *verb[1:], other, code=code)
    assert str(other) in refused("inspect", other, code=2 if kind == "folder" else 1)
    assert unchanging(other) == before
    assert kind not in data or other.read_bytes() == data[kind]


def unchanging(path: Path) -> tuple[int, ...]:
    """What reading a file leaves as it is."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def test_of_another_bundle(refused, other_bundle: Path, made: Path) -> None:
    before = made.read_bytes()
    for verb in (("generate", "-p", PROMPT, "--prompt-cache"), ("chat", "--resume")):
        told = refused(verb[0], "-m", other_bundle, *verb[1:], made, code=1)
        assert told.startswith(f"{made} is the state of another bundle, of checkpoint (")
    assert made.read_bytes() == before


def test_damaged_inside_it_is_a_warning_and_replaced(generate, made: Path) -> None:
    whole = made.read_bytes()
    made.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    flags = ("-p", PROMPT, "-n", 9, "--prompt-cache", made)
    result = generate(*flags, "-q", code=0)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"blt-edge: warning: --prompt-cache: {made}: it was changed after")
    assert result.stdout == generate("-p", PROMPT, "-n", 9, "-q").stdout
    assert describe(made, verify=True).length == 17
    assert "(16 not read again)" in generate(*flags, code=0).stderr


def test_a_file_that_cannot_be_written_costs_no_text(generate, made: Path, monkeypatch) -> None:
    before = made.read_bytes()

    def full(*told: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blt_edge.runtime.state_file.write_whole", full)
    result = generate("-p", "other", "-n", 9, "-q", "--prompt-cache", made, code=1)
    assert result.stdout == generate("-p", "other", "-n", 9, "-q").stdout
    assert result.stderr == (
        f"blt-edge: warning: --prompt-cache: {made} cannot be written (No space left on device); "
        "what was there is unchanged\n"
    )
    assert made.read_bytes() == before


def test_a_file_that_came_meanwhile_is_not_written_over(model: BltModel, cache: Path) -> None:
    used = PromptCache(cache, model.path, False)
    cache.write_bytes(b"my notes")
    with pytest.warns(BltWarning, match="it is no saved state"):
        joined(used.stream(model, b"abc", GenerationOptions(max_new_bytes=2), threading.Event()))
    assert (used.failed, cache.read_bytes()) == (True, b"my notes")


def test_a_folder_that_cannot_be_written_is_found_before_work(
    refused, tiny_model, made: Path, monkeypatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    flags = ("generate", "-m", tiny_model.bundle, "-p", PROMPT, "-n", 2, "-q", "--prompt-cache")
    assert "nothing can be written in" in refused(*flags, made.with_name("new"))
    assert "check its permissions, or give --prompt-cache-ro, too" in refused(*flags, made)


def test_state_of_an_exact_prompt_that_ends_the_positions(generate, cache: Path) -> None:
    for _ in range(2):
        told = document(generate("-p", "x" * 499, "-n", 5, "--prompt-cache", cache, "--json", "-"))
        assert (told["finish_reason"], told["stats"]["new_bytes"]) == ("context", 1)
        assert base64.b64decode(told["data_base64"])
    assert told["stats"]["reused_bytes"] == 499
