"""Golden files: what is written is what the reference says, and a damaged or stale one is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.golden import GOLDEN_NAME, GOLDEN_TEXT, GoldenError, read_golden, write_golden
from safetensors import safe_open
from safetensors.numpy import save_file
from support.model_store import RandomModels
from support.numpy_blt import load_reference
from support.random_models import RandomModel, base_config
from support.torch_only import transformers_or_skip

CASE = RandomModel("golden", base_config(local_attention_window_len=32), share=0.4, seed=60)
NO_PATCHER = RandomModel("golden_bytes", base_config(patch_in_forward=False), share=None, seed=61)

Change = Callable[[dict[str, Any], dict[str, str]], None]


@pytest.fixture(scope="module")
def folder(random_models: RandomModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its golden file."""
    folder = tmp_path_factory.mktemp("golden") / "checkpoint"
    shutil.copytree(random_models.folder(CASE), folder)
    path = write_golden(folder, greedy_count=12, reference=random_models.reference(CASE))
    assert path == folder / GOLDEN_NAME
    return folder


def test_it_holds_what_the_reference_says(folder: Path) -> None:
    golden, reference = read_golden(folder / GOLDEN_NAME), load_reference(folder)
    np.testing.assert_array_equal(golden.logits, reference.logits(golden.data))
    np.testing.assert_array_equal(golden.entropies, reference.trace(golden.data).entropies)
    assert list(golden.patch_lengths) == reference.patch_lengths(golden.data)
    assert GOLDEN_TEXT.endswith(golden.data)
    assert GOLDEN_TEXT[:64] == golden.prompt
    assert reference.greedy(golden.prompt, 12) == golden.greedy
    assert golden.greedy_count == 12
    assert len(golden.greedy_margins) == 12
    assert golden.greedy_margins.min() > 1e-4
    assert golden.threshold == reference.threshold
    assert golden.name == reference.name
    with open_checkpoint(folder) as checkpoint:
        golden.check_checkpoint(checkpoint.sha256())
    assert (folder / GOLDEN_NAME).stat().st_size < 1_000_000
    assert len(GOLDEN_TEXT) > 4 * 128


def test_without_patcher_there_are_no_entropies(random_models: RandomModels, tmp_path: Path) -> None:
    source, reference = random_models.folder(NO_PATCHER), random_models.reference(NO_PATCHER)
    path = write_golden(source, tmp_path / "other.safetensors", greedy_count=4, reference=reference)
    golden = read_golden(path)
    assert golden.entropies is None
    assert golden.threshold is None
    assert set(golden.patch_lengths) == {1}
    assert not (source / GOLDEN_NAME).exists()


def test_transformers_is_asked_by_itself(folder: Path, tmp_path: Path) -> None:
    transformers = transformers_or_skip()
    golden = read_golden(write_golden(folder, tmp_path / "other.safetensors", greedy_count=1))
    assert golden.name == f"transformers {transformers.__version__}"


def test_short_positions_cut_the_text(random_models: RandomModels, tmp_path: Path) -> None:
    shutil.copytree(random_models.folder(CASE), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder_config"]["max_position_embeddings"] = 41
    (tmp_path / "config.json").write_text(json.dumps(config))
    golden = read_golden(write_golden(tmp_path, greedy_count=10, reference=load_reference(tmp_path)))
    assert len(golden.data) <= 40
    assert len(golden.prompt) == 30
    assert len(golden.greedy) == 10


@pytest.mark.parametrize("what", ["config", "weights"])
def test_another_checkpoint_is_refused(folder: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    golden = read_golden(tmp_path / GOLDEN_NAME)
    if what == "config":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "patching_threshold": 0.5}))
    else:
        weights = bytearray((tmp_path / "model.safetensors").read_bytes())
        weights[-3] ^= 1
        (tmp_path / "model.safetensors").write_bytes(weights)
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(GoldenError, match=r"another checkpoint .* write it again with"),
    ):
        golden.check_checkpoint(checkpoint.sha256())


def test_a_failed_write_leaves_the_old_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_golden(folder, path, greedy_count=1, reference=load_reference(folder))
    assert [entry.name for entry in tmp_path.iterdir()] == ["golden.safetensors"]
    assert path.read_bytes() == b"old"


def rewritten(folder: Path, path: Path, change: Change) -> Path:
    with safe_open(folder / GOLDEN_NAME, "numpy") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata)
    return path


def put(name: str, value: Any) -> Change:
    return lambda tensors, metadata: tensors.update({name: value(tensors[name])})


def drop(name: str) -> Change:
    return lambda tensors, metadata: tensors.pop(name)


def say(name: str, value: str) -> Change:
    return lambda tensors, metadata: metadata.update({name: value})


FAULTS: dict[str, tuple[Change, str]] = {
    "other format": (say("format", "blt-edge golden 2"), "format is 'blt-edge golden 2'"),
    "no format": (lambda tensors, metadata: metadata.pop("format"), "metadata format is None"),
    "bad hash": (say("checkpoint_sha256", "xyz"), "metadata checkpoint_sha256"),
    "escape codes": (say("reference", "transformers \x1b[2J"), "metadata reference"),
    "threshold words": (say("threshold", "nan"), "metadata threshold"),
    "threshold dots": (say("threshold", ".1.3"), "metadata threshold"),
    "huge count": (say("greedy_count", "9" * 4000), "metadata greedy_count"),
    "no logits": (drop("logits"), "tensor logits is missing"),
    "extra tensor": (lambda tensors, metadata: tensors.update(x=np.zeros(3)), "other tensors"),
    "float64 logits": (put("logits", lambda old: old.astype(np.float64)), "logits is float64"),
    "flat logits": (put("logits", np.ravel), "with 1 axes"),
    "nan logits": (put("logits", lambda old: np.where(old > 3, np.nan, old)), "not finite"),
    "infinite entropies": (put("entropies", lambda old: old * np.float32(np.inf)), "not finite"),
    "fewer logits": (put("logits", lambda old: old[:-1]), "logits have shape"),
    "fewer entropies": (put("entropies", lambda old: old[:-1]), "entropies have shape"),
    "no ids": (put("ids", lambda old: old[:0]), "not BOS and bytes"),
    "no BOS": (put("ids", lambda old: old[1:]), "not BOS and bytes"),
    "special id": (put("ids", lambda old: np.where(old == old[9], 3, old)), "not BOS and bytes"),
    "large id": (put("ids", lambda old: np.where(old == old[9], 260, old)), "not BOS and bytes"),
    "no starts": (put("patch_starts", lambda old: old[:0]), "patch starts do not rise"),
    "late first start": (put("patch_starts", lambda old: old[1:]), "patch starts do not rise"),
    "falling starts": (put("patch_starts", lambda old: old[[0, 2, 1]]), "patch starts do not rise"),
    "start behind": (put("patch_starts", lambda old: np.append(old, 9999)), "patch starts do not rise"),
    "more greedy": (put("greedy", lambda old: np.tile(old, 9)), "greedy bytes of 12"),
    "fewer margins": (put("greedy_margins", lambda old: old[:-1]), "11 margins"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(folder: Path, tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    path = rewritten(folder, tmp_path / "golden.safetensors", change)
    with pytest.raises(GoldenError, match=message) as error:
        read_golden(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    whole, path = (folder / GOLDEN_NAME).read_bytes(), tmp_path / "golden.safetensors"
    for damaged in (b"", b"\0" * 7, whole[:100], whole[:-1], whole + b"x", b"\xff" * 16 + whole[16:]):
        path.write_bytes(damaged)
        with pytest.raises(GoldenError, match=r"can't be read|; is it cut short\?|not safetensors"):
            read_golden(path)
    path.unlink()
    with pytest.raises(GoldenError, match="no such file"):
        read_golden(path)
    with pytest.raises(GoldenError, match="no such file"):
        read_golden(tmp_path)
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(GoldenError, match="a golden file is smaller"):
        read_golden(path)


def test_a_models_weights_are_no_golden_file(folder: Path) -> None:
    with pytest.raises(GoldenError, match="is it a model"):
        read_golden(folder / "model.safetensors")


def test_reading_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from blt_edge.export.golden import read_golden; read_golden(sys.argv[1])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder / GOLDEN_NAME)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
