"""Packed files against what was packed, and files that are not what their names say."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from blt_edge.runtime.errors import BltError
from blt_edge.tools.corpus.compressed import DamagedError, compression, open_file, uncompressed_name

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
with suppress(ModuleNotFoundError):  # what follows is then about the others
    PACKERS[".zst"] = import_module("zstandard").compress
PACKED = [ending for ending in PACKERS if ending]
DATA = b"".join(b"%d bottles, " % number for number in range(20_000)) + os.urandom(99_999)


def everything(path: Path, piece: int = 5000) -> tuple[bytes, int]:
    parts = []
    with open_file(path) as (stream, place):
        while part := stream.read(piece):
            assert len(part) <= piece
            parts.append(part)
        return b"".join(parts), place()


@pytest.mark.parametrize("ending", PACKERS)
def test_what_was_packed_comes_out(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKERS[ending](DATA))
    assert everything(path) == (DATA, path.stat().st_size)
    assert (compression(path), uncompressed_name(path)) == (ending, "a.txt")


@pytest.mark.parametrize("ending", PACKED)
def test_files_that_were_joined_are_one(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    one, other = PACKERS[ending](DATA), PACKERS[ending](b"the end")
    path.write_bytes(one + other + PACKERS[ending](b"") + bytes(8))
    assert everything(path)[0] == DATA + b"the end"


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("change", ["cut at the end", "cut", "other", "more behind it"])
def test_damage_is_told(tmp_path: Path, ending: str, change: str) -> None:
    packed = PACKERS[ending](DATA)
    changed = {
        "cut at the end": packed[:-1],
        "cut": packed[: len(packed) // 2],
        "other": b"plain text" * 9,
        "more behind it": packed + b"junk",
    }[change]
    path = tmp_path / f"a{ending}"
    path.write_bytes(changed)
    with pytest.raises(DamagedError, match=f"damaged {ending} data: "):
        everything(path)


def test_an_xz_file_that_wants_gigabytes_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    path = tmp_path / "a.xz"
    path.write_bytes(lzma.compress(b"small", filters=filters))
    with pytest.raises(DamagedError, match=r"[Mm]emory"):
        everything(path)


def test_a_file_that_is_missing_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_file(tmp_path / "a.gz"):
        pass


def test_zst_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("blt_edge.tools.corpus.compressed.import_module", missing)
    with pytest.raises(BltError, match=r"a\.zst needs the package zstandard.*\[corpus\]"):
        everything(tmp_path / "a.zst")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the memory that Linux tells of")
@pytest.mark.parametrize("ending", PACKED)
def test_a_bomb_takes_no_memory(tmp_path: Path, ending: str) -> None:
    """64 MB of zeros, read by another process, whose memory is its own."""
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACKERS[ending](bytes(1 << 26)))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from blt_edge.tools.corpus.compressed import open_file\n"
        "with open_file(Path(sys.argv[1])) as (stream, _):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    stream.read(1 << 20)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(told) < 20_000
