"""`blt-edge build`: the engine's path on stdout, and who says that it is used."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from blt_edge.runtime.errors import BltError, requirement
from blt_edge.runtime.names import STAGES
from support.quantized import BLOCKY
from support.random_models import export_random_model


def parts(table: str) -> tuple[str, ...]:
    """The stages that a table has rows for."""
    return tuple(line.split()[0] for line in table.splitlines() if " graph  " in line)


@pytest.fixture
def bundle(cli, tiny_model, tmp_path: Path) -> Path:
    """The tiny bundle with two stages in float16."""
    precision = ("--precision", "latent=fp16,decoder=fp16")
    cli("quantize", tiny_model.bundle, "-o", tmp_path / "half", *precision, "--no-validate", code=0)
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
    assert f"engine: {name}; " in after.stderr.splitlines()[-1]
    assert name in cli("inspect", bundle).stdout
    again = cli("build", bundle, "-q", code=0)
    assert (again.stdout, again.stderr) == (built.stdout, "")
    told = cli("build", bundle, "--prune", code=0).stderr.splitlines()
    assert told[0] == "it is there already, and sound; --force builds it again"
    assert told[1] == "--prune: there is nothing to remove"
    assert parts("\n".join(told)) == ()
    document = json.loads(cli("build", bundle, "-q", "--json", "-").stdout)
    assert (document["form"], document["built_for"]["target"]) == (str(engine), "onnxruntime")
    assert document["not_fused"] == []
    assert document["files"]["latent.onnx"] == (engine / "latent.onnx").stat().st_size


def test_rows_are_asked_for_shown_and_changed(cli, bundle: Path) -> None:
    built = cli("build", bundle, "--rows", "4,2", "--json", "-", code=0)
    assert "packed graphs for 2 and 4 texts at once: " in built.stderr
    document = json.loads(built.stdout)
    assert document["rows"] == [2, 4]
    assert {"encoder.rows2.onnx", "encoder.rows4.onnx"} <= document["files"].keys()
    assert "packed graphs" not in cli("build", bundle, "--rows", "2,4", code=0).stderr
    fewer = cli("build", bundle, "--rows", "none", code=0).stderr
    assert "no packed graphs: several texts run one by one" in fewer
    assert json.loads(cli("build", bundle, "-q", "--json", "-").stdout)["rows"] == [2, 4, 8]


@pytest.mark.parametrize("rows", ["1", "65", "2,", "", "two", "-4", "2;4"])
def test_rows_that_no_graph_takes_are_refused(cli, tiny_model, rows: str) -> None:
    refused = cli("build", tiny_model.bundle, "--rows", rows, code=2)
    assert "give numbers from 2 to 64, such as 2,4,8, or none" in refused.stderr


def test_why_there_are_no_packed_graphs_is_said(cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise BltError("it can't be packed")

    monkeypatch.setattr("blt_edge.export.packed.pack_rows", refuse)
    built = cli("build", bundle, "-q", "--json", "-", code=0)
    assert built.stderr == "warning: no packed graphs: it can't be packed; texts run one by one\n"
    assert json.loads(built.stdout)["rows"] == []


def test_what_is_not_fused_is_said(cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for silence hears of it, too: steps are slower than they could be."""
    monkeypatch.setattr("blt_edge.export.build_ort.window_offset", lambda: None)
    built = cli("build", bundle, "-q", "--json", "-", code=0)
    (what,) = json.loads(built.stdout)["not_fused"]
    assert built.stderr == f"warning: not fused: {what}; results are right, steps slower\n"
    assert json.loads(built.stdout)["proven"] is True


def test_a_damaged_engine_is_told_of(cli, bundle: Path) -> None:
    engine = Path(cli("build", bundle, "-q").stdout.strip())
    path = engine / "latent.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    (engine.parent / "onnxruntime-0123456789abcdef").mkdir()
    shown = cli("inspect", bundle, "--verify", code=0)
    assert "portable graphs: latent.onnx was changed" in shown.stdout
    mended = cli("build", bundle)
    assert Path(mended.stdout.strip()) == engine
    assert "onnxruntime-0123456789abcdef, 0 bytes: unnecessary; --prune removes it: " in mended.stderr
    assert f"engines/{engine.name}" in cli("inspect", bundle, "--verify").stdout


def test_a_dry_run_writes_nothing(cli, tiny_model) -> None:
    shown = cli("build", tiny_model.bundle, "--dry-run", code=0)
    assert (parts(shown.stdout), shown.stderr) == (STAGES, "")
    assert f"would write {tiny_model.bundle}/engines/onnxruntime-" in shown.stdout
    assert not (tiny_model.bundle / "engines").exists()


def test_int8_prefill_is_planned_built_and_told(cli, tmp_path: Path) -> None:
    float_bundle = export_random_model(BLOCKY, tmp_path)
    bundle, stages = tmp_path / "int4", ("--int8-prefill", "latent,decoder")
    cli("quantize", float_bundle, "-o", bundle, "--precision", "int4", "--no-validate", code=0)
    planned = cli("build", bundle, *stages, "--dry-run", code=0).stdout
    assert "would write" in planned
    assert " for int8 prefill of latent and decoder; " in planned
    cli("build", bundle, "-q", code=0)
    planned = cli("build", bundle, *stages, "--dry-run", code=0).stdout
    assert "would add " in planned
    built = cli("build", bundle, *stages, "--json", "-", code=0)
    assert "prompts are read in int8 by latent and decoder: " in built.stderr
    assert json.loads(built.stdout)["int8_prefill"] == ["latent", "decoder"]
    assert "would add" not in cli("build", bundle, *stages, "--dry-run", code=0).stdout
    assert "int8 prefill of latent and decoder" in cli("inspect", bundle, code=0).stdout
    back = cli("build", bundle, "--int8-prefill", "none", code=0)
    assert "prompts are read as all else is again" in back.stderr
    refused = cli("build", float_bundle, *stages, "--dry-run", code=2)
    assert "int8 prefill: the latent is fp32" in refused.stderr
    for wrong, told in (("all,none", "all stands alone"), ("middle", "got 'middle', allowed are patcher,")):
        assert told in cli("build", bundle, "--int8-prefill", wrong, code=2).stderr
    elsewhere = cli("build", bundle, *stages, "--target", "tensorrt-rtx", code=2)
    assert "--int8-prefill is for --target onnxruntime" in elsewhere.stderr


def test_pruning_removes_what_nothing_needs_and_nothing_else(cli, tiny_model, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_model.bundle, bundle)
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    used = Path(cli("build", bundle, "-q", code=0).stdout.strip())
    described = json.loads((used / "engine.json").read_text())
    graphs = json.loads((used / "engine.json").read_text())["description"]["stages"]
    graphs["latent"]["data_sha256"] = "0" * 64

    def other(number: int, text: str | None = None, **changes: object) -> Path:
        path = used.with_name(f"onnxruntime-{number:016x}")
        shutil.copytree(used, path)
        description = {**described["description"], **changes}
        (path / "engine.json").write_text(text or json.dumps({**described, "description": description}))
        return path

    go = [other(1, "{}"), other(2, stages=graphs), other(3, onnxruntime="1.22.0"), other(4, blt_edge_form=1)]
    stay = [other(5, processor="Abacus"), other(6, blt_edge_form=99), other(7, onnxruntime="1.22.0")]
    (stay[2] / "notes").mkdir()
    tensorrt = used.with_name("tensorrt-0000000000000000")
    shutil.copytree(used, tensorrt)

    dry = cli("build", bundle, "--dry-run", "--prune", code=0)
    assert all(path.is_dir() for path in (*go, *stay))
    pruned = cli("build", bundle, "--prune", code=0)
    for path in (*go, *stay):
        assert path.is_dir() == (path in stay)
        assert f"{path.name}, " in dry.stderr
        verdict = "kept: " if path in stay else "removed: "
        assert any(path.name in line and verdict in line for line in pruned.stderr.splitlines())
    assert {path.name for path in (bundle / "engines").iterdir()} == {
        path.name for path in (used, tensorrt, *stay)
    }
    # Whatever falls back on the portable graphs, or reads them, still can.
    assert {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()} == before
    assert f" engines/{used.name}\n" in cli("inspect", bundle, "--verify", code=0).stdout
    assert re.search(r"takes .* on disk: .* portable, .* engines\n", pruned.stderr)


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
    assert "they are there already, and sound; --force builds them again\n" in again.stderr
    # Neither target's engines are the other's old ones.
    assert engine.name not in cli("build", bundle, "--prune").stderr
    assert engine.is_dir()


def test_plans_for_several_texts_are_added_and_removed(
    cli, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's plans are noise here: `test_build_tensorrt` and `test_tensorrt_worker` know better ones."""
    from blt_edge.export import build_tensorrt
    from blt_edge.export.tensorrt_worker import PlanFacts
    from blt_edge.runtime.backends.tensorrt import TensorRtModule

    def build(target: str, graph: Path, ranges: object, plan: Path, *more: object) -> PlanFacts:
        plan.write_bytes(b"plan")
        return PlanFacts(4, 1.0, None, None)

    loaded = TensorRtModule("tensorrt", "10.3.0", None)
    monkeypatch.setattr(build_tensorrt, "load_tensorrt", lambda target: loaded)
    monkeypatch.setattr(build_tensorrt, "build_in_child", build)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.7")
    monkeypatch.setattr(build_tensorrt, "_prove", lambda *args: args[-1].joinpath("self_test.bin").touch())
    target = ("--target", "tensorrt")
    engine = Path(cli("build", bundle, *target, code=0).stdout.strip())
    assert not list(engine.glob("*.rows*"))
    dry = cli("build", bundle, *target, "--rows", "2,3", "--dry-run", code=0)
    assert f"would add plans for 2 and 3 texts at once to {engine}: about " in dry.stdout
    more = cli("build", bundle, *target, "--rows", "3,2", "--json", "-", code=0)
    names = {f"{stage}.rows{rows}.plan" for stage in STAGES for rows in (2, 3)}
    assert {path.name for path in engine.glob("*.rows*")} == names <= json.loads(more.stdout)["files"].keys()
    assert "patcher graph, 2 texts" in more.stderr
    assert "latent graph  " not in more.stderr
    assert "for 2 and 3 texts at once: up to 32 new bytes and 8 closed patches of each" in more.stderr
    assert json.loads(more.stdout)["rows"] == [2, 3]
    assert "they are there already" in cli("build", bundle, *target, code=0).stderr
    fewer = cli("build", bundle, *target, "--rows", "2", code=0)
    assert "removed the plans for 3 texts at once\n" in fewer.stderr
    assert not list(engine.glob("*.rows3.plan"))


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
    cli("quantize", tiny_model.bundle, "-o", blocks, *mix, "--no-validate", code=0)
    for options in ((), ("--dry-run",)):
        (line,) = warnings("10.3.0", blocks, *options)
        assert re.match(
            r"warning: TensorRT 10\.3\.0 will probably refuse encoder: int8 .*only int4 may", line
        )
        assert line.endswith("--precision fp16,patcher=fp32")
    assert warnings("10.3.0", bundle) == warnings("10.13.0", blocks) == []
