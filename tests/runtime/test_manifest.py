import copy
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.hashing import HashSpec
from blt_edge.runtime.manifest import (
    Manifest,
    Source,
    load_manifest,
    write_manifest,
)
from blt_edge.runtime.patching import PatchingRule
from blt_edge.runtime.quantization_spec import CalibrationSpec, MixSpec, QuantizationSpec
from support.bundles import SPEC, describe, seal, write_bundle
from support.processors import elsewhere


@pytest.fixture
def payload(bundle: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    del loaded["checksum"]
    return loaded


def put(payload: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one field set; the path's parts are parted by "/" where names have dots in them."""
    changed = copy.deepcopy(payload)
    *parents, last = path.split("/" if "/" in path else ".")
    place = changed
    for key in parents:
        place = place[key]
    place[last] = value
    return changed


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "bundle")
    manifest = load_manifest(str(tmp_path / "bundle"))
    assert manifest == written == Manifest.from_dict(written.to_dict())
    assert list(manifest.stages) == ["patcher", "encoder", "latent", "decoder"]


def test_json_is_as_documented(payload: dict[str, Any]) -> None:
    assert payload["schema"] == 1
    assert payload["blt_edge"] == "0.1.0"
    assert payload["embedding"] == {
        "file": "tables.bin",
        "dtype": "float16",
        "width": 8,
        "byte_rows": 260,
        "group_sizes": [3, 4],
        "functions": 2,
        "hash_vocab": 11,
    }
    assert payload["stages"]["latent"]["patch_values"] == 96
    assert "patch_values" not in payload["stages"]["encoder"]
    assert "quantization" not in payload
    assert payload["patching"]["threshold"] == 1.335442066192627
    assert set(payload["files"]["tables.bin"]) == {"bytes", "sha256", "sample_sha256"}


def test_checksum_is_sha256_of_canonical_json(bundle: Path, payload: dict[str, Any]) -> None:
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
    stored = json.loads((bundle / "manifest.json").read_text())["checksum"]
    assert stored == hashlib.sha256(canonical).hexdigest()


def test_embedding_spec_derives_hash_rows_and_size() -> None:
    assert SPEC.hash == HashSpec((3, 4), 2, 11)
    assert SPEC.rows == 260 + 4 * 11
    assert SPEC.bytes == SPEC.rows * 8 * 2


CALIBRATION = CalibrationSpec("mse", ("bundled:english.txt", "mine.txt"), 96, 511, 3, 0.5)

# What types alone do not tell; wrong types are tried on every field in test_bundle_attacks.
FAULTS = [
    ("schema", 0, "a whole number from 1 to 1"),
    ("schema", 10**30, "a whole number from 1 to 1"),
    ("source.name", "a\x1b[2J", "printable text"),
    ("source.name", "\ud800", "printable text"),
    ("source.layout", "gguf", "one of huggingface, meta"),
    ("source.sha256", "AB" * 32, "a sha256"),
    ("source.sha256", "ab" * 31, "a sha256"),
    ("model.vocab_size", 261, "a whole number from 260 to 260"),
    ("model.width", 8.0, "a whole number from 1"),
    ("model.width", 16, "for tables of this shape|the model's width"),
    ("model.cross_attn_k", 0, "a whole number from 1"),
    ("model.max_positions", 513, "at most the stages' 512"),
    ("model.parameters.patcher", -1, "a whole number from 0"),
    ("model.parameters.glue", 1, "a field 'glue'"),
    ("patching.mode", "fixed", "one of entropy, space, static, byte"),
    ("patching.mode", "static", "patch_size"),
    ("patching.threshold", None, "threshold"),
    ("patching.threshold", 10**400, "a finite number above"),
    ("patching.max_patch_length", 0, "a whole number from 1"),
    ("embedding.file", "../tables.bin", "a plain file name"),
    ("embedding.file", "missing.bin", "a file of the list under files"),
    ("embedding.dtype", "bfloat16", "one of float16, float32"),
    ("embedding.dtype", "float32", "for tables of this shape"),
    ("embedding.width", 4, "the model's width 8"),
    ("embedding.group_sizes", [3] * 101, "a list of at most"),
    ("embedding.group_sizes", [3, 0], "whole numbers from 1"),
    ("embedding.group_sizes", [3, 4, 5], "for tables of this shape"),
    ("embedding.functions", -1, "a whole number from 0"),
    ("embedding.hash_vocab", 12, "for tables of this shape"),
    ("stages.extra", {}, "one of patcher, encoder, latent, decoder"),
    ("stages.decoder.file", "decoder.gguf", "a file of the list under files"),
    ("stages.decoder.data", "a\\b", "a plain file name"),
    ("stages.decoder.precision", "fp8", "one of fp32, fp16, int8, int8w, int4"),
    ("stages.decoder.layers", -1, "a whole number from 1 to 1000"),
    ("stages.decoder.window", 0, "a whole number from 1"),
    ("stages.latent.window", 16, "null"),
    ("stages.decoder.max_positions", 2**31, "a whole number from 1"),
    ("stages.decoder.parameters", 2**63, "a whole number from 0"),
    ("stages.decoder.patch_values", None, "latent and decoder only"),
    ("stages.decoder.patch_values", 97, "the same value as in the latent stage"),
    ("stages.encoder.patch_values", 96, "latent and decoder only"),
    ("stages.decoder.unknown", 1, "a field 'unknown'"),
    ("axes.Batch!", {"min": 1, "opt": 1, "max": 1}, "an axis name"),
    ("axes.batch.min", -1, "a whole number from 0"),
    ("axes.batch.opt", 0, "a whole number from 1"),
    ("axes.batch.max", 0, "a whole number from 1"),
    ("quantization.search", "best", "one of mse, rtn"),
    ("quantization.block_size", 0, "a whole number from 1"),
    ("quantization.block_sizes", {"latent": [0]}, "from 1"),
    ("quantization.block_sizes", {"middle": [32]}, "'middle'"),
    ("quantization.calibration.texts", ["mine.txt", 5], "printable text"),
    ("quantization.calibration.windows", 0, "a whole number from 1"),
    ("quantization.calibration.seed", -1, "a whole number from 0"),
    ("quantization.more", 1, "a field 'more'"),
    ("chat", 5, "an object is needed"),
    ("chat", {}, "chat.eos is missing"),
    ("chat", {"eos": 5}, "printable text of 1 to 100"),
    ("chat", {"eos": "\x1b[2J"}, "printable text"),
    ("chat", {"eos": "x" * 101}, "printable text"),
    ("chat", {"eos": None, "more": 1}, "a field 'more'"),
    ("chat", {"eos": None}, "chat: got 'chat_template.jinja', a file of the list under files"),
    ("files/..", {}, "a plain file name"),
    ("files/manifest.json", {}, "a plain file name"),
    ("files/tables.bin/bytes", 1, "for tables of this shape"),
    ("files/decoder.onnx/bytes", -1, "a whole number from 0"),
    ("unknown", 1, "a field 'unknown'"),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), FAULTS, ids=[f"{path}={value!r:.20}" for path, value, _ in FAULTS]
)
def test_fault_is_named(bundle: Path, path: str, value: object, said: str) -> None:
    quantized = dataclasses.replace(
        load_manifest(bundle), quantization=QuantizationSpec("mse", 32, CALIBRATION)
    )
    with pytest.raises(BundleError, match=said) as caught:
        Manifest.from_dict(put(quantized.to_dict(), path, value))
    message = str(caught.value)
    assert message.startswith("manifest.json: ")
    assert message.isprintable()
    assert len(message) < 300


def test_message_says_got_allowed_and_what_to_do(payload: dict[str, Any]) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_dict(put(payload, "stages.decoder.layers", -1))
    assert str(caught.value) == (
        "manifest.json: stages.decoder.layers: got -1, a whole number from 1 to 1000 is needed; "
        "export the checkpoint again"
    )


def every_path(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict) and key != "config":
            yield from every_path(value, (*path, key))


def test_every_field_is_needed(payload: dict[str, Any]) -> None:
    for path in every_path(payload):
        changed = copy.deepcopy(payload)
        place = changed
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        if path[:2] == ("model", "parameters") and len(path) == 3:
            Manifest.from_dict(changed)
            continue
        with pytest.raises(BundleError, match=r"manifest\.json: "):
            Manifest.from_dict(changed)


def test_no_patcher_needed_without_entropy(payload: dict[str, Any]) -> None:
    patching = dict.fromkeys(payload["patching"]) | {"mode": "static", "patch_size": 4, "monotonic": False}
    changed = put(payload, "patching", patching)
    del changed["stages"]["patcher"]
    manifest = Manifest.from_dict(changed)
    assert manifest.patching == PatchingRule("static", patch_size=4)
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_newer_schema_says_upgrade(bundle: Path, payload: dict[str, Any]) -> None:
    # A newer version's own fields and checksum must not hide the reason.
    newer = {**payload, "schema": 2, "blt_edge": "0.9.1", "novelty": {}}
    (bundle / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(BundleError, match=r"schema 2 \(written by blt-edge '0\.9\.1'\) .* upgrade blt-edge"):
        load_manifest(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere does not exist; give the directory"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no manifest\.json; give the directory"):
        load_manifest(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"file is not a directory"):
        load_manifest(tmp_path / "file")


def test_validation_is_recorded_and_nothing_else_changes(bundle: Path) -> None:
    before = load_manifest(bundle)
    report = {
        "passed": False,
        "logits": {"max": np.float32(0.5), "cosine": math.nan},
        "rows": (1, np.int64(2)),
    }
    write_manifest(bundle, before.with_validation(dataclasses.replace(elsewhere("a family"), report=report)))
    after = load_manifest(bundle)
    (record,) = after.validation
    assert record.report == {"passed": False, "logits": {"max": 0.5, "cosine": "nan"}, "rows": [1, 2]}
    assert record.kernels == "a family"
    assert dataclasses.replace(after, validation=()) == before
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*before.files, "manifest.json"])


def test_failed_write_leaves_the_old_manifest(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_manifest(bundle)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(bundle, before.with_validation(elsewhere()))
    assert load_manifest(bundle) == before
    assert len(list(bundle.iterdir())) == len(before.files) + 1


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a file of the list under files"):
        write_manifest(tmp_path, describe())
    assert not list(tmp_path.iterdir())


def test_odd_names_and_configs_survive(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    odd = Source("a\nb\x1b[31m\udcff", "meta", "0" * 64, {"x": math.inf, "y": "\x00é\ud800", "z": {}})
    write_manifest(bundle, Manifest(**{**vars(manifest), "source": odd}))
    source = load_manifest(bundle).source
    assert source.name == "a?b?[31m?"
    assert source.config == {"x": "inf", "y": "\x00é\ud800", "z": {}}


def test_seal_makes_what_write_makes(bundle: Path, payload: dict[str, Any]) -> None:
    before = (bundle / "manifest.json").read_bytes()
    seal(bundle, payload)
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec("rtn", 64, None),
        QuantizationSpec("mse", 32, CALIBRATION),
        QuantizationSpec("mse", None, CALIBRATION),
        QuantizationSpec("mse", 128, None, {"encoder": (32,), "latent": (64, 128)}),
        QuantizationSpec("mse", 32, CalibrationSpec("minmax", (), 1, 1, 0)),
    ],
)
def test_quantization_is_read_back(bundle: Path, spec: QuantizationSpec) -> None:
    manifest = dataclasses.replace(load_manifest(bundle), quantization=spec)
    write_manifest(bundle, manifest)
    assert load_manifest(bundle) == manifest


MIX = MixSpec(("a", "b"), ("c",), 0.99, 0.9913, ("bundled:english.txt",), 96, 511, 0)


def with_mix(bundle: Path, mix: MixSpec, precision: str = "int4") -> Manifest:
    manifest = load_manifest(bundle)
    patcher = dataclasses.replace(manifest.stages["patcher"], precision=precision)
    return dataclasses.replace(
        manifest,
        stages={**manifest.stages, "patcher": patcher},
        quantization=QuantizationSpec("mse", 32, None, mix=mix),
    )


def test_a_mix_is_read_back_and_told(bundle: Path) -> None:
    manifest = with_mix(bundle, MIX)
    write_manifest(bundle, manifest)
    assert load_manifest(bundle) == manifest
    assert [manifest.precisions_of(stage) for stage in ("patcher", "encoder")] == [
        ("int4", "int8w"),
        (manifest.stages["encoder"].precision,),
    ]


@pytest.mark.parametrize(
    ("changes", "precision", "said"),
    [
        ({}, "int8w", "a patcher in int4 for it"),
        ({"int4": ()}, "int4", "a patcher in int8w for it"),
        ({"target": 1.01}, "int4", "a number from 0 to 1"),
        ({"boundaries": -0.1}, "int4", "a number from 0 to 1"),
    ],
)
def test_a_mix_that_can_not_be_is_refused(
    bundle: Path, changes: dict[str, Any], precision: str, said: str
) -> None:
    with pytest.raises(BundleError, match=f"quantization.mix.*{said}"):
        write_manifest(bundle, with_mix(bundle, dataclasses.replace(MIX, **changes), precision))


@pytest.mark.parametrize(("names", "precision"), [("int4", "int8w"), ("int8w", "int4")])
def test_a_search_may_end_with_one_kind(bundle: Path, names: str, precision: str) -> None:
    manifest = with_mix(bundle, dataclasses.replace(MIX, **{names: ()}), precision)
    write_manifest(bundle, manifest)
    assert load_manifest(bundle).precisions_of("patcher") == (precision,)
