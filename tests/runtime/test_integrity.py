import hashlib
import os
from pathlib import Path

import pytest
from blt_edge.runtime import integrity
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.integrity import check_files, file_record
from blt_edge.runtime.manifest import Manifest


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 4096, 64 * 4096, 5_000_000])
def test_a_record_has_size_and_both_hashes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    record = file_record(written(tmp_path / "x", data))
    assert (record.bytes, record.sha256) == (size, digest(data))
    if size <= 64 * 4096:
        assert record.sample_sha256 == record.sha256


@pytest.mark.parametrize("size", [64 * 4096 + 1, 1_000_003])
def test_a_sample_is_64_even_blocks_with_both_ends(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    starts = [i * (size - 4096) // 63 for i in range(64)]
    assert (starts[0], starts[-1] + 4096) == (0, size)
    expected = digest(b"".join(data[start : start + 4096] for start in starts))
    assert file_record(written(tmp_path / "x", data)).sample_sha256 == expected


def test_progress_is_reported(tmp_path: Path) -> None:
    size = 9 << 20
    calls: list[tuple[int, int]] = []
    file_record(written(tmp_path / "x", bytes(size)), lambda done, total: calls.append((done, total)))
    assert len(calls) >= 2
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)


class TestCheckFiles:
    @pytest.mark.parametrize("full", [False, True])
    def test_a_whole_bundle_passes(self, bundle: Path, manifest: Manifest, full: bool) -> None:
        check_files(bundle, manifest, full=full)
        check_files(str(bundle), manifest, full=full)

    def test_progress_covers_what_is_hashed(self, bundle: Path, manifest: Manifest) -> None:
        calls: list[tuple[int, int]] = []
        check_files(bundle, manifest, full=True, progress=lambda done, total: calls.append((done, total)))
        total = sum(record.bytes for record in manifest.files.values())
        assert calls[-1] == (total, total)

    def test_large_files_are_sampled_unless_full(
        self, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        large = written(bundle / "tables.bin", os.urandom(2_000_000))
        manifest = manifest.with_files({**manifest.files, "tables.bin": file_record(large)})
        monkeypatch.setattr(integrity, "FULL_HASH_LIMIT", 1_000_000)
        check_files(bundle, manifest)

        data = bytearray(large.read_bytes())
        between = 5000  # past the first block, before the second
        data[between] ^= 1
        large.write_bytes(data)
        check_files(bundle, manifest)
        with pytest.raises(BundleError, match=r"tables\.bin was changed"):
            check_files(bundle, manifest, full=True)

        data[between] ^= 1
        data[-1] ^= 1
        large.write_bytes(data)
        with pytest.raises(BundleError, match=r"tables\.bin was changed"):
            check_files(bundle, manifest)

    def test_sizes_are_compared_before_anything_is_hashed(self, bundle: Path, manifest: Manifest) -> None:
        (bundle / "tables.bin").unlink()
        calls: list[tuple[int, int]] = []
        with pytest.raises(BundleError, match=r"tables\.bin is missing"):
            check_files(bundle, manifest, progress=lambda done, total: calls.append((done, total)))
        assert not calls

    def test_files_beside_the_listed_ones_are_left_alone(self, bundle: Path, manifest: Manifest) -> None:
        (bundle / "engines").mkdir()
        (bundle / "engines" / "x.plan").write_bytes(b"x")
        (bundle / "NOTES.txt").write_text("mine")
        check_files(bundle, manifest, full=True)
