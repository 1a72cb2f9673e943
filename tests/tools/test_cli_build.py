"""`blt-edge build`: the engine's path on stdout, and who says that it is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from blt_edge.runtime.names import STAGES


def parts(table: str) -> tuple[str, ...]:
    """The stages that a table has rows for."""
    return tuple(line.split()[0] for line in table.splitlines() if " graph  " in line)


@pytest.fixture
def bundle(cli, tiny_model, tmp_path: Path) -> Path:
    """The tiny bundle with two stages in float16."""
    output = tmp_path / "half"
    result = cli("quantize", tiny_model.bundle, "-o", output, "--precision", "latent=fp16,decoder=fp16")
    assert result.exit_code == 0, result.stderr
    return output


def test_an_engine_is_built_used_and_shown(cli, bundle: Path) -> None:
    before = cli("generate", "-m", bundle, "-p", "Once", "-n", 8, "--json", "-")
    assert json.loads(before.stdout)["engine"]["name"] == "portable graphs"
    assert f"blt-edge build {bundle}" in before.stderr
    built = cli("build", bundle)
    assert built.exit_code == 0, built.stderr
    engine = Path(built.stdout.strip())
    assert engine.parent == bundle / "engines"
    assert parts(built.stderr) == STAGES
    after = cli("generate", "-m", bundle, "-p", "Once", "-n", 8, "--json", "-")
    used = {"name": f"engines/{engine.name}", "device": "CPU", "reason": None}
    assert json.loads(after.stdout)["engine"] == used
    assert json.loads(after.stdout)["data_base64"] == json.loads(before.stdout)["data_base64"]
    assert after.stderr.endswith(f"engine: engines/{engine.name}\n")
    assert f"engines/{engine.name}" in cli("inspect", bundle).stdout
    again = cli("build", bundle, "-q")
    assert (again.exit_code, again.stdout, again.stderr) == (0, built.stdout, "")
    document = json.loads(cli("build", bundle, "-q", "--json", "-").stdout)
    assert document["form"] == str(engine)
    assert document["files"]["latent.onnx"] == (engine / "latent.onnx").stat().st_size
    assert document["built_for"]["target"] == "onnxruntime"


def test_a_damaged_engine_is_told_of(cli, bundle: Path) -> None:
    engine = Path(cli("build", bundle, "-q").stdout.strip())
    path = engine / "latent.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (engine.parent / "onnxruntime-0123456789abcdef").mkdir()
    shown = cli("inspect", bundle, "--verify")
    assert shown.exit_code == 0
    assert "portable graphs: latent.onnx was changed" in shown.stdout
    mended = cli("build", bundle)
    assert Path(mended.stdout.strip()) == engine
    assert "to remove by hand: onnxruntime-0123456789abcdef" in mended.stderr
    assert f"engines/{engine.name}" in cli("inspect", bundle, "--verify").stdout


def test_a_dry_run_writes_nothing(cli, tiny_model) -> None:
    shown = cli("build", tiny_model.bundle, "--dry-run")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert parts(shown.stdout) == STAGES
    assert f"would write {tiny_model.bundle}/engines/onnxruntime-" in shown.stdout
    assert not (tiny_model.bundle / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x"], "--target: got 'x', this version has onnxruntime or tensorrt or tensorrt-rtx"),
        (["--max-patches", "9"], "--max-patches is for --target tensorrt and tensorrt-rtx; leave it out"),
        (["--compute-capability", "8.6", "--dry-run"], "--compute-capability is for --target tensorrt"),
        (["--dry-run", "--json", "-"], "--json is for what was built"),
        (["--target", "tensorrt-rtx", "--max-bytes", "501"], "--max-bytes is 501; allowed is"),
        (["--target", "tensorrt", "--workspace", "x"], "--workspace: got 'x'; give an amount such as"),
    ],
)
def test_refusals(cli, tiny_model, arguments: list[str], message: str) -> None:
    result = cli("build", tiny_model.bundle, *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert not (tiny_model.bundle / "engines").exists()


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_what_to_install_is_told(cli, tiny_model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    result = cli("build", tiny_model.bundle, "--target", name)
    assert result.exit_code == 1
    assert f"pip install 'blt-edge[{name}]'" in result.stderr


def test_the_demos_engines_are_built_and_told_of(cli, tmp_path: Path) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    bundle = tmp_path / "demo"
    assert cli("export", "demo", "-o", bundle, "--no-validate", "-q").exit_code == 0
    target = ("--target", "tensorrt-rtx", "--compute-capability", "8.6", "--max-patches", "1000")
    planned = cli("build", bundle, *target, "--dry-run")
    assert (planned.exit_code, planned.stderr) == (0, "")
    assert "latent   past          1 to 1000, tuned for 512  1 to 1000, tuned for 512" in planned.stdout
    assert not (bundle / "engines").exists()
    built = cli("build", bundle, *target)
    assert built.exit_code == 0, built.stderr
    engine = Path(built.stdout.strip())
    assert f"would write {engine}: about " in planned.stdout
    assert {path.name for path in engine.iterdir()} == {
        "engine.json",
        "self_test.bin",
        *(f"{stage}.plan" for stage in STAGES),
    }
    assert "for texts of up to 16384 bytes and 1000 patches, patches of up to 512 bytes" in built.stderr
    # Here is no GPU, or another: they are compared where they are loaded.
    assert "not run yet: this machine has no GPU of compute capability 8.6; " in built.stderr
    assert json.loads((engine / "engine.json").read_text())["proven"] is False
    again = cli("build", bundle, *target)
    assert (again.exit_code, again.stdout) == (0, built.stdout)
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

    def crash(*arguments: object) -> None:
        raise BackendError("patcher.onnx: TensorRT crashed")

    def built(version: str, model: Path, *options: str) -> list[str]:
        monkeypatch.setattr(
            build_tensorrt, "load_tensorrt", lambda target: TensorRtModule(target, version, None)
        )
        result = cli("build", model, "--target", "tensorrt", "-q", *options)
        lines = result.stderr.splitlines()
        if not options:
            assert result.exit_code == 1
            assert lines.pop() == "blt-edge: error: patcher.onnx: TensorRT crashed"
        return lines

    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.7")
    monkeypatch.setattr(build_tensorrt, "build_in_child", crash)
    blocks = tmp_path / "blocks"
    mix = ("--precision", "encoder=int8w,latent=fp16,decoder=fp16")
    changed = cli("quantize", tiny_model.bundle, "-o", blocks, *mix)
    assert changed.exit_code == 0, changed.stderr
    for options in ((), ("--dry-run",)):
        (line,) = built("10.3.0", blocks, *options)
        assert line.startswith(
            "warning: TensorRT 10.3.0 will probably refuse encoder: int8 has a scale for each block; "
            "only int4 may (encoder"
        )
        assert line.endswith(
            "; export or quantize with --precision patcher=fp32,encoder=fp16,latent=fp16,decoder=fp16"
        )
    assert built("10.3.0", bundle) == []
    assert built("10.13.0", blocks) == []
