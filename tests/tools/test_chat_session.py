"""Chat's text and turns: what a line adds, that nothing is read twice, undoing."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel, BltWarning, GenerationOptions, OptionError, OutOfMemoryError
from blt_edge.runtime.engines import Engine
from blt_edge.runtime.vocabulary import EOS, encode
from blt_edge.tools.cli.chat_session import ChatError, ChatSession, typed_text
from hypothesis import given
from hypothesis import strategies as st
from support.chat import assert_sound, go_on, state, visible
from support.unreliable import Unreliable


def test_what_a_line_adds() -> None:
    for line, text, added in (
        (b"", b"x", b""),
        (b"a b", b"", b"a b\n"),
        (b"a", b"x", b"\na\n"),
        (b"a", b"x\n", b"a\n"),
        (b"a\\", b"x", b"\na"),
        (b"\\a", b"x", b"a\n"),
        (b"\\ a\\", b"x", b" a"),
        (b"\\", b"x", b"\n"),
        (b"\\\\", b"x\n", b"\\\n"),
        (b"\\\\a\\\\", b"x\n", b"\\a\\\n"),
        (b"\\\\\\", b"x\n", b"\\"),
        (b"a\nb", b"x", b"\na\nb\n"),
        (b"\xff\x00", b"", b"\xff\x00\n"),
    ):
        assert typed_text(line, text) == added, line


def test_turns_are_one_text_and_nothing_is_read_twice(model: BltModel) -> None:
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            model, "observer", lambda stage, *told: stage == "encoder" and counted.append(told[-1])
        )
        chat = state(model, b"Once upon a time")
    expected, since = b"Once upon a time", b""
    for typed in (b"", b" there was", b"\xff\n", b"", b"x" * 40):
        shown = go_on(chat, typed)
        made = model.generate(expected + typed, chat.options)
        since = made.data if typed else since + made.data
        assert visible(since).endswith(shown)
        assert len(visible(since)) == len(shown) + (0 if typed else len(visible(since[: -len(made.data)])))
        expected += typed + made.data
        assert chat.text == expected
        assert_sound(chat)
    assert sum(counted) == 1 + len(expected)
    chat.undo()
    go_on(chat, b"y")
    assert sum(counted) == 1 + len(expected) + 21  # nothing but the new turn
    assert sum(stats.new_bytes for stats in chat.past) == 6 * 20


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stopped_answer_stays(model: BltModel, after: int) -> None:
    chat, cancel, written = state(model, max_new_bytes=60), threading.Event(), []

    def write(text: str) -> None:
        written.append(text)
        if len(written) > after:
            cancel.set()

    answer = chat.turn(b"Once", write, cancel)
    assert answer.reason == "cancelled"
    made = chat.text[4:]
    assert len(made) < 60
    assert_sound(chat)
    go_on(chat)
    assert chat.text[4:] == model.generate(b"Once", replace(chat.options, max_new_bytes=len(made) + 60)).data


def test_stopped_inside_a_prompt_it_is_read_on_with_the_next_turn(model: BltModel) -> None:
    chat, cancel = state(model), threading.Event()
    cancel.set()
    answer = chat.turn(b"x" * 400, lambda text: None, cancel)
    assert (answer.reason, answer.stats.new_bytes, chat.text) == ("cancelled", 0, b"x" * 400)
    assert 0 < len(chat.unread) < 400
    go_on(chat)
    assert chat.text == b"x" * 400 + model.generate(b"x" * 400, chat.options).data
    assert_sound(chat)


def test_a_broken_turn_keeps_the_text_and_the_state_before_it(model: BltModel) -> None:
    chat = state(model)
    go_on(chat, b"Once")
    before = chat.text

    def interrupted(text: str) -> None:
        if len(chat.text) > len(before) + 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.turn(b" and", interrupted, threading.Event())
    assert chat.sequence.length == 1 + len(before)
    assert chat.text.startswith(before + b" and")
    assert_sound(chat)
    kept = chat.text
    go_on(chat)
    assert chat.text == kept + model.generate(kept, chat.options).data
    assert_sound(chat)


def test_a_character_cut_at_the_end_is_completed_by_the_next_turn(model: BltModel) -> None:
    found = 0
    for seed in range(40):
        chat = state(model, temperature=1.5, seed=seed, max_new_bytes=1)
        if not chat.turn(b"a", lambda text: None, threading.Event()).cut:
            continue
        found += 1
        with pytest.raises(UnicodeDecodeError):
            chat.text.decode()
        assert go_on(chat) == chat.text[1:].decode("utf-8", "replace") or chat._utf8.pending
        go_on(chat, b"b")  # what is typed begins anew
        assert_sound(chat)
    assert found


def test_positions_run_out(model: BltModel) -> None:
    chat = state(model, b"abc " * 120)
    go_on(chat)
    assert chat.positions_left == 0
    for typed in (b"", b"x"):
        with pytest.raises(ChatError, match="/undo takes back the last turn"):
            go_on(chat, typed)
    chat.undo()
    assert chat.positions_left == 19
    with pytest.raises(ChatError, match="needs 20 positions, 19 of 500 are left"):
        go_on(chat, b"y" * 20)
    assert chat.text == b"abc " * 120
    go_on(chat, b"y" * 19)
    assert chat.text.startswith(b"abc " * 120 + b"y" * 19)


@pytest.fixture
def runs(model: BltModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every run of a stage of texts that are begun from now on: its name, and positions."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(model, "observer", lambda stage, *told: seen.append((stage, told[-1])))
    return seen


def test_undo_of_any_depth_runs_no_stage(model: BltModel, runs: list[tuple[str, int]]) -> None:
    chat, texts = state(model, b"Once upon a time", max_new_bytes=30), []
    chat.read()
    for typed in (b" there was", b"", b"x" * 80, b"\xff"):  # windows of 8, 64 bytes of roll-back
        texts.append(chat.text)
        go_on(chat, typed)
    for text in reversed(texts):
        runs.clear()
        chat.undo()
        assert (chat.text, chat.unread, runs) == (text, b"", [])
        assert_sound(chat)
    assert chat.kept == 1
    runs.clear()
    go_on(chat, b"y")
    assert sum(count for stage, count in runs if stage == "encoder") == 1 + 30


def test_reset_goes_back_to_the_state_of_the_prompt(model: BltModel, runs: list[tuple[str, int]]) -> None:
    chat = state(model, b"Once upon a time", max_new_bytes=60)
    chat.read()
    for _ in range(3):
        go_on(chat, b"more")
    runs.clear()
    chat.reset()
    assert (chat.text, chat.unread, chat.turns, runs) == (b"Once upon a time", b"", [], [])
    assert_sound(chat)


def test_states_are_kept_as_far_as_memory_goes_the_newest_last(model: BltModel) -> None:
    room = [1 << 40]
    chat = ChatSession(model, GenerationOptions(max_new_bytes=70, draft="none"), b"", lambda: room[0])
    for _ in range(4):
        go_on(chat, b"a")
    assert chat.kept == 3  # before the first turn nothing was read
    room[0] = chat.kept_bytes  # one more does not fit
    go_on(chat, b"a")
    assert 0 < chat.kept < 4
    assert chat.kept_bytes <= room[0]
    chat.undo()
    assert chat.unread == b""
    room[0] = 0
    go_on(chat, b"a")
    assert (chat.kept, chat.kept_bytes) == (0, 0)
    chat.undo()
    assert chat.unread == chat.text  # more than can be rolled back
    made = model.generate(chat.text + b"a", chat.options).data
    before = chat.text
    go_on(chat, b"a")
    assert chat.text == before + b"a" + made
    assert_sound(chat)


def test_what_is_kept_goes_by_the_memory_of_the_model_s_device(
    model: BltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [1 << 40]
    monkeypatch.setattr(model, "available_memory", lambda: free[0])
    chat = ChatSession(model, GenerationOptions(max_new_bytes=2, draft="none"), b"Once")
    go_on(chat, b"a")
    go_on(chat, b"b")
    assert chat.kept == 1
    free[0] = 4 * chat.kept_bytes
    go_on(chat, b"c")
    assert chat.kept_bytes <= free[0] // 4
    free[0] = 0
    go_on(chat, b"d")
    assert chat.kept == 0


def test_a_session_saves_all_of_its_text(
    model: BltModel, tmp_path: Path, runs: list[tuple[str, int]]
) -> None:
    chat, cancel, path = state(model), threading.Event(), tmp_path / "a.state"
    with pytest.raises(ChatError, match="no text yet"):
        chat.save(path)
    cancel.set()
    chat.turn(b"x" * 400, lambda text: None, cancel)
    assert chat.unread
    chat.save(path)
    runs.clear()
    resumed = ChatSession(model, chat.options, model.restore(path))
    assert (resumed.text, resumed.unread, runs) == (b"x" * 400, b"", [])
    assert_sound(resumed)
    assert go_on(resumed, b"y") == go_on(chat, b"y")
    resumed.reset()
    assert resumed.text == b"x" * 400


def test_a_last_byte_without_a_position_is_in_no_state(model: BltModel, tmp_path: Path) -> None:
    chat = state(model, b"x" * 499)
    go_on(chat)
    assert len(chat.text) == 500
    with pytest.raises(ChatError, match="the last byte has no position"):
        chat.save(tmp_path / "a.state")
    chat.undo()
    chat.save(tmp_path / "a.state")
    assert ChatSession(model, chat.options, model.restore(tmp_path / "a.state")).positions_left == 0


def test_a_state_with_ids_that_are_no_bytes_is_no_chat(model: BltModel) -> None:
    sequence = model.sequence()
    sequence.append([*encode(b"a"), EOS])
    with pytest.raises(OptionError, match="ids that are no bytes"):
        ChatSession(model, GenerationOptions(), sequence)


def test_states_of_an_engine_that_failed_are_dropped(model: BltModel) -> None:
    failing = Unreliable(model._backends["decoder"], 60, RuntimeError("broken"))
    other = BltModel(
        model.manifest,
        {**model._backends, "decoder": failing},
        model._table,
        model.limits,
        model.path,
        Engine("engines/onnxruntime-0123"),
        lambda: (dict(model._backends), Engine("portable graphs")),
    )
    chat = state(other, b"Once")
    go_on(chat, b"one")
    go_on(chat, b"two")
    assert chat.kept == 1
    before = chat.text
    with pytest.warns(BltWarning, match="the portable graphs go on"):
        go_on(chat, b"three")
    assert chat.kept == 0
    made = chat.text[len(before) :]
    assert made[5:] == model.generate(before + b"three", chat.options).data
    chat.undo()
    assert chat.text == before
    assert_sound(chat)
    go_on(chat, b"three")
    assert chat.text == before + made


@pytest.mark.parametrize("fault", [MemoryError(), OutOfMemoryError("no memory")])
def test_where_memory_ran_out_the_states_kept_are_given_back(model: BltModel, fault: Exception) -> None:
    chat = state(model, b"Once")
    for _ in range(3):
        go_on(chat, b"a")
    before = chat.text

    def fails(text: bytes) -> None:
        raise fault

    with pytest.raises(type(fault)):
        chat.turn(b"b", fails, threading.Event())
    assert (chat.kept, chat.sequence.length) == (0, 1 + len(before))
    assert_sound(chat)
    go_on(chat)
    assert_sound(chat)


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states") / "a.state"


KINDS = st.sampled_from(["turn", "turn", "stop", "undo", "undo", "reset", "drop", "draft", "short", "save"])


@given(steps=st.lists(st.tuples(KINDS, st.binary(max_size=12), st.integers(1, 30)), max_size=8))
def test_any_walk_holds_its_text(
    model: BltModel, state_file: Path, steps: list[tuple[str, bytes, int]]
) -> None:
    options, room, past = GenerationOptions(max_new_bytes=20, draft="none"), [1 << 40], []
    chat = ChatSession(model, options, b"so", lambda: room[0])
    for kind, typed, number in steps:
        if kind == "turn":
            past.append(chat.text)
            go_on(chat, typed)
            assert chat.text.startswith(past[-1] + typed)
        elif kind == "stop":
            past.append(chat.text)
            cancel = threading.Event()
            chat.turn(typed, lambda text: len(chat.text) > number + len(past[-1]) and cancel.set(), cancel)  # noqa: B023
        elif kind == "undo" and past:
            chat.undo()
            assert chat.text == past.pop()
        elif kind == "reset":
            chat.reset()
            past = []
        elif kind == "drop":
            chat.drop_state()
        elif kind == "save":
            chat.save(state_file)
            chat = ChatSession(model, chat.options, model.restore(state_file), lambda: room[0])
            past = []
        elif kind == "short":
            room[0] = number * 30_000
        elif kind == "draft":
            drafts = ("none", "auto", "decoder", "patcher", "lookup")
            chat.change(draft=drafts[number % 5], max_new_bytes=15)
        assert_sound(chat)


def test_what_the_model_cannot_do_is_refused_before_a_turn(model: BltModel) -> None:
    rule = replace(model.manifest.patching, mode="space")
    other = BltModel(
        replace(model.manifest, patching=rule), model._backends, model._table, model.limits, model.path
    )
    chat = state(other)
    with pytest.raises(OptionError, match="patcher"):
        chat.change(draft="patcher")
    assert chat.options.draft == "none"
    with pytest.raises(OptionError):
        state(other, draft="patcher")
