"""From a checkpoint folder to text, in both layouts and in the released shape made small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from blt_edge.export import export_checkpoint
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.tools.models.random_checkpoint import scaled_config, write_random_checkpoint
from support.meta_layout import write_meta
from support.model_store import RandomModels
from support.numpy_blt import load_reference
from support.parity_cases import CASES
from support.random_models import PARITY_TEXT


def test_the_released_shape_made_small_equals_transformers(tmp_path: Path) -> None:
    config = scaled_config("blt-1b", layers_scale=0.1, width_scale=0.125, hash_vocab=5003)
    source = tmp_path / "checkpoint"
    write_random_checkpoint(source, config, dtype="bfloat16", shard_bytes=2 << 20)
    assert len(list(source.glob("*.safetensors"))) > 1, "one file shows nothing about shards"
    model = BltModel.load(export_checkpoint(source, tmp_path / "bundle"), threads=1)
    reference = load_reference(source)
    text = PARITY_TEXT[:900]  # past the windows of 512
    wanted, found = reference.logits(text), model.logits(text)
    scale = max(1.0, float(np.abs(wanted).max()))
    assert float(np.abs(found - wanted).max()) <= 1e-4 * scale
    assert model.patch_lengths(text) == reference.patch_lengths(text)
    assert model.manifest.embedding.dtype == "float16"


def test_both_layouts_give_the_same_bundle(random_models: RandomModels, tmp_path: Path) -> None:
    # Meta's local parts have no grouped heads, nor has this case.
    source = random_models.folder(CASES[0])
    write_meta(source, tmp_path / "meta", pickled=False)
    ours = export_checkpoint(source, tmp_path / "huggingface-bundle")
    theirs = export_checkpoint(tmp_path / "meta", tmp_path / "meta-bundle")
    for name in ("patcher", "encoder", "latent", "decoder"):
        data = f"{name}.onnx.data"
        assert (ours / data).read_bytes() == (theirs / data).read_bytes(), data
    assert (ours / "tables.bin").read_bytes() == (theirs / "tables.bin").read_bytes()
    options = GenerationOptions(max_new_bytes=40)
    results = [BltModel.load(path, threads=1).generate(PARITY_TEXT[:200], options) for path in (ours, theirs)]
    assert results[0].data == results[1].data


def test_export_needs_no_torch(random_models: RandomModels, tmp_path: Path) -> None:
    source = random_models.folder(CASES[0])
    script = (
        "import sys; from blt_edge.export import export_checkpoint; "
        f"export_checkpoint({str(source)!r}, {str(tmp_path / 'bundle')!r}); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
