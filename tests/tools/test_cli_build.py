"""`blt-edge build`: the engine's path on stdout, and who says that it is used."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from blt_edge.runtime.errors import requirement
from blt_edge.runtime.names import STAGES


def parts(table: str) -> tuple[str, ...]:
    """The stages that a table has rows for."""
    return tuple(line.split()[0] for line in table.splitlines() if " graph  " in line)


@pytest.fixture
def bundle(cli, tiny_model, tmp_path: Path) -> Path:
    """The tiny bundle with two stages in float16."""
    precision = ("--precision", "latent=fp16,decoder=fp16")
    cli("quantize", tiny_model.bundle, "-o", tmp_path / "half", *precision, code=0)
    return tmp_path / "half"


def test_an_engine_is_built_used_and_shown(cli, bundle: Path) -> None:
    generate = ("generate", "-m", bundle, "-p", "Once", "-n", 8, "--json", "-")
    before = cli(*generate)
    assert json.loads(before.stdout)["engine"]["name"] == "portable graphs"
    assert f"blt-edge build {bundle}" in before.stderr
    built = cli("build", bundle, code=0)
    engine = Path(built.stdout.strip())
    assert engine.parent == bundle / "engines"
    assert parts(built.stderr) == STAGES
    after = cli(*generate)
    name = f"engines/{engine.name}"
    assert json.loads(after.stdout)["engine"] == {"name": name, "device": "CPU", "reason": None}
    assert json.loads(after.stdout)["data_base64"] == json.loads(before.stdout)["data_base64"]
    assert after.stderr.endswith(f"engine: {name}\n")
    assert name in cli("inspect", bundle).stdout
    again = cli("build", bundle, "-q", code=0)
    assert (again.stdout, again.stderr) == (built.stdout, "")
    document = json.loads(cli("build", bundle, "-q", "--json", "-").stdout)
    assert (document["form"], document["built_for"]["target"]) == (str(engine), "onnxruntime")
    assert document["files"]["latent.onnx"] == (engine / "latent.onnx").stat().st_size


def test_a_damaged_engine_is_told_of(cli, bundle: Path) -> None:
    engine = Path(cli("build", bundle, "-q").stdout.strip())
    path = engine / "latent.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (engine.parent / "onnxruntime-0123456789abcdef").mkdir()
    shown = cli("inspect", bundle, "--verify", code=0)
    assert "portable graphs: latent.onnx was changed" in shown.stdout
    mended = cli("build", bundle)
    assert Path(mended.stdout.strip()) == engine
    assert "to remove by hand: onnxruntime-0123456789abcdef" in mended.stderr
    assert f"engines/{engine.name}" in cli("inspect", bundle, "--verify").stdout


def test_a_dry_run_writes_nothing(cli, tiny_model) -> None:
    shown = cli("build", tiny_model.bundle, "--dry-run", code=0)
    assert (parts(shown.stdout), shown.stderr) == (STAGES, "")
    assert f"would write {tiny_model.bundle}/engines/onnxruntime-" in shown.stdout
    assert not (tiny_model.bundle / "engines").exists()


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_what_to_install_is_told(refused, tiny_model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {requirement(name)}" in refused("build", tiny_model.bundle, "--target", name, code=1)


def test_the_demos_engines_are_built_and_told_of(cli, tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    bundle = tmp_path / "demo"
    cli("export", "demo", "-o", bundle, "--no-validate", "-q", code=0)
    target = ("--target", "tensorrt-rtx", "--compute-capability", "8.6", "--max-patches", "1000")
    planned = cli("build", bundle, *target, "--dry-run", code=0)
    assert planned.stderr == ""
    assert "1 to 1000, tuned for 512" in planned.stdout
    assert not (bundle / "engines").exists()
    built = cli("build", bundle, *target, code=0)
    engine = Path(built.stdout.strip())
    assert f"would write {engine}: about " in planned.stdout
    plans = {f"{stage}.plan" for stage in STAGES}
    assert {path.name for path in engine.iterdir()} == {"engine.json", "self_test.bin", *plans}
    assert "up to 16384 bytes and 1000 patches" in built.stderr
    # Here is no GPU, or another: they are compared where they are loaded.
    assert "no GPU of compute capability 8.6" in built.stderr
    assert json.loads((engine / "engine.json").read_text())["proven"] is False
    again = cli("build", bundle, *target, code=0)
    assert again.stdout == built.stdout
    assert again.stderr == "they are there already, and sound; --force builds them again\n"
    # Neither target's engines are the other's old ones.
    assert "to remove by hand" not in cli("build", bundle).stderr


def test_what_an_old_tensorrt_refuses_is_told_before(
    cli, bundle: Path, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with a GPU whose TensorRT crashes: the line comes first, and is no refusal."""
    from blt_edge.export import build_tensorrt
    from blt_edge.runtime.backends.tensorrt import TensorRtModule
    from blt_edge.runtime.errors import BackendError

    crash = Mock(side_effect=BackendError("patcher.onnx: TensorRT crashed"))
    monkeypatch.setattr(build_tensorrt, "build_in_child", crash)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.7")

    def warnings(version: str, model: Path, *options: str) -> list[str]:
        loaded = TensorRtModule("tensorrt", version, None)
        monkeypatch.setattr(build_tensorrt, "load_tensorrt", lambda target: loaded)
        code = 0 if options else 1
        result = cli("build", model, "--target", "tensorrt", "-q", *options, code=code)
        lines = result.stderr.splitlines()
        assert options or lines.pop() == "blt-edge: error: patcher.onnx: TensorRT crashed"
        return lines

    blocks = tmp_path / "blocks"
    mix = ("--precision", "encoder=int8w,latent=fp16,decoder=fp16")
    cli("quantize", tiny_model.bundle, "-o", blocks, *mix, code=0)
    for options in ((), ("--dry-run",)):
        (line,) = warnings("10.3.0", blocks, *options)
        assert re.match(
            r"warning: TensorRT 10\.3\.0 will probably refuse encoder: int8 .*only int4 may", line
        )
        assert line.endswith("--precision patcher=fp32,encoder=fp16,latent=fp16,decoder=fp16")
    assert warnings("10.3.0", bundle) == warnings("10.13.0", blocks) == []
