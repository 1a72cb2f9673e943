"""State files: what is restored is what was saved, and a file that anybody changed is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, OptionError, Sequence, StateError, state_pieces
from blt_edge.runtime.files import WriteError
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.state_file import ARRAYS, describe
from blt_edge.runtime.vocabulary import EOS, byte_ids, encode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.model_store import altered
from support.state_walks import SavingWalk, agree, assert_like_fresh, walk

TEXT = b"When the lamp was lit, the boats came in: " * 7  # 294 bytes


@pytest.fixture(scope="module")
def saved(tight: BltModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of 100 bytes of the tiny model."""
    path = tmp_path_factory.mktemp("saved") / "one.state"
    read(tight, TEXT[:100]).save(path)
    return path.read_bytes()


def seal(start: bytes, arrays: dict[str, np.ndarray]) -> bytes:
    """What the last 32 bytes have to be."""
    size, whole = state_pieces.PIECE, hashlib.sha256(start)
    for values in arrays.values():
        data = values.tobytes()
        for piece in range(0, len(data), size):
            whole.update(hashlib.sha256(data[piece : piece + size]).digest())
    return whole.digest()


def read(model: BltModel, data: bytes) -> Sequence:
    sequence = model.sequence()
    sequence.append(encode(data))
    return sequence


class Parts:
    """A state file taken apart, to be changed and put together as somebody who knows the format would."""

    def __init__(self, data: bytes) -> None:
        end = 24 + int.from_bytes(data[20:24], "little")
        self.header: dict[str, Any] = json.loads(data[24:end])
        start = data[:end]
        self.arrays: dict[str, np.ndarray] = {}
        for name in ARRAYS:
            if name in self.header:
                shape = self.header[name][1:]
                dtype = np.dtype({"ids": "<u2", "starts": "<u4"}.get(name, "<f4"))
                size = int(np.prod(shape)) * dtype.itemsize
                self.arrays[name] = np.frombuffer(data[end : end + size], dtype).reshape(shape).copy()
                end += size
        assert data[end:] == seal(start, self.arrays)

    def sealed(self, *, shapes: bool = True) -> bytes:
        """The file; shapes: the header tells those of the arrays."""
        header = dict(self.header)
        for name, values in self.arrays.items():
            if shapes:
                header[name] = [header[name][0], *values.shape]
        text = json.dumps(header).encode()
        body = b"".join(values.tobytes() for values in self.arrays.values())
        start = b"blt-edge state\r\n" + (2).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
        return start + body + seal(start, self.arrays)


def refused(model: BltModel, data: bytes, folder: Path, match: str) -> None:
    path = folder / "bad.state"
    path.write_bytes(data)
    with pytest.raises(StateError, match=match) as caught:
        model.restore(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# 1. What is restored is what was saved.


def test_any_walk_with_saving_ends_where_fresh_runs_do(
    any_layout: BltModel, reference: BltModel, tmp_path: Path
) -> None:
    walk(SavingWalk, any_layout, reference, tmp_path, 4)


@pytest.mark.parametrize("length", [0, 1, 7, 12, 30, 90, 290])
def test_a_restored_text_goes_on_to_the_bit(any_layout: BltModel, tmp_path: Path, length: int) -> None:
    sequence = read(any_layout, TEXT[:length])
    back = min(4, length)
    sequence.roll_back(back)  # what lies ahead of the text is not part of it
    sequence.save(tmp_path / "a.state")
    restored = any_layout.restore(tmp_path / "a.state")
    assert restored.ids.tolist() == encode(TEXT[: length - back]).tolist()
    assert restored.boundaries.starts == sequence.boundaries.starts
    assert np.array_equal(restored.logits, sequence.logits)
    for ids in (byte_ids(b"x"), byte_ids(b" and so on")):
        agree(restored.append(ids)[0].logits, sequence.append(ids)[0].logits)


def test_a_state_goes_from_any_engine_to_any_other(
    any_layout: BltModel, layouts: dict[str, BltModel], reference: BltModel, tmp_path: Path
) -> None:
    sequence = read(any_layout, TEXT[:150])
    sequence.roll_back(3)
    sequence.save(tmp_path / "a.state")
    for other in layouts.values():
        restored = other.restore(tmp_path / "a.state")
        restored.roll_back(9)
        assert restored.times["decoder"].calls == 0  # what rolling back needs was saved, too
        assert_like_fresh(reference, restored, TEXT[:138])


@pytest.mark.parametrize("limits", [(3, 0), (3, 40), (64, 2), (256, 64)])
def test_limits_of_who_restores_are_their_own(
    tight: BltModel, tmp_path: Path, limits: tuple[int, int]
) -> None:
    read(tight, TEXT[:200]).save(tmp_path / "a.state")
    other = altered(tight, prefill_chunk=limits[0], rollback=limits[1])
    for back in (0, 1, 2, 12, 13, 100):
        restored = other.restore(tmp_path / "a.state")
        restored.roll_back(back)
        agree(restored.logits, tight.logits(TEXT[: 200 - back])[-1])
        more = np.concatenate([one.logits for one in restored.append(byte_ids(b" more bytes"))])
        agree(more, tight.logits(TEXT[: 200 - back] + b" more bytes")[-11:])


def test_a_rule_without_entropies(tight: BltModel, tmp_path: Path) -> None:
    other = altered(tight, PatchingRule("static", patch_size=3))
    sequence = read(other, TEXT[:70])
    sequence.save(tmp_path / "a.state")
    assert "entropies" not in Parts((tmp_path / "a.state").read_bytes()).arrays
    restored = other.restore(tmp_path / "a.state")
    assert restored.boundaries.starts == [0, *range(1, 72, 3)]
    agree(restored.append(byte_ids(b"ab"))[0].logits, sequence.append(byte_ids(b"ab"))[0].logits)
    with pytest.raises(
        StateError, match=r"patches follow another rule .mode static, patch_size 3; here mode"
    ):
        tight.restore(tmp_path / "a.state")


def test_it_holds_what_lives_and_no_capacity(tight: BltModel, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    sequence = read(tight, TEXT[:200])
    sequence.save(path)
    shapes = {name: values.shape for name, values in Parts(path.read_bytes()).arrays.items()}
    assert shapes["ids"] == shapes["entropies"] == (201,)
    assert shapes["patcher"][2] == 12 - 1 + 12  # window, itself left out, and what may be taken back
    assert shapes["encoder"][2] == shapes["decoder"][2] == 8 - 1 + 12
    assert shapes["latent"][2] == sequence.patches_closed
    assert shapes["logits"] == (13, 260)
    assert shapes["byte_states"][0] < 60
    assert path.stat().st_size < sequence.state_bytes


# 2. What a file tells.


def test_a_description_reads_no_arrays(tight: BltModel, tmp_path: Path, saved: bytes) -> None:
    path = tmp_path / "a.state"
    path.write_bytes(saved)
    told = describe(path)
    sequence = read(tight, TEXT[:100])
    assert told == describe(path, verify=True) == describe(str(path))
    assert (told.length, told.patches, told.bytes) == (101, sequence.boundaries.count, len(saved))
    assert (told.beginning, told.end) == (TEXT[:63], TEXT[36:100])
    assert told.bundle == tight.manifest.fingerprint
    assert (told.model, told.engine) == ("checkpoint", "portable graphs")
    assert abs(datetime.now(timezone.utc) - told.made) < timedelta(minutes=10)
    assert told.text_sha256 == hashlib.sha256(sequence.ids.astype("<u2").tobytes()).hexdigest()
    spoilt = bytearray(saved)
    spoilt[-5000] ^= 1
    path.write_bytes(spoilt)
    assert describe(path) == told
    with pytest.raises(StateError, match="changed after it was written"):
        describe(path, verify=True)


def test_patches_are_counted_whether_the_last_is_open_or_not(tight: BltModel, tmp_path: Path) -> None:
    counts = set()
    for length in range(1, 30):
        sequence = read(tight, TEXT[:length])
        sequence.save(tmp_path / "a.state")
        assert describe(tmp_path / "a.state").patches == sequence.boundaries.count
        counts.add(sequence.boundaries.starts[-1] == sequence.length)
    assert counts == {True, False}


def test_special_ids_are_part_of_a_text_and_not_of_its_bytes(tight: BltModel, tmp_path: Path) -> None:
    sequence = read(tight, b"ab")
    sequence.append([EOS, *byte_ids(b"cd")])
    sequence.save(tmp_path / "a.state")
    told = describe(tmp_path / "a.state")
    assert (told.beginning, told.end) == (b"abcd", b"abcd")
    assert tight.restore(tmp_path / "a.state").ids.tolist() == sequence.ids.tolist()


def test_bundles_differ_by_what_they_compute(tight: BltModel) -> None:
    manifest = tight.manifest
    same = replace(
        manifest,
        generator="99.9",
        source=replace(manifest.source, name="other"),
        patching=PatchingRule("byte"),
    )
    assert same.fingerprint == manifest.fingerprint
    name = manifest.stages["decoder"].data
    files_of = {**manifest.files, name: replace(manifest.files[name], sha256="0" * 64)}
    assert manifest.with_files(files_of).fingerprint != manifest.fingerprint
    wider = replace(manifest, model=replace(manifest.model, width=manifest.model.width + 1))
    assert wider.fingerprint != manifest.fingerprint


# 3. Who did not write it whole, or changed it.


def test_every_cut_and_every_byte_too_many_is_refused(tight: BltModel, saved: bytes, tmp_path: Path) -> None:
    for length in {0, 1, 15, 16, 23, 24, 25, 500, *range(0, len(saved), 4999), len(saved) - 1}:
        match = "no saved state" if length == 0 else "truncated|header"
        refused(tight, saved[:length], tmp_path, match)
    refused(tight, saved + b"\0", tmp_path, f"has extra bytes: it has {len(saved) + 1} bytes")


@settings(max_examples=80)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(at=0.0, bit=0)
def test_every_changed_bit_is_found(
    tight: BltModel, saved: bytes, tmp_path_factory: pytest.TempPathFactory, at: float, bit: int
) -> None:
    spoilt = bytearray(saved)
    spoilt[int(at * len(saved))] ^= 1 << bit
    refused(tight, bytes(spoilt), tmp_path_factory.getbasetemp(), ".")


def change(name: str, values: Callable[[np.ndarray], Any]) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts.arrays[name] = np.asarray(values(parts.arrays[name]), parts.arrays[name].dtype)

    return apply


def tell(**header: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.header.update(header)


def put(index: Any, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return apply


def retold(values: Callable[[np.ndarray], Any]) -> Callable[[Parts], None]:
    """Another text, which the header names rightly."""

    def apply(parts: Parts) -> None:
        change("ids", values)(parts)
        parts.header["text_sha256"] = hashlib.sha256(parts.arrays["ids"].tobytes()).hexdigest()

    return apply


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (tell(bundle="0" * 64), "another bundle .checkpoint, fingerprint 0000000000000000; this one is"),
        (tell(patching="mode entropy, threshold 99.0"), "another rule"),
        (tell(length=102), "gives 102 ids and an array of others"),
        (tell(length=True), "length: got True, a whole number from 1"),
        (tell(length=0), "length: got 0"),
        (tell(made="yesterday"), "made: got 'yesterday', a time is needed"),
        (tell(made="9999-12-31T23:59:59-23:00"), "made: got"),
        (tell(model="\x1b[2J"), "model: got .* printable text"),
        (tell(engine=""), "engine: got '', printable text"),
        (tell(text_sha256="0" * 64), "not the one that its header names"),
        (tell(text_sha256="xyz"), "a sha256 of 64"),
        (tell(more=1), "a field 'more', which no state has"),
        (lambda parts: parts.header.pop("made"), "has no made"),
        (lambda parts: (parts.header.pop("logits"), parts.arrays.pop("logits")), r"this model .logits"),
        (lambda parts: (parts.header.pop("starts"), parts.arrays.pop("starts")), "no list of patches"),
        (retold(put(5, 260)), "its ids have 260; allowed are 0 to 259"),
        (retold(put(5, 65535)), "its ids have 65535"),
        (change("entropies", put(50, np.nan)), "entropies: some values are no finite"),
        (change("entropies", put(slice(20, 40), 1e9)), "patches are not those of its text"),
        (change("starts", put(3, 999)), "patches are not those of its text"),
        (change("starts", lambda starts: starts[:-1]), "patches are not those of its text"),
        (change("starts", lambda starts: starts[:0]), "patches are not those of its text"),
        (change("patcher", put((0, 0, 0, 0), np.inf)), "patcher: some values"),
        (change("latent", put((0, 0, 0, 0), -np.inf)), "latent: some values"),
        (change("logits", put((0, 0), np.nan)), "logits: some values"),
        (change("byte_states", put((0, 0), np.nan)), "byte_states: some values"),
        (change("patch_values", put((0, 0), np.nan)), "patch_values: some values"),
        # Fewer positions than the next byte sees, or others.
        (change("encoder", lambda values: values[:, :, :-1]), "its encoder are of 82 to 100, the text needs"),
        (change("latent", lambda values: values[:, :, 1:]), "its latent are of 0 to"),
        (
            change("decoder", lambda values: values[:, :, :0]),
            "its decoder are of 82 to 82, the text needs 94 to",
        ),
        (change("decoder", lambda values: values[:1]), "its decoder have the shape"),
        (change("patcher", lambda values: values.reshape(-1)), "its patcher have the shape"),
        (change("patch_values", lambda values: values[:0]), "its patch_values are of"),
        (change("patch_values", lambda values: values[:, 1:]), "its patch_values have the shape"),
        (change("byte_states", lambda values: values[:0]), "its byte_states are of"),
        (change("logits", lambda values: values[:0]), "its logits are of"),
        (change("logits", lambda values: values[:, :259]), "its logits have the shape"),
    ],
)
def test_what_contradicts_itself_is_refused_though_its_sha256_is_right(
    tight: BltModel, saved: bytes, tmp_path: Path, spoil: Callable[[Parts], Any], match: str
) -> None:
    parts = Parts(saved)
    assert Parts(parts.sealed()).header == parts.header
    spoil(parts)
    refused(tight, parts.sealed(), tmp_path, match)


@pytest.mark.parametrize("name", [name for name in ARRAYS if name != "ids"])
def test_positions_that_are_not_the_text_s_are_refused(
    tight: BltModel, saved: bytes, tmp_path: Path, name: str
) -> None:
    for first in (1, 7, 101, 2**31 - 1):
        parts = Parts(saved)
        parts.header[name][0] += first
        refused(tight, parts.sealed(), tmp_path, f"its {name} (are of|have the shape)|whole numbers")


def test_sizes_that_no_file_has_cost_no_memory(tight: BltModel, saved: bytes, tmp_path: Path) -> None:
    huge = 2**31 - 1
    tracemalloc.start()
    try:
        for name in ARRAYS:
            parts = Parts(saved)
            parts.header[name] = [parts.header[name][0], huge, huge, huge, huge][: len(parts.header[name])]
            if name == "ids":
                parts.header["length"] = huge
            refused(tight, parts.sealed(shapes=False), tmp_path, "truncated|array of others")
        lead = saved[:20] + (2**32 - 1).to_bytes(4, "little") + saved[24:]
        refused(tight, lead, tmp_path, "header would have 4294967295 bytes")
        for version in (0, 1, 3, 2**32 - 1):
            refused(
                tight, saved[:16] + version.to_bytes(4, "little") + saved[20:], tmp_path, f"format {version} "
            )
        for text in (
            b"[" * 3000,
            b"{}",
            b"[]",
            b"nul",
            b'{"a": 1e999}',
            b"\xff\xfe",
            b'{"length": 9' + b"9" * 5000,
        ):
            data = saved[:20] + len(text).to_bytes(4, "little") + text
            refused(tight, data, tmp_path, "its header|an object")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "match"),
    [("logits", "logits are of 0 to 2147483647"), ("starts", "has 2147483647 patches of 101")],
)
def test_a_sparse_file_as_large_as_it_says_is_refused_before_it_is_read(
    tight: BltModel, saved: bytes, tmp_path: Path, name: str, match: str
) -> None:
    parts, count = Parts(saved), 2**31 - 1
    parts.header[name] = [0, count, *parts.arrays[name].shape[1:]]
    path = tmp_path / "sparse.state"
    path.write_bytes(parts.sealed(shapes=False))
    os.truncate(path, path.stat().st_size + parts.arrays[name][0].nbytes * (count - len(parts.arrays[name])))
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match=match):
            tight.restore(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(saved)
    finally:
        tracemalloc.stop()


def test_what_is_no_plain_file_is_refused(tight: BltModel, saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.state").write_bytes(saved)
    (tmp_path / "link").symlink_to("a.state")
    os.mkfifo(tmp_path / "pipe")
    for name, match in (
        ("link", "is a link, a saved state is a regular file"),
        ("pipe", "is not a regular file; give a file that was saved"),
        ("missing", "is missing; give a file that was saved"),
        ("", "is not a regular file"),
    ):
        for way in (tight.restore, describe):
            with pytest.raises(StateError, match=match):
                way(tmp_path / name)
    for path in (None, 3, b"bytes"):
        for use in (tight.restore, describe, read(tight, b"a").save):
            with pytest.raises(OptionError, match="allowed is the name of a file"):
                use(path)  # type: ignore[operator]


def test_a_text_longer_than_the_model_takes_is_refused(tight: BltModel, tmp_path: Path) -> None:
    read(tight, TEXT[:100]).save(tmp_path / "a.state")
    with pytest.raises(StateError, match="101 ids, BOS included, 100 can be read here"):
        altered(tight, max_positions=100).restore(tmp_path / "a.state")


# 4. Written whole or not at all.


def test_nothing_is_nothing_to_save(tight: BltModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing was read yet"):
        tight.sequence().save(tmp_path / "a.state")
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays_when_writing_fails(
    tight: BltModel, saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.state"
    path.write_bytes(saved)
    sequence = read(tight, b"another text")

    def full(name: str, values: np.ndarray) -> None:
        if name == "decoder":
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(state_pieces, "check_finite", full)
        with pytest.raises(
            WriteError, match=r"a.state cannot be written .No space left on device.; what was"
        ):
            sequence.save(path)
    assert path.read_bytes() == saved
    sequence.state.logits.rows[:] = np.nan
    with pytest.raises(StateError, match="logits: some values are no finite numbers"):
        sequence.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.state"]
    assert path.read_bytes() == saved
    with pytest.raises(WriteError, match="No such file or directory"):
        read(tight, b"a").save(tmp_path / "none" / "a.state")
    with pytest.raises(WriteError, match="s a directory"):
        read(tight, b"a").save(tmp_path)


def test_what_a_killed_save_left_is_removed_by_the_next(tight: BltModel, tmp_path: Path) -> None:
    left = tmp_path / ".a.state.partial-123-0123abcd"
    left.write_bytes(b"half a state")
    others = [
        tmp_path / name for name in (".b.state.partial-123-0123abcd", ".a.state.partial-x", ".a.state.other")
    ]
    for other in others:
        other.write_bytes(b"not ours")
    read(tight, b"a").save(tmp_path / "a.state")
    assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_save_that_goes_on_is_left_alone(
    tight: BltModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, seen = read(tight, b"one"), read(tight, b"two"), []
    check = state_pieces.check_finite

    def in_between(name: str, values: np.ndarray) -> None:
        check(name, values)
        if name == "decoder" and not seen:
            seen.append(name)
            two.save(tmp_path / "a.state")
            seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(state_pieces, "check_finite", in_between)
    one.save(tmp_path / "a.state")
    assert len([name for name in seen if re.match(r"\.a\.state\.partial-", name)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]
    assert describe(tmp_path / "a.state", verify=True).beginning == b"one"
