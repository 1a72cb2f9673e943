"""Arrays in pieces: what is read is what was written, whatever the pieces, the threads and the target."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from blt_edge.runtime import StateError, state_pieces
from blt_edge.runtime.state_pieces import ArrayReader, ArrayWriter
from hypothesis import given
from hypothesis import strategies as st

START = b"what comes before"


@pytest.fixture(params=["threads", "one thread", "no preadv"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How pieces are read; they are small, so that small arrays have many."""
    monkeypatch.setattr(state_pieces, "PIECE", 64)
    monkeypatch.setattr(state_pieces, "usable_cores", lambda: 1 if request.param == "one thread" else 3)
    if request.param == "no preadv":
        monkeypatch.delattr(os, "preadv", raising=False)
    return str(request.param)


def written(arrays: dict[str, np.ndarray], size: int) -> bytes:
    """What the file has to be."""
    seal, body = hashlib.sha256(START), b""
    for values in arrays.values():
        data = values.tobytes()
        body += data
        for place in range(0, len(data), size):
            seal.update(hashlib.sha256(data[place : place + size]).digest())
    return START + body + seal.digest()


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


ARRAYS = {
    "ids": np.arange(201, dtype="<u2"),
    "none": floats(0, 7),
    "starts": np.arange(16, dtype="<u4"),
    "planes": floats(4, 3, 11, 5),
    "last": floats(3, 5),
}


def put(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        writer = ArrayWriter(file, START)
        for name, values in arrays.items():
            writer.put(name, list(values) if values.ndim == 4 else [values])
        writer.finish()


@pytest.mark.usefixtures("way")
def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    put(path, ARRAYS)
    assert path.read_bytes() == written(ARRAYS, 64)
    with path.open("rb") as file:
        reader, skipping = ArrayReader(file, START), ArrayReader(file, START)
        for name, values in ARRAYS.items():
            target = np.zeros_like(values)
            reader.read(name, target)
            assert np.array_equal(target, values)
            skipping.skip(values.nbytes)
        reader.check_seal()
        skipping.check_seal()


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3, st.integers(1, 9)),
    before=st.integers(0, 2),
    behind=st.integers(0, 2),
    piece=st.sampled_from([4, 12, 64, 100, 1 << 20]),
)
def test_a_target_may_have_gaps(shape: tuple[int, ...], before: int, behind: int, piece: int) -> None:
    planes, heads, slots, width = shape
    values, file = floats(*shape), io.BytesIO()
    whole = np.zeros((planes, heads, before + slots + behind, width), np.float32)  # a cache's slots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_pieces, "PIECE", piece)
        patch.setattr(ArrayReader, "_fill", lambda self, into, place: _from(file, into, place))
        ArrayWriter(file, START).put("planes", values)
        ArrayReader(file, START).read("planes", whole[:, :, before : before + slots])
    assert np.array_equal(whole[:, :, before : before + slots], values)
    assert np.count_nonzero(whole) == np.count_nonzero(values)


def _from(file: io.BytesIO, into: memoryview, place: int) -> None:
    into[:] = file.getvalue()[place : place + len(into)]


@pytest.mark.usefixtures("way")
def test_every_changed_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    arrays = {"ids": np.arange(300, dtype="<u2"), "starts": np.arange(40, dtype="<u4")}
    put(path, arrays)
    whole = path.read_bytes()

    def read() -> None:
        with path.open("rb") as file:
            reader = ArrayReader(file, START)
            for name, values in arrays.items():
                reader.read(name, np.zeros_like(values))
            reader.check_seal()

    read()
    for place in range(len(START), len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(StateError, match="changed after it was written"):
            read()
        path.write_bytes(whole[:place])
        with pytest.raises(StateError, match="truncated"):
            read()
    # Pieces that have changed places.
    path.write_bytes(
        START + whole[len(START) + 64 :][:64] + whole[len(START) :][:64] + whole[len(START) + 128 :]
    )
    with pytest.raises(StateError, match="changed after it was written"):
        read()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_found_wherever_it_is(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "file"
    for place in range(0, 660, 101):
        values = floats(4, 3, 11, 5)
        values.reshape(-1)[place] = bad
        with pytest.raises(StateError, match="planes: some values are no finite numbers"):
            put(path, {"planes": values})
        path.write_bytes(written({"planes": values}, 64))
        with path.open("rb") as file, pytest.raises(StateError, match="planes: some values"):
            ArrayReader(file, START).read("planes", np.zeros_like(values))
