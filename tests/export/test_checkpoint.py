"""Opening checkpoints, and reading their tensors, against the safetensors package and numpy's types."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from blt_edge.export.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from blt_edge.export.checkpoint_base import StoredTensor, read_json
from blt_edge.export.huggingface import SafetensorsFile
from blt_edge.tools.models.random_checkpoint import scaled_config, write_random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

CONFIG = scaled_config("tiny", hash_vocab=53)
EMBEDDING = "model.local_encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "little"
    write_random_checkpoint(folder, CONFIG, choose_threshold=False)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "little"
    write_random_checkpoint(folder, CONFIG, choose_threshold=False, shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def copied(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_are_those_that_were_saved(dtype: str, tmp_path: Path) -> None:
    element = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.random.default_rng(0).normal(size=(7, 5)) * [1e-7, 1e-3, 1.0, 60.0, 1e4]
    arrays = {"a": values, "scalar": np.array(1.5), "vector": np.arange(9.0), "none": np.ones((0, 3))}
    tensors = {name: array.astype(element) for name, array in arrays.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    stored = {name: [StoredTensor(file, name)] for name in file.names()}
    with Checkpoint("x", "huggingface", {}, stored) as checkpoint:
        assert set(checkpoint.names()) == tensors.keys()
        for name, tensor in tensors.items():
            read = checkpoint.tensor(name)
            assert read.dtype == np.float32
            assert read.flags.writeable
            assert checkpoint.dtype(name) == dtype
            assert checkpoint.shape(name) == tuple(tensor.shape)
            np.testing.assert_array_equal(read, tensor.astype(np.float32))
        for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3), (7, 7)):
            expected = tensors["a"][start:stop].astype(np.float32)
            np.testing.assert_array_equal(checkpoint.rows("a", start, stop), expected)
        for start, stop in ((-1, 2), (5, 3), (0, 8)):
            with pytest.raises(ValueError, match="rows"):
                checkpoint.rows("a", start, stop)
        with pytest.raises(CheckpointError, match="absent"):
            checkpoint.tensor("absent")


def test_every_bfloat16_widens_exactly(tmp_path: Path) -> None:
    bits, path = np.arange(1 << 16, dtype="<u2"), tmp_path / "all.safetensors"
    write_raw(path, {"x": entry(0, 1 << 17, (1 << 16,), "BF16")}, bits.tobytes())
    read = SafetensorsFile(path).read("x", 0, 1 << 16)
    np.testing.assert_array_equal(read.view(np.uint32), bits.astype(np.uint32) << 16)


def test_shards_hold_what_one_file_holds(single: Path, sharded: Path) -> None:
    with open_checkpoint(single) as one, open_checkpoint(sharded) as many:
        assert set(one.names()) == set(many.names())
        for name in one.names():
            np.testing.assert_array_equal(one.tensor(name), many.tensor(name))
        assert (one.name, one.layout) == ("little", "huggingface")
        assert one.config == {**CONFIG, "dtype": "bfloat16"}


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    """A table of 64 GB, a hole on disk but for its last row: reading it whole would not end well."""
    rows, width, path = 1 << 24, 1024, tmp_path / "huge.safetensors"
    write_raw(path, {"table": entry(0, rows * width * 4, (rows, width))}, b"")
    last = np.arange(width, dtype="<f4")
    with path.open("r+b") as file:
        file.seek((rows - 1) * width * 4, 2)
        file.write(last.tobytes())
    table = StoredTensor(SafetensorsFile(path), "table")
    with Checkpoint("huge", "huggingface", {}, {"table": [table]}) as checkpoint:
        np.testing.assert_array_equal(checkpoint.rows("table", rows - 1, rows), last[None])
        assert not checkpoint.rows("table", 5, 7).any()
        assert len(checkpoint.sha256()) == 64


def test_hub_cache_links_are_followed(single: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(single, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.tensor(EMBEDDING).shape == (260, 64)


def test_tied_embeddings_are_one_tensor_under_two_names(tmp_path: Path) -> None:
    write_random_checkpoint(
        tmp_path / "tied", {**CONFIG, "tie_word_embeddings": True}, choose_threshold=False
    )
    file = SafetensorsFile(tmp_path / "tied" / "model.safetensors")
    assert EMBEDDING not in file.names()
    file.close()
    with open_checkpoint(tmp_path / "tied") as checkpoint:
        assert EMBEDDING in checkpoint.names()
        np.testing.assert_array_equal(checkpoint.tensor(EMBEDDING), checkpoint.tensor("lm_head.weight"))


def test_fingerprint_tells_checkpoints_apart(single: Path, copied: Path) -> None:
    def fingerprint(folder: Path) -> str:
        with open_checkpoint(folder) as checkpoint:
            return checkpoint.sha256()

    original = fingerprint(single)
    assert fingerprint(copied) == original
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copied) != original
    data[-1] ^= 1
    weights.write_bytes(data)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "patching_threshold": 9.0}))
    assert fingerprint(copied) != original


def refused(source: str | Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "nothing", "no such folder")
    refused("no/such/folder", "no such folder")
    refused("word", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")


@pytest.fixture
def hub() -> Any:
    return pytest.importorskip(
        "huggingface_hub", reason="needs huggingface_hub: pip install 'blt-edge[export]'"
    )


def test_a_hub_id_offline_is_one_line(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(hub_id: str, **options: Any) -> str:
        assert options["allow_patterns"]
        raise hub.errors.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    refused("owner/name", "owner/name", "cache")


def test_a_hub_id_names_the_checkpoint(hub: Any, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda hub_id, **options: str(single))
    with open_checkpoint("owner/name") as checkpoint:
        assert checkpoint.name == "owner/name"


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "0123456789" * 4])
def test_a_hub_id_may_have_a_revision(
    hub: Any, single: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    def fetch(hub_id: str, **options: Any) -> str:
        assert (hub_id, options["revision"]) == ("owner/name", revision)
        return str(single)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with open_checkpoint(f"owner/name@{revision}") as checkpoint:
        assert checkpoint.name == f"owner/name@{revision}"
    for wrong in ("owner/name@", "owner/name@/x", "owner/name@a b", "owner/name@a@b", "owner@x/name"):
        refused(wrong, "no such folder")


def test_a_revision_that_is_not_there(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRevision(hub.errors.RevisionNotFoundError):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def fetch(hub_id: str, **options: Any) -> str:
        raise NoRevision

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    refused("owner/name@nine", "owner/name@nine", "no such branch, tag or commit")


def test_a_snapshot_is_called_by_its_hub_id(single: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(single, snapshot)
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.name == "owner/name"


def test_damaged_folders(copied: Path) -> None:
    config, weights = copied / "config.json", copied / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    for broken in (text[:100], "[1]", "", "\xff", "[" * 100_000, '{"a":' * 600 + "1" + "}" * 600):
        config.write_text(broken)
        refused(copied, "config.json")
    config.write_text(json.dumps({"model_type": "llama"}))
    refused(copied, "config.json", "llama", "blt")
    config.write_text("{}")
    refused(copied, "config.json", "model_type")
    config.write_text(text)
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        refused(copied, "model.safetensors")
    weights.write_bytes(data + b"x")
    refused(copied, "model.safetensors")
    other = weights.rename(copied / "other.safetensors")
    refused(copied, "can't be put together")
    other.unlink()
    refused(copied, "no weights")
    (copied / "pytorch_model.bin").write_bytes(b"x")
    refused(copied, "pickles", "save_pretrained")
    config.unlink()
    refused(copied, "config.json")


@pytest.mark.parametrize("name", ["x" * 300, "\U0010ffff", "\ud800", "\x1b[2J", "\u202e", "\0"])
def test_a_shard_whose_name_no_file_has(name: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    index = {"weight_map": {EMBEDDING: f"{name}.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not the plain name") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_damaged_index(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    path = folder / "model.safetensors.index.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    refused(folder, path.name)
    weight_map = json.loads(text)["weight_map"]
    first, gone = weight_map[EMBEDDING], "model-00001-of-00009.safetensors"
    names = (
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "x.bin",
        "",
        3,
        None,
        "C:x.safetensors",
    )
    maps: list[tuple[Any, tuple[str, ...]]] = [
        *(({**weight_map, EMBEDDING: name}, (path.name,)) for name in names),
        *((empty, ("weight_map",)) for empty in ({}, [], None)),
        ({**weight_map, "extra": gone}, (gone, "missing")),
        ({**weight_map, "extra": first}, ("extra",)),
    ]
    for changed, words in maps:
        path.write_text(json.dumps({"weight_map": changed}))
        refused(folder, *words)
    path.write_text(text)
    (folder / first).unlink()
    refused(folder, first, "missing")


def write_raw(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)


def entry(start: int, end: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{" * 10_000,
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}',
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": entry(0, 8, dtype=5)},
        {"a": entry(0, 8, shape=[-2])},
        {"a": entry(0, 8, shape=[2.0])},
        {"a": entry(0, 8, shape=[True, 2])},
        {"a": entry(8, 0)},
        {"a": entry(0, 8, shape=[1 << 62, 1 << 62])},
        {"a": entry(0, 8, shape=[1] * 9)},
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(4, 12)},
        {"a": entry(0, 8), "b": entry(12, 20)},
        {"a": entry(0, 1 << 40, shape=[1 << 38])},
        {"a": entry(0, 4)},
    ],
)
def test_unsound_headers_are_refused(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, b"\0" * 20 if isinstance(header, dict) and "b" in header else b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1000])
def test_header_length_beyond_the_file(length: int, tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry(0, 8)}, b"\0" * 8, length)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_header_is_bounded_before_it_is_parsed(tmp_path: Path) -> None:
    """95 MB of it, which the format allows, took 2.7 GB."""
    path = tmp_path / "x.safetensors"
    write_raw(path, b'{"__metadata__":{' + b",".join(b'"%d":{}' % i for i in range(500_000)) + b"}}", b"")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"header claims .* allowed: 4194304"):
        SafetensorsFile(path)
    with pytest.raises(CheckpointError, match="too large"):
        read_json(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(("dtype", "size"), [("F64", 16), ("I8", 2), ("F8_E4M3", 2), ("BOOL", 2), ("F4", 1)])
def test_other_types_are_refused_by_name_when_used(dtype: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, {"a": entry(0, size, dtype=dtype)}, b"\0" * size)
    file = SafetensorsFile(path)
    with pytest.raises(CheckpointError, match=f"a has type {dtype}"):
        file.dtype("a")
    with pytest.raises(CheckpointError, match=f"a has type {dtype}"):
        file.read("a", 0, 2)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_changed_header_byte_is_refused_or_stays_inside_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    header = json.dumps({"a": entry(0, 8), "b": entry(8, 20, (2, 3), "F16")}).encode()
    raw = bytearray(struct.pack("<Q", len(header)) + header + bytes(20))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 21))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name in file.names():
        shape = file.shape(name)
        try:
            assert file.read(name, 0, shape[0] if shape else 1).shape == shape
        except CheckpointError:
            continue
    file.close()
