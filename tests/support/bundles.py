"""A bundle of a few kilobytes whose graphs are noise: right for everything that does not run them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from blt_edge.runtime.embedding_spec import EmbeddingSpec
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import Axis, Manifest, ModelSpec, Source, StageSpec, write_manifest
from blt_edge.runtime.patching import PatchingRule

__all__ = ["SPEC", "describe", "fill", "seal", "write_bundle"]

SPEC = EmbeddingSpec("tables.bin", "float16", 8, 260, (3, 4), 2, 11)


def describe() -> Manifest:
    """A valid description, its files not yet recorded."""
    stages = {
        name: StageSpec(f"{name}.onnx", f"{name}.onnx.data", "fp32", 2, 2, 4, 16, 512, 1000)
        for name in ("patcher", "encoder")
    }
    stages["latent"] = StageSpec("latent.onnx", "latent.onnx.data", "fp32", 3, 4, 4, None, 512, 2000, 96)
    stages["decoder"] = StageSpec("decoder.onnx", "decoder.onnx.data", "fp32", 2, 2, 4, 16, 600, 1500, 96)
    return Manifest(
        generator="0.1.0",
        source=Source("small", "huggingface", "ab" * 32, {"model_type": "blt", "eps": 1e-05, "x": None}),
        model=ModelSpec(260, 8, 2, 512, 256, {"patcher": 1000, "tables": SPEC.rows * SPEC.width}),
        patching=PatchingRule("entropy", threshold=1.335442066192627),
        embedding=SPEC,
        stages=stages,
        axes={"batch": Axis(1, 1, 8), "bytes": Axis(1, 1, 256), "patches": Axis(0, 1, 256)},
        files={},
    )


def fill(directory: Path) -> None:
    """Write the files of `describe`, random but the same each time."""
    random = np.random.default_rng(7)
    for name in describe().stages:
        (directory / f"{name}.onnx").write_bytes(random.bytes(300))
        (directory / f"{name}.onnx.data").write_bytes(random.bytes(5000))
    rows = random.standard_normal((SPEC.rows, SPEC.width)).astype("<f2")
    (directory / SPEC.file).write_bytes(rows.tobytes())


def write_bundle(directory: Path) -> Manifest:
    """Make the directory a valid bundle."""
    directory.mkdir()
    fill(directory)
    files = {path.name: file_record(path) for path in sorted(directory.iterdir())}
    manifest = describe().with_files(files)
    write_manifest(directory, manifest)
    return manifest


def seal(directory: Path, payload: dict[str, Any]) -> None:
    """Write a changed manifest with a right checksum, as somebody who knows the format can."""
    payload = {key: value for key, value in payload.items() if key != "checksum"}
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    payload["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (directory / "manifest.json").write_text(json.dumps(payload, indent=1) + "\n")
