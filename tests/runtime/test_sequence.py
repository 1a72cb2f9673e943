"""Whatever happened before, a sequence's state is that of a fresh run on its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.graphs.config import parse_config
from blt_edge.runtime import BackendError, BltModel, OptionError, PromptTooLongError, Sequence
from blt_edge.runtime.backends.base import HOST, PADDING
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.sequence import Draft, SequenceLimits, _patch_group
from blt_edge.runtime.stages import next_power_of_two
from blt_edge.runtime.state import ByteStates
from blt_edge.runtime.vocabulary import encode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.model_store import altered
from support.numpy_blt import NumpyBlt, WholeText

ROLLBACK = 12


def assert_like_fresh(tight: BltModel, sequence: Sequence, data: bytes) -> None:
    fresh = tight.sequence()
    fresh.append(encode(data))
    assert sequence.length == fresh.length == 1 + len(data)
    assert sequence.ids.tolist() == fresh.ids.tolist()
    assert sequence.boundaries.starts == fresh.boundaries.starts
    assert sequence.patches_closed == fresh.patches_closed
    np.testing.assert_allclose(sequence.logits, fresh.logits, rtol=0, atol=2e-5)
    # What comes next reads every cache: it must agree too.
    for step in (b"a", b" next words \xff"):
        ids = encode(step)[1:]
        ours = np.concatenate([result.logits.copy() for result in sequence.extend(ids)])
        theirs = np.concatenate([result.logits.copy() for result in fresh.extend(ids)])
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("read"), st.sampled_from([b"e", b" ", b"the ", b"\x00" * 30, b"aaaaaaaaaaaa"])),
        st.tuples(st.just("back"), st.integers(0, ROLLBACK)),
        st.tuples(st.just("back"), st.integers(0, 80)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(steps=steps)
def test_any_walk_ends_where_a_fresh_run_does(tight: BltModel, steps: list[tuple[str, bytes | int]]) -> None:
    sequence = tight.sequence()
    sequence.append(encode(b""))
    data = b""
    for _kind, value in steps:
        if isinstance(value, bytes):
            value = value[: 300 - len(data)]
            sequence.append(encode(value)[1:])
            data += value
        else:
            value = min(value, len(data))
            sequence.roll_back(value)
            data = data[: len(data) - value]
    assert_like_fresh(tight, sequence, data)


@pytest.mark.parametrize(
    ("data", "count"), [(None, 1), (b"", 1), (b"abcd", -1), (b"abcd", 5), (b"abcd", 10**9)]
)
def test_a_roll_back_out_of_range_is_refused(tight: BltModel, data: bytes | None, count: int) -> None:
    sequence = tight.sequence()
    if data is not None:
        sequence.append(encode(data))
    sequence.roll_back(0)
    with pytest.raises(
        OptionError, match=f"roll back {count} bytes: 0 to {len(data or b'')} can be taken back"
    ):
        sequence.roll_back(count)
    if data is not None:
        assert_like_fresh(tight, sequence, data)


def test_a_text_that_does_not_fit_changes_nothing(tight: BltModel) -> None:
    sequence = tight.sequence()
    sequence.append(encode(b"x" * 390))
    with pytest.raises(PromptTooLongError, match=r"401 positions.*400"):
        sequence.append(np.full(10, 70, np.int64))
    assert sequence.length == 391
    sequence.append(np.full(9, 70, np.int64))
    assert sequence.length == 400


def test_memory_does_not_grow_with_the_text_but_for_the_global_cache(tight: BltModel) -> None:
    sequence = altered(tight, rollback=4).sequence()
    data = bytes(np.random.default_rng(0).integers(32, 127, 380, dtype=np.uint8))

    def but_for_the_text() -> int:
        state = sequence.state
        text = state.ids.nbytes + state.entropies.nbytes + state.boundaries.bytes
        return sequence.state_bytes - text - sequence._latent.cache.bytes

    sequence.append(encode(data[:200]))
    before = but_for_the_text()
    sequence.append(encode(data[200:])[1:])
    assert but_for_the_text() == before


def test_a_chunk_closes_its_patches_in_one_pass(model: BltModel) -> None:
    """Short ones and a few of eight times their length; a pass more reads all weights once more."""
    sequence = model.sequence()
    text = (b"a ,b. " * 9 + b"abcdefgh ") * 4
    ids = encode(text)[: model.limits.prefill_chunk]
    sequence.append(ids)
    longest = next_power_of_two(int(np.diff(sequence.boundaries.starts).max()))
    assert sequence.times["latent"].calls == -(-sequence.patches_closed * longest // (PADDING * len(ids)))


@example(lengths=[1] * 10, budget=4)
@example(lengths=[3] * 10, budget=8)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), budget=st.integers(1, 600))
def test_patch_groups_cover_all_patches_within_the_budget(lengths: list[int], budget: int) -> None:
    starts = [0, *np.cumsum(lengths).tolist()]
    done = 0
    while done < len(lengths):
        group = _patch_group(starts, done, len(lengths), budget)
        assert group >= 1
        padded = 1 << (max(lengths[done : done + group]) - 1).bit_length()
        assert group == 1 or group * padded <= budget
        done += group
        if done < len(lengths):  # one more would not have fit
            padded = max(padded, 1 << (lengths[done] - 1).bit_length())
            assert (group + 1) * padded > budget
    assert done == len(lengths)


@given(steps=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60), st.integers(0, 30)), max_size=25))
def test_byte_states_are_slices_of_all_states(steps: list[tuple[int, int, int]]) -> None:
    store, truth = ByteStates(HOST, 2), np.zeros((0, 2), np.float32)
    for count, dropped, back in steps:
        new = np.arange(len(truth), len(truth) + count, dtype=np.float32)[:, None].repeat(2, 1)
        store.append(len(truth), new)
        truth = np.concatenate([truth, new])
        store.drop_before(min(dropped, len(truth)))
        length = max(store.base, len(truth) - back)
        truth = truth[:length]
        np.testing.assert_array_equal(store.get(store.base, length), truth[store.base :])


# Words, characters of several bytes, long runs without a boundary, and every byte.
WALKED = encode(
    (
        b"Once upon a time there was a caf\xc3\xa9; " * 3
        + "中文字 ".encode() * 4
        + b"\x00" * 40
        + bytes(range(256))
    )[:340]
)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> NumpyBlt:
    """The model in plain numpy from the checkpoint's tensors: none of the runtime's code is in it."""
    checkpoint = tiny_bundle.parent / "checkpoint"
    config = parse_config(json.loads((checkpoint / "config.json").read_text()))
    return NumpyBlt(config, load_file(checkpoint / "model.safetensors"))


@pytest.fixture(scope="module")
def walked(plain: NumpyBlt) -> WholeText:
    threshold = plain.config.patching.threshold
    return plain.whole(WALKED, lambda h: [0, 1, *(i + 1 for i in range(1, len(h)) if h[i] > threshold)])


def agree(found: Any, wanted: Any) -> None:
    wanted = np.asarray(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5 * max(1.0, np.abs(wanted).max(initial=0)))


@settings(deadline=None, max_examples=40)
@given(
    chunk=st.sampled_from([1, 3, 16, 64]),
    rollback=st.sampled_from([0, 1, 5, 30]),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "read", "back", "back within the limit"]),
            st.one_of(st.integers(1, 9), st.integers(1, 200)),
        ),
        min_size=1,
        max_size=10,
    ),
)
def test_every_result_on_any_walk_is_plain_numpy_s(
    tight: BltModel, walked: WholeText, chunk: int, rollback: int, steps: list[tuple[str, int]]
) -> None:
    sequence = altered(tight, prefill_chunk=chunk, rollback=rollback).sequence()
    length = furthest = 0  # furthest: since the text was last read again
    values = walked.values
    for step, count in steps:
        if step.startswith("back"):
            if length:
                count = min(count, length - 1, rollback if step == "back within the limit" else length)
                calls = {name: spent.calls for name, spent in sequence.times.items()}
                sequence.roll_back(count)
                length -= count
                again = {name: spent.calls for name, spent in sequence.times.items()} != calls
                assert not again or furthest - length > rollback
                furthest = length if again else furthest
        else:
            count = min(count, len(WALKED) - length)
            ids, first = WALKED[length : length + count], length
            if step == "read":
                ids = ids[:chunk]
                results = [sequence.read(Draft(ids))] if len(ids) else []
            else:
                results = sequence.append(ids)
            length += len(ids)
            furthest = max(furthest, length)
            assert [len(result.logits) for result in results] == [
                min(chunk, length - start) for start in range(first, length, chunk)
            ]
            if results:
                agree(np.concatenate([result.logits for result in results]), walked.logits[first:length])
                agree(np.concatenate([result.byte_states for result in results]), walked.states[first:length])
                agree(
                    np.concatenate([result.entropies for result in results]), walked.entropies[first:length]
                )  # type: ignore[misc]
                closed = [start for start in walked.starts if first < start <= length]
                assert sum(len(result.closed) for result in results) == len(closed)
                last = results[-1].closed
                agree(sequence.patch_values(last), values[last.start : last.stop])
        # Whatever happened: what is said of the text is right.
        assert sequence.length == length
        assert sequence.ids.tolist() == WALKED[:length].tolist()
        assert sequence.boundaries.starts == [start for start in walked.starts if start <= length]
        assert sequence.patches_closed == len(sequence.boundaries.starts) - 1
        agree(sequence.entropies, walked.entropies[:length])
        if length:
            agree(sequence.logits, walked.logits[length - 1])


def test_a_sequence_out_of_step_is_refused(tight: BltModel) -> None:
    ids = encode(b"some text to read")
    for ahead in ("patcher", "encoder", "latent", "decoder", "boundaries"):
        sequence = tight.sequence()
        sequence.append(ids)
        if ahead == "boundaries":
            sequence.boundaries.extend(np.array([70]), np.zeros(1, np.float32))
        else:
            sequence._stages[ahead].cache.length += 1
        with pytest.raises(BackendError, match="begin a new sequence"):
            sequence.read(Draft(np.array([70])))


def test_a_draft_brings_what_was_computed_of_it(tight: BltModel, walked: WholeText) -> None:
    for with_entropies, with_states in ((True, False), (False, True), (True, True)):
        sequence = tight.sequence()
        sequence.append(WALKED[:50])
        ids = WALKED[50:58]
        before = {name: spent.calls for name, spent in sequence.times.items()}
        entropies = states = None
        if with_entropies:
            assert sequence.patcher is not None
            entropies = sequence.patcher.extend(ids).copy()
        if with_states:
            sequence.store_ids(50, ids)
            states = sequence.draft_states(8)
            states[:] = sequence.encode(50, 8)
        result = sequence.read(Draft(ids, entropies, states))
        agree(result.logits, walked.logits[50:58])
        agree(sequence.entropies, walked.entropies[:58])
        once = {name: spent.calls - before[name] for name, spent in sequence.times.items()}
        assert once == {"patcher": 1, "encoder": 1, "latent": once["latent"], "decoder": 1}
        # A draft of ids that some phase has not read is refused.
        with pytest.raises(BackendError, match="begin a new sequence"):
            sequence.read(Draft(WALKED[58:60], entropies=np.zeros(2, np.float32)))


def test_room_for_drafts_is_made_once(tight: BltModel) -> None:
    sequence = tight.sequence()
    room = sequence.draft_states(3)
    assert room.shape == (3, tight.manifest.model.width)
    assert not room.any()
    assert np.shares_memory(room, sequence.draft_states(2))
    assert len(sequence.draft_states(2)) == 2
    assert np.shares_memory(sequence.draft_states(3), room)
    assert sequence.draft_states(4).shape[0] == 4


def test_limits_say_what_to_do() -> None:
    limits = SequenceLimits(prefill_chunk=4, rollback=2, max_positions=10)
    limits.check_positions(10)
    for positions, wanted, said in (
        (None, 11, r"11 positions \(BOS included\), the model has 10; shorten it$"),
        (11, 11, r"engines were built for 10; shorten it, or blt-edge build --max-bytes 11$"),
        (12, 11, r"engines were built for 10; shorten it, or blt-edge build --max-bytes 11$"),
        (11, 12, r"built for 10; shorten it$"),
    ):
        with pytest.raises(PromptTooLongError, match=said):
            replace(limits, model_positions=positions).check_positions(wanted)
    assert (limits.cache.rollback, limits.cache.positions, limits.cache.chunk) == (2, 10, 4)


def test_figures_are_of_the_sequence_s_own_memory_and_time(tight: BltModel) -> None:
    sequence = tight.sequence()
    with pytest.raises(OptionError, match="nothing was read"):
        _ = sequence.logits
    sequence.append(WALKED[:100])
    state = sequence.state
    own = [state.patch_values.tensor, state.byte_states.buffer, state.logits.rows]
    caches = [buffer for stage in sequence._stages.values() for buffer in stage.cache.inputs().values()]
    text = state.ids.nbytes + state.entropies.nbytes + state.boundaries.bytes
    assert sequence.state_bytes == text + sum(buffer.nbytes for buffer in own + caches)
    assert sequence.stage_seconds == sum(spent.seconds for spent in sequence.times.values())
    assert list(sequence.times) == ["patcher", "encoder", "latent", "decoder"]
    # One pass more than chunks where more patches closed than fit one block.
    chunks = -(-100 // tight.limits.prefill_chunk)
    assert [spent.calls for spent in sequence.times.values()][:2] == [chunks, chunks]
    spent = {name: (one.calls, one.seconds) for name, one in sequence.times.items()}
    sequence.roll_back(80)
    for name, one in sequence.times.items():
        assert one.calls > spent[name][0]  # read again, on top of what it had cost
        assert one.seconds > spent[name][1]


def test_observers_are_told_of_every_stage(tight: BltModel) -> None:
    told: dict[str, list[int]] = {}
    watched = altered(tight)
    watched.observer = lambda stage, began, seconds, rows: told.setdefault(stage, []).append(rows)
    sequence = watched.sequence()
    sequence.append(WALKED[:40])
    chunks = [16, 16, 8]
    assert told["patcher"] == told["encoder"] == told["decoder"] == chunks
    assert sum(told["latent"]) == sequence.patches_closed
    assert set(told) == set(sequence.times)
    sequence.roll_back(39)
    assert told["decoder"] == [*chunks, 1]


def test_the_patcher_s_logits_are_those_of_the_last_ids(tight: BltModel, plain: NumpyBlt) -> None:
    entropies, logits = plain.patcher(WALKED[:30])
    patcher = tight.sequence().patcher
    assert patcher is not None
    for first, last in ((0, 9), (9, 10), (10, 26), (26, 30)):
        agree(patcher.extend(WALKED[first:last]), entropies[first:last])
        agree(patcher.last_logits, logits[first:last])


def test_a_rule_without_entropies_needs_no_patcher(tight: BltModel, plain: NumpyBlt) -> None:
    rule = PatchingRule("static", patch_size=3)
    manifest = replace(tight.manifest, patching=rule)
    backends = {name: backend for name, backend in tight._backends.items() if name != "patcher"}
    sequence = Sequence(manifest, backends, tight._table, tight.limits)
    wanted = plain.whole(WALKED[:70], [0, *range(1, 71, 3)])
    assert list(sequence.times) == ["encoder", "latent", "decoder"]
    results = sequence.append(WALKED[:70])
    assert [result.entropies for result in results] == [None] * 5
    assert sequence.entropies is None
    # 5 or 6 patches of 3 bytes end in a chunk of 16: padded to 4, they fit one block of 2 * 16.
    assert sequence.times["latent"].calls == 5
    agree(np.concatenate([result.logits for result in results]), wanted.logits)
    sequence.roll_back(5)
    agree(sequence.append(WALKED[65:70])[0].logits, wanted.logits[65:])


@pytest.mark.parametrize("step", [1, 700, 2000])
def test_ids_are_kept_and_seldom_copied(tight: BltModel, step: int) -> None:
    sequence, sizes = tight.sequence(), set()
    for first in range(0, 6000, step):
        sequence.store_ids(first, np.arange(first, first + step))
        sizes.add(len(sequence.state.ids))
        assert len(sequence.state.entropies) == len(sequence.state.ids) >= first + step
    assert sequence.state.ids[:6000].tolist() == list(range(6000))
    assert len(sizes) <= 6


@settings(deadline=None, max_examples=50)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=20))
def test_recent_logits_are_kept_as_far_as_it_says(tight: BltModel, steps: list[tuple[bool, int]]) -> None:
    # Windows of the caches hide this limit; a model without windows has no other.
    logits, rows = tight.sequence().state.logits, ROLLBACK + 1
    truth: list[int] = []
    furthest = 0
    for number, (forward, count) in enumerate(steps):
        if forward:
            values = [1000 * number + place for place in range(count)]
            logits.put(len(truth), np.repeat(np.array(values, np.float32)[:, None], 260, axis=1))
            truth += values
            furthest = max(furthest, len(truth))
        elif len(truth) - count - 1 >= logits.oldest:
            del truth[len(truth) - count :]
        assert logits.oldest == max(0, furthest - rows)
        for position in range(logits.oldest, len(truth)):
            assert (logits.after(position) == truth[position]).all()


def test_values_of_recent_patches_are_kept_as_far_as_it_says(tight: BltModel, plain: NumpyBlt) -> None:
    count, slots = 120, 16 + ROLLBACK + 2
    sequence = altered(tight, PatchingRule("byte")).sequence()
    wanted = plain.whole(WALKED[:count], list(range(count + 1))).values
    furthest = 0
    for step in (16, 16, 3, -ROLLBACK, 1, 16, 16, 16, -7, 2, -5, 16, 16):
        if step < 0:
            sequence.roll_back(-step)
        else:
            sequence.append(WALKED[sequence.length : sequence.length + step])
        closed = sequence.patches_closed
        furthest = max(furthest, closed)
        assert closed == sequence.length
        assert sequence.state.patch_values.oldest == max(0, furthest - slots)
        kept = range(sequence.state.patch_values.oldest, closed)
        agree(sequence.patch_values(kept), wanted[kept.start : kept.stop])
