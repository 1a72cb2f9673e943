"""Forks: other texts from the same beginning, which share memory and never see each other."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BackendError, BltModel, GenerationOptions, OptionError, Sequence
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.sequence import Draft
from blt_edge.runtime.state import memory_of
from blt_edge.runtime.vocabulary import byte_ids, encode
from support.model_store import altered
from support.state_walks import Walk, agree, assert_like_fresh, walk
from support.unreliable import Unreliable

TEXT = b"When the lamp was lit, the boats came in: " * 7  # 294 bytes


def read(model: BltModel, data: bytes) -> Sequence:
    sequence = model.sequence()
    sequence.append(encode(data))
    return sequence


def test_any_walk_with_forks_ends_where_fresh_runs_do(
    any_layout: BltModel, reference: BltModel, tmp_path: Path
) -> None:
    walk(Walk, any_layout, reference, tmp_path, 4)


# BOS alone, first patch, before and behind windows of 8 and 12 with 12 to take back, where an ordered window
# of 8 + 12 + 64 slides, and far behind.
@pytest.mark.parametrize("length", [0, 1, 7, 8, 11, 12, 19, 20, 24, 83, 84, 87, 200])
def test_forks_of_forks_at_any_length(any_layout: BltModel, reference: BltModel, length: int) -> None:
    parent = read(any_layout, TEXT[:length])
    child = parent.fork()
    grandchild = child.fork()
    before = grandchild.logits.copy()
    parent.append(byte_ids(b" parent \x00\x01" * 3))
    assert_like_fresh(reference, child.fork(), TEXT[:length], b"fork")
    child.append(byte_ids(b"Child" * 6))
    assert np.array_equal(grandchild.logits, before)
    assert_like_fresh(reference, grandchild, TEXT[:length])
    assert_like_fresh(reference, child, TEXT[:length] + b"Child" * 6)
    assert_like_fresh(reference, parent, TEXT[:length] + b" parent \x00\x01" * 3)


def test_a_fork_of_nothing_and_one_that_outlives_its_parent(
    any_layout: BltModel, reference: BltModel
) -> None:
    empty = any_layout.sequence()
    twins = [empty.fork(), empty]
    for twin, data in zip(twins, (b"one", b"another"), strict=True):
        twin.append(encode(data))
    assert_like_fresh(reference, twins[0], b"one")
    assert_like_fresh(reference, twins[1], b"another")
    parent = read(any_layout, TEXT[:100])
    orphan = parent.fork()
    parent.append(byte_ids(b"something else"))
    del parent, twins, empty
    gc.collect()
    assert orphan.own_bytes == orphan.state_bytes
    assert_like_fresh(reference, orphan, TEXT[:100])


def test_every_byte_a_patch(any_layout: BltModel, reference: BltModel) -> None:
    rule = PatchingRule("byte")
    ours, fresh = altered(any_layout, rule), altered(reference, rule)
    parent = read(ours, TEXT[:40])
    forks = []
    for index in range(5):  # patch values lie in a ring of 16 + 12 + 2: it is gone round twice
        forks.append((parent.fork(), TEXT[: 40 + 12 * index]))
        parent.append(byte_ids(TEXT[40 + 12 * index :][:12]))
    for sequence, data in [*forks, (parent, TEXT[:100])]:
        wanted = fresh.logits(data + b"xyz")[-4:]
        agree(sequence.logits, wanted[0])
        agree(np.concatenate([one.logits for one in sequence.append(byte_ids(b"xyz"))]), wanted[1:])


def test_a_fork_takes_back_as_its_parent_would(any_layout: BltModel, reference: BltModel) -> None:
    parent = read(any_layout, TEXT[:120])
    fork = parent.fork()
    calls = fork.times["decoder"].calls
    fork.roll_back(12)
    assert fork.times["decoder"].calls == calls == 0  # counters moved, nothing was read again
    again = fork.fork()
    fork.append(byte_ids(b"fork"))
    parent.roll_back(5)
    parent.append(byte_ids(b"parent"))
    again.roll_back(60)
    assert again.times["decoder"].calls > 0
    for sequence, data in (
        (fork, TEXT[:108] + b"fork"),
        (parent, TEXT[:115] + b"parent"),
        (again, TEXT[:48]),
    ):
        assert_like_fresh(reference, sequence, data)


def test_memory_that_is_shared_counts_once_and_is_nobodys_own(tight: BltModel) -> None:
    parent = read(tight, TEXT[:150])
    whole = parent.own_bytes
    assert whole == parent.state_bytes == memory_of([parent.state])
    fork = parent.fork()
    small = fork.own_bytes
    assert fork.state_bytes <= parent.state_bytes
    assert small < whole / 4
    assert parent.own_bytes < whole / 4
    assert memory_of([parent.state, fork.state]) == whole + small
    kept = [fork, *(parent.fork() for _ in range(3))]
    assert memory_of([one.state for one in kept]) < whole + 4 * small
    del parent
    del kept[1:]
    assert fork.own_bytes == fork.state_bytes


def test_what_grows_is_never_copied_for_who_comes_first(tight: BltModel) -> None:
    parent = read(tight, TEXT[:150])
    latent = parent.state.caches["latent"]
    latent.reserve(latent.capacity - latent.length)  # no growing in between
    buffer = latent.buffer
    kept = []
    while len(kept) < 5:  # as a store of prefixes does while a text is read
        kept.append(parent.fork())
        parent.append(byte_ids(b" at"))
    assert all(one.state.caches["latent"].buffer is buffer for one in (parent, *kept))
    assert len({one.patches_closed for one in kept}) > 1
    later = kept[2].fork()
    later.append(byte_ids(TEXT[:60]))
    assert later.state.caches["latent"].buffer is not buffer
    assert parent.state.caches["latent"].buffer is buffer


def test_caches_of_a_prompt_grow_once_and_to_about_what_it_needs(any_layout: BltModel) -> None:
    model = altered(any_layout, PatchingRule("static", patch_size=2), prefill_chunk=16)
    sequence, seen = model.sequence(), set()
    for _ in sequence.extend(encode(TEXT)):
        cache = sequence.state.caches["latent"]
        seen.add((cache.generation, cache.capacity))
    patches = sequence.patches_closed
    assert patches == 148
    first = min(seen)[1]
    assert len(seen) <= 2  # the capacity that everyone begins with, and one more
    assert patches <= max(seen)[1] <= max(first, 2 + patches * 9 / 8)


def test_forks_go_on_in_threads_of_their_own(any_layout: BltModel, reference: BltModel) -> None:
    parent = read(any_layout, TEXT[:140])
    ends = [b"north, " * 6, b"SOUTH " * 6, b"\x00\xff" * 18, b"1 2 3 4 5 " * 4]
    forks = [parent.fork() for _ in ends]
    options = GenerationOptions(max_new_bytes=24, draft="decoder", draft_length=4)
    with ThreadPoolExecutor(len(ends)) as pool:
        made = list(
            pool.map(lambda fork, end: any_layout.generate(end, options, sequence=fork).data, forks, ends)
        )
    for fork, end, data in zip(forks, ends, made, strict=True):
        assert data == reference.generate(TEXT[:140] + end, replace(options, draft="none")).data
        assert_like_fresh(reference, fork, TEXT[:140] + end + data)
    assert_like_fresh(reference, parent, TEXT[:140])


def test_a_fork_counts_anew_and_its_observers_are_the_same(tight: BltModel) -> None:
    told: list[tuple[str, int]] = []
    watched = altered(tight)
    watched.observer = lambda stage, began, seconds, rows: told.append((stage, rows))
    parent = read(watched, TEXT[:30])
    fork = parent.fork()
    assert fork.stage_seconds == 0
    del told[:]
    fork.append(byte_ids(b"x"))
    assert ("decoder", 1) in told
    assert fork.times["decoder"].calls == 1
    assert parent.times["decoder"].calls == 2


def test_a_sequence_that_failed_half_way_has_no_forks(tight: BltModel) -> None:
    backends: dict[str, Any] = dict(tight._backends)
    backends["decoder"] = Unreliable(backends["decoder"], 1, BackendError("it broke"))
    sequence = Sequence(tight.manifest, backends, tight._table, tight.limits)
    sequence.append(encode(b"abc"))
    whole = sequence.fork()
    with pytest.raises(BackendError, match="it broke"):
        sequence.append(byte_ids(b"d"))
    with pytest.raises(BackendError, match="begin a new sequence"):
        sequence.fork()
    assert whole.length == 4
    assert whole.fork().length == 4


def test_a_fork_whose_engine_fails_reads_its_text_again(tight: BltModel, reference: BltModel) -> None:
    backends: dict[str, Any] = dict(tight._backends)
    backends["decoder"] = Unreliable(backends["decoder"], 3, BackendError("it broke"))
    asked = []

    def others(error: BackendError, failed: Any) -> Any:
        asked.append(str(error))
        return tight._backends

    parent = Sequence(tight.manifest, backends, tight._table, tight.limits, fall_back=others)
    parent.append(encode(TEXT[:40]))
    fork = parent.fork()
    fork.append(byte_ids(b"fork"))
    parent.append(byte_ids(b"parent"))
    assert len(asked) == 2
    for sequence, data in ((fork, TEXT[:40] + b"fork"), (parent, TEXT[:40] + b"parent")):
        agree(sequence.logits, tight.logits(data)[-1])
        agree(sequence.read(Draft(byte_ids(b"!"))).logits[0], tight.logits(data + b"!")[-1])


def test_a_packed_state_takes_less_and_its_forks_are_like_any(
    any_layout: BltModel, reference: BltModel
) -> None:
    rollback = any_layout.limits.rollback
    for length in (0, 1, 25, 84, 120, 290):
        whole = read(any_layout, TEXT[:length])
        packed, before = whole.fork(packed=True), whole.state_bytes
        assert packed.state_bytes <= before
        first = packed.fork()
        assert_like_fresh(reference, first, TEXT[:length])
        for back in (1, rollback):
            if back <= length:
                other = packed.fork()
                assert other.state.can_roll_back(1 + length - back)
                other.roll_back(back)
                assert_like_fresh(reference, other, TEXT[: length - back])
        assert_like_fresh(reference, packed.fork().fork(), TEXT[:length])
    assert packed.state_bytes < before


def test_a_packed_state_is_saved_as_it_is(any_layout: BltModel, reference: BltModel, tmp_path: Path) -> None:
    whole = read(any_layout, TEXT[:200])
    packed = whole.fork(packed=True)
    packed.save(tmp_path / "state")
    assert_like_fresh(reference, any_layout.restore(tmp_path / "state"), TEXT[:200])


def test_a_packed_sequence_is_not_read_on(any_layout: BltModel, reference: BltModel) -> None:
    packed = read(any_layout, TEXT[:150]).fork(packed=True)
    for draft in ("none", "decoder", "patcher", "lookup"):
        with pytest.raises(OptionError, match=r"packed, to be kept only; go on in a fork\(\) of it"):
            any_layout.generate(b"", GenerationOptions(max_new_bytes=5, draft=draft), sequence=packed)
    for data in (b"", b"!", b"over and over " * 3):
        with pytest.raises(OptionError, match="packed"):
            packed.read(Draft(byte_ids(data)))
    assert_like_fresh(reference, packed.fork(), TEXT[:150])


def test_what_a_file_will_take_is_known_before(any_layout: BltModel, tmp_path: Path) -> None:
    for length in (0, 1, 25, 290):
        for packed in (False, True):
            sequence = read(any_layout, TEXT[:length]).fork(packed=packed)
            sequence.save(tmp_path / "state")
            header = int.from_bytes((tmp_path / "state").read_bytes()[20:24], "little")
            assert sequence.state.saved_bytes == (tmp_path / "state").stat().st_size - 24 - header - 32
