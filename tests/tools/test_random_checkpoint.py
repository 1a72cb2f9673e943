"""Random checkpoints load in transformers, have plausible numbers, and are written in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export.checkpoint import open_checkpoint
from blt_edge.export.checkpoint_base import check_tensors
from blt_edge.graphs.config import ConfigError, parse_config
from blt_edge.runtime.files import WriteError
from blt_edge.tools.models import random_checkpoint
from blt_edge.tools.models.numpy_patcher import patcher_entropies
from blt_edge.tools.models.random_checkpoint import SHAPES, main, scaled_config, write_random_checkpoint
from support.numpy_blt import load_reference

ALICE = (Path(__file__).parents[1] / "data" / "alice.txt").read_bytes()


@pytest.mark.parametrize(
    ("shape", "dtype", "scales"),
    [
        ("tiny", "float16", {}),
        ("blt-1b", "bfloat16", {"layers_scale": 0.1, "width_scale": 0.125, "hash_vocab": 101}),
        ("blt-7b", "float32", {"layers_scale": 0.05, "width_scale": 0.1, "hash_vocab": 101}),
    ],
)
def test_the_reference_runs_it(shape: str, dtype: str, scales: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / shape
    write_random_checkpoint(folder, scaled_config(shape, **scales), dtype=dtype, shard_bytes=3_000_000)
    with open_checkpoint(folder) as checkpoint:
        config = parse_config(checkpoint.config)
        check_tensors(checkpoint, config)
        assert {checkpoint.dtype(name) for name in checkpoint.names()} == {dtype}
        text = ALICE[1000:1400]
        assert config.patcher is not None
        entropies = patcher_entropies(checkpoint, config.patcher, text)
    assert config.token_projection == (shape == "blt-7b")
    reference = load_reference(folder).trace(text)
    np.testing.assert_allclose(entropies, reference.entropies, atol=1e-4)
    assert 2.5 < len(text) / len(reference.patch_lengths) < 7
    assert np.isfinite(reference.logits).all()
    assert 1 < reference.logits.std() < 10


def test_numpy_patcher_with_gqa_and_a_short_window(tmp_path: Path) -> None:
    config = scaled_config("tiny", hash_vocab=11)
    config["patcher_config"].update(num_key_value_heads=2, sliding_window=7, rms_norm_eps=1e-2)
    write_random_checkpoint(tmp_path / "m", config)
    text = ALICE[2000:2100]
    with open_checkpoint(tmp_path / "m") as checkpoint:
        patcher = parse_config(checkpoint.config).patcher
        assert patcher is not None
        entropies = patcher_entropies(checkpoint, patcher, text)
    np.testing.assert_allclose(entropies, load_reference(tmp_path / "m").trace(text).entropies, atol=1e-4)


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    config = scaled_config("tiny", hash_vocab=53)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_checkpoint(tmp_path / name, config, seed=seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "abc"]
    assert configs[0] == configs[1]
    assert configs[0]["patching_threshold"] != config["patching_threshold"]


def test_scales_of_the_weights(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "m", scaled_config("tiny"), choose_threshold=False)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            if tensor.ndim == 1:
                assert (tensor == 1).all()
            elif name == "model.patcher.embed_tokens.weight":
                assert tensor.std() == pytest.approx(4, rel=0.1)
            else:
                deviation = tensor.std() * tensor.shape[1] ** 0.5
                assert deviation == pytest.approx(3 if "lm_head" in name else 1, rel=0.1)
        first = checkpoint.tensor("model.local_decoder.layers.0.self_attn.q_proj.weight")
        second = checkpoint.tensor("model.local_decoder.layers.1.self_attn.q_proj.weight")
        assert not np.array_equal(first, second)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.01, 0.01), (0.3, 0.5), (2.0, 1.5)])
def test_shapes_are_sound_at_any_scale(shape: str, scales: tuple[float, float]) -> None:
    config = parse_config(scaled_config(shape, layers_scale=scales[0], width_scale=scales[1]))
    assert config.encoder.width == config.decoder.width


@pytest.mark.parametrize(("shape", "scale", "reason"), [("blt-9b", 1, "shape"), ("tiny", 0, "scales")])
def test_refused_shapes(shape: str, scale: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        scaled_config(shape, layers_scale=scale)


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = scaled_config("tiny", hash_vocab=53)
    folder = tmp_path / "m"

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(random_checkpoint, "patcher_entropies", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_random_checkpoint(folder, config)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 1000})
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(WriteError, match="free"):
            write_random_checkpoint(folder, config)
    with pytest.raises(ConfigError):
        write_random_checkpoint(folder, {**config, "cross_attn_k": 3})
    with pytest.raises(ValueError, match="dtype"):
        write_random_checkpoint(folder, config, dtype="int8")
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        write_random_checkpoint(folder, config)
    assert (folder / "mine").read_text() == "x"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "tiny", "-o", str(tmp_path / "m"), "--hash-vocab", "53", "--shard-size", "200KB"]
    assert main(arguments) == 0
    assert "GB in" in capsys.readouterr().out
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    assert main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["--shape", "tiny", "-o", str(tmp_path / "n"), "--layers-scale", "-1"]) == 2
    for bad in ("0", "x", "-1GB", "1e9"):
        with pytest.raises(SystemExit) as caught:
            main(["--shape", "tiny", "-o", str(tmp_path / "n"), "--shard-size", bad])
        assert caught.value.code == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_runs_as_a_command_and_in_little_memory(tmp_path: Path) -> None:
    """170 MB of weights and a table of 120 MB: the peak does not follow them, nor is torch imported."""
    code = (
        "import re, sys\n"
        "from blt_edge.tools.models.random_checkpoint import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    )
    options = "--shape blt-1b --layers-scale 0.01 --width-scale 0.5 --hash-vocab 20000 --shard-size 50MB"
    command = [sys.executable, "-c", code, *options.split(), "-o", str(tmp_path / "m")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 400_000
