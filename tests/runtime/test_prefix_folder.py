"""A store's folder: what one process has read the next one need not read, whatever else lies there."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions, PrefixStore, state_file
from blt_edge.runtime.errors import StateError
from blt_edge.runtime.files import OutputError, WriteError
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.prefix_folder import Loaded, PrefixFolder, make_folder
from support.model_store import altered
from support.state_walks import assert_like_fresh

TEXT = b"When the lamp was lit, the boats came in: " * 4
TEXTS = [b"", b"abc", TEXT, TEXT[:80] + b"!"]
PLENTY = 1 << 30
NONE = GenerationOptions(max_new_bytes=4, draft="none")

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


def filled(model: BltModel, *texts: bytes, memory: int = PLENTY) -> PrefixStore:
    store = PrefixStore(model, memory)
    for text in texts or TEXTS:
        store.generate(text, max_new_bytes=0)
    return store


def keys(store: PrefixStore) -> list[bytes]:
    return list(store._order)


@pytest.fixture
def folder(tmp_path: Path) -> PrefixFolder:
    return PrefixFolder(tmp_path / "states")


def files(folder: PrefixFolder) -> list[Path]:
    return sorted(folder.path.iterdir())


def test_what_was_kept_is_there_again(tight: BltModel, folder: PrefixFolder) -> None:
    store = filled(tight)
    folder.save(store)
    assert len(files(folder)) == 4
    assert all(len(path.name) == 64 + 6 for path in files(folder))
    again = PrefixStore(tight, PLENTY)
    assert folder.load(again) == Loaded(4)
    assert keys(again) == keys(store)
    for sequence, text in zip(again.sequences(), keys(store), strict=True):
        assert_like_fresh(tight, sequence.fork(), text)
    result = again.generate(TEXT, NONE)
    assert result.stats.reused_bytes == len(TEXT)
    assert result.data == tight.generate(TEXT, NONE).data


def test_only_what_is_new_is_written_and_what_was_dropped_goes(tight: BltModel, folder: PrefixFolder) -> None:
    store = filled(tight)
    folder.save(store)
    before = {path: path.stat().st_ino for path in files(folder)}
    store.clear()
    for text in (TEXT, b"abc", b"new"):
        store.generate(text, max_new_bytes=0)
    folder.save(store)
    after = {path: path.stat().st_ino for path in files(folder)}
    assert len(after) == 3
    assert len(after.items() & before.items()) == 2
    again = PrefixStore(tight, PLENTY)
    folder.load(again)
    assert keys(again) == [TEXT, b"abc", b"new"]  # as they were used last


def test_what_there_is_no_room_for_is_dropped(tight: BltModel, folder: PrefixFolder) -> None:
    folder.save(filled(tight))
    size = sum(path.stat().st_size for path in files(folder))
    small = PrefixStore(tight, size - 1)
    loaded = folder.load(small)
    assert b"" not in keys(small)
    assert keys(small)[-1] == TEXTS[-1]
    assert len(loaded.dropped) == 1
    assert loaded.dropped[0].endswith("there is no room for it")
    assert len(files(folder)) == 3
    assert small.figures.bytes <= small.memory
    # Nor are more bytes written than the store may have.
    big = filled(tight)
    big.memory = size // 2
    folder.save(big)
    assert sum(path.stat().st_size for path in files(folder)) <= size // 2


def test_files_that_are_none_or_others_are_dropped_with_a_line(tight: BltModel, folder: PrefixFolder) -> None:
    folder.save(filled(tight))
    other = altered(tight, PatchingRule(mode="space"))
    assert len(folder.load(PrefixStore(other, PLENTY)).dropped) == 4
    assert files(folder) == []
    folder.save(filled(tight))
    first, second, third, _ = files(folder)
    data = bytearray(first.read_bytes())
    data[-40] ^= 1
    first.write_bytes(data)
    second.write_bytes(b"")
    outside = folder.path.parent / "outside"
    outside.write_bytes(b"not ours")
    third.unlink()
    third.symlink_to(outside)
    note = folder.path / "note.txt"
    note.write_text("left alone")
    store = PrefixStore(tight, PLENTY)
    loaded = folder.load(store)
    assert loaded.states == 1
    assert len(loaded.dropped) == 3
    assert all("\n" not in line for line in loaded.dropped)
    assert outside.read_bytes() == b"not ours"
    assert note.read_text() == "left alone"
    assert len(files(folder)) == 2


@posix
def test_the_folder_is_its_owner_s_alone(tmp_path: Path, tight: BltModel) -> None:
    folder = PrefixFolder(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    with pytest.raises(OutputError, match="in use by another process"):
        PrefixFolder(tmp_path / "new")
    folder.close()
    folder.close()
    PrefixFolder(tmp_path / "new").close()
    (tmp_path / "new").chmod(0o755)
    with pytest.raises(OutputError, match=r"others may use .*; chmod 700"):
        PrefixFolder(tmp_path / "new")
    assert make_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(OutputError, match="is a link"):
        PrefixFolder(tmp_path / "link")
    (tmp_path / "file").touch()
    for wrong in ("file", "file/below", "no/where"):
        with pytest.raises(OutputError, match=r"is not a directory|can't be made"):
            PrefixFolder(tmp_path / wrong)


def test_a_disk_that_is_full_is_told_of(
    tight: BltModel, folder: PrefixFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tight, b"abc")
    folder.save(store)
    before = files(folder)
    store.generate(TEXT, max_new_bytes=0)

    write = state_file._write

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blt_edge.runtime.state_file._write", full)
    with pytest.raises(WriteError, match="No space left"):
        folder.save(store)
    assert files(folder) == before
    # What the store has dropped makes room.
    tries = []

    def full_at_first(*given: object) -> None:
        tries.append(files(folder))
        if before[0].exists():
            full()
        write(*given)

    monkeypatch.setattr("blt_edge.runtime.state_file._write", full_at_first)
    store.clear()
    store.generate(TEXT, max_new_bytes=0)
    folder.save(store)
    assert len(tries) == 2
    assert len(files(folder)) == 1
    assert folder.load(PrefixStore(tight, PLENTY)) == Loaded(1)


_ENDLESS = """
import sys
from pathlib import Path
from blt_edge.runtime import BltModel, PrefixStore
from blt_edge.runtime.prefix_folder import PrefixFolder

model = BltModel.load(sys.argv[1], threads=1)
folder = PrefixFolder(Path(sys.argv[2]))
number = 0
while True:
    store = PrefixStore(model, 1 << 30)
    for _ in range(3):
        store.generate(b"%d " % number * 60, max_new_bytes=0)
        number += 1
    folder.save(store)
    print(number, flush=True)
"""


@posix
def test_killed_at_any_moment_the_next_start_has_whole_states(tiny_bundle: Path, tmp_path: Path) -> None:
    model = BltModel.load(tiny_bundle, threads=1)
    path = tmp_path / "states"
    for number in range(3):
        command = [sys.executable, "-c", _ENDLESS, str(tiny_bundle), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.013 * number)
            process.send_signal(signal.SIGKILL)
        folder, store = PrefixFolder(path), PrefixStore(model, PLENTY)
        loaded = folder.load(store)
        assert loaded.states >= 1
        assert loaded.dropped == ()
        assert not [left for left in files(folder) if left.name.startswith(".")]
        for sequence, text in zip(store.sequences(), keys(store), strict=True):
            assert_like_fresh(model, sequence.fork(), text)
        folder.close()


def test_a_directory_with_a_state_s_name_is_left_alone(tight: BltModel, folder: PrefixFolder) -> None:
    (folder.path / f"{'a' * 64}.state" / "mine").mkdir(parents=True)
    folder.save(filled(tight, b"abc"))
    assert folder.load(PrefixStore(tight, PLENTY)) == Loaded(1)
    assert len(files(folder)) == 2


def test_a_state_that_cannot_be_saved_costs_no_other(tight: BltModel, folder: PrefixFolder) -> None:
    store = filled(tight, b"one", b"two", b"six")
    store.sequences()[1].state.caches["encoder"].buffer[...] = np.nan
    for _ in range(2):
        with pytest.raises(StateError, match="encoder: some values are no finite numbers"):
            folder.save(store)
    again = PrefixStore(tight, PLENTY)
    assert folder.load(again) == Loaded(2)
    assert keys(again) == [b"one", b"six"]


def test_nothing_is_written_that_there_is_no_room_for(
    tight: BltModel, folder: PrefixFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same file would be written and removed again each time."""
    store, written = filled(tight), list[str]()
    folder.save(store)
    size = sum(path.stat().st_size for path in files(folder))
    for path in files(folder):
        path.unlink()
    store.memory = size - 3000
    write = state_file._write
    monkeypatch.setattr(
        state_file, "_write", lambda path, *more: (written.append(path.name), write(path, *more))
    )
    for _ in range(3):
        folder.save(store)
        assert len(written) == len(set(written)) == len(files(folder)) == 3


def test_what_the_store_drops_while_it_is_written_is_gone(
    tight: BltModel, folder: PrefixFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tight)
    write, alive = state_file._write, [weakref.ref(sequence) for sequence in store.sequences()]

    def dropping(*given: Any) -> None:
        store.clear()
        gc.collect()
        assert sum(one() is not None for one in alive) == 1  # the one that is being written
        write(*given)

    monkeypatch.setattr(state_file, "_write", dropping)
    folder.save(store)
    assert len(files(folder)) == 1


@posix
def test_where_others_may_move_the_folder_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(OutputError, match=r"others may put their folders into .*; chmod o-w it"):
        make_folder(tmp_path / "shared")
    (tmp_path / "shared").chmod(0o1777)  # as /tmp is
    assert make_folder(tmp_path / "shared")
