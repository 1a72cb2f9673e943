"""TensorRT engines of a bundle: all of them or none, and only where they make sense."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from blt_edge.export import build_tensorrt, export_checkpoint
from blt_edge.export.build_ort import new_engine
from blt_edge.export.build_tensorrt import Part, TensorRtOptions, build_engines, plan_tensorrt
from blt_edge.export.quantize import quantize_bundle
from blt_edge.export.tensorrt_worker import Moment, PlanFacts, PlanOptions
from blt_edge.runtime.backends import tensorrt_stage
from blt_edge.runtime.backends.gpu import Gpu
from blt_edge.runtime.backends.tensorrt import TensorRtModule
from blt_edge.runtime.backends.tensorrt_profiles import Profiles
from blt_edge.runtime.engines import find_tensorrt_engine
from blt_edge.runtime.errors import BackendError, BundleError, OptionError
from blt_edge.runtime.files import WriteError
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.names import STAGES
from blt_edge.runtime.packed_check import check_packed
from support.simulated_gpu import SimulatedDriver, SimulatedTensorRt, write_plan

Ranges = tuple[dict[str, tuple[int, int, int]], ...]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint("demo", tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture
def bundle(demo: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(demo, tmp_path / "bundle"))


ORIN = TensorRtModule("tensorrt", "10.3.0", None)
OPTIONS = TensorRtOptions("tensorrt")


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A machine with a GPU and TensorRT whose plans are noise; the stages that were built."""
    built: list[str] = []

    def build(
        target: str, graph: Path, ranges: Ranges, plan: Path, options: PlanOptions, watch: Any
    ) -> PlanFacts:
        assert (target, options.capabilities) == ("tensorrt", ())
        assert options.timing_cache == tmp_path / "cache" / "blt-edge" / "tensorrt-10.3.0-sm87.timing"
        plan.write_bytes(graph.name.encode() * 99)
        built.append(graph.stem)
        if watch is not None:
            watch(Moment("building", 1, 2, 0.1, None))
        return PlanFacts(plan.stat().st_size, 1.0, None, None)

    def prove(*args: Any, name: str, alike: bool) -> None:
        bundle, _, open_stage, _, self_test = args
        assert (open_stage is not None, name, alike) == (True, "TensorRT 10.3.0", False)
        assert bundle.is_dir()
        self_test.write_bytes(b"")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_tensorrt, "load_tensorrt", lambda target: ORIN)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.7")
    monkeypatch.setattr(build_tensorrt, "build_in_child", build)
    # Noise computes nothing: what proves engines has tests of its own.
    monkeypatch.setattr(build_tensorrt, "open_gpu", lambda: None)
    monkeypatch.setattr(build_tensorrt, "prove_engine", prove)
    monkeypatch.setattr(build_tensorrt, "_prove_packed", lambda *_: None)
    return built


def snapshot(bundle: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in bundle.rglob("*")}


def test_engines_are_built_found_and_kept(bundle: Path, orin: list[str]) -> None:
    told: list[tuple[Part, Moment | None]] = []
    result = build_engines(bundle, OPTIONS, watch=lambda *what: told.append(what))
    assert orin == [part.stage for part in result.facts] == list(STAGES)
    assert [part.stage for part, moment in told if moment is None] == list(STAGES)
    manifest = load_manifest(bundle)
    assert find_tensorrt_engine(bundle, manifest, ORIN, "8.7") == result.engine
    description = json.loads((result.engine.directory or bundle).joinpath("engine.json").read_text())
    assert set(description["files"]) == {*(f"{stage}.plan" for stage in STAGES), "self_test.bin"}
    assert description["proven"] is result.proven is True
    # Again: nothing to do, until it is damaged, or something else is wanted.
    assert build_engines(bundle, OPTIONS).facts == {}
    assert build_engines(bundle, OPTIONS, force=True).facts.keys() == result.facts.keys()
    assert result.engine.directory is not None
    (result.engine.directory / "latent.plan").write_bytes(b"x")
    assert plan_tensorrt(bundle, OPTIONS).there is False
    assert build_engines(bundle, OPTIONS).engine == result.engine
    other = build_engines(bundle, replace(OPTIONS, max_patches=100))
    assert other.engine != result.engine
    assert len(list((bundle / "engines").iterdir())) == 2


def test_plans_for_several_texts_come_and_go(
    bundle: Path, orin: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[PlanOptions] = []
    build = build_tensorrt.build_in_child

    def watched(
        target: str, graph: Path, ranges: Ranges, plan: Path, options: PlanOptions, watch: Any
    ) -> Any:
        told.append(options)
        profiles = 2 if options.rows == 1 else 1
        assert len(ranges) == profiles
        assert ("rows" in ranges[0]) == (options.rows > 1)
        return build(target, graph, ranges, plan, options, watch)

    monkeypatch.setattr(build_tensorrt, "build_in_child", watched)

    def built(*rows: int, **how: Any) -> list[int]:
        """Rows of the plans that were built."""
        told.clear()
        result = build_engines(bundle, replace(OPTIONS, rows=rows if rows != (0,) else None), **how)
        path = result.engine.directory
        assert path is not None
        here = find_tensorrt_engine(bundle, load_manifest(bundle), ORIN, "8.7", full=True)
        assert here == result.engine
        names = {f"{stage}.plan" for stage in STAGES}
        names |= {f"{stage}.rows{count}.plan" for stage in STAGES for count in here.rows}
        assert {file.name for file in path.iterdir()} == {"engine.json", "self_test.bin", *names}
        assert list(result.facts) == [
            Part(stage, count)
            for count in dict.fromkeys(options.rows for options in told)
            for stage in STAGES
        ]
        return [options.rows for options in told[:: len(STAGES)]]

    assert built() == [1]
    assert built(4, 2) == [2, 4]
    assert built(0) == []  # not said: they stay
    assert built(2, 3) == [3]
    assert built(2) == []
    assert built(0, force=True) == [1, 2]
    assert built() == []
    assert built(2, force=True) == [1, 2]
    path = plan_tensorrt(bundle, OPTIONS).directory
    (path / "latent.rows2.plan").write_bytes(b"x")
    plan = plan_tensorrt(bundle, replace(OPTIONS, rows=(2,)))
    assert not plan.there
    assert plan.missing == tuple(plan.parts)
    with pytest.raises(OptionError, match="rows"):
        plan_tensorrt(bundle, replace(OPTIONS, rows=(1,)))


def test_plans_for_several_texts_are_proven_where_they_run(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a simulated GPU, whose plans are packed graphs that the processor computes."""
    bundle, driver, wrong = Path(shutil.copytree(demo, tmp_path / "bundle")), SimulatedDriver(), []

    def build(
        target: str, graph: Path, ranges: Ranges, plan: Path, options: PlanOptions, watch: Any
    ) -> PlanFacts:
        manifest = load_manifest(bundle)
        write_plan(plan, bundle, graph.stem, Profiles.of(manifest), options.rows)
        return PlanFacts(plan.stat().st_size, 1.0, None, None)

    def check(*args: Any) -> None:
        if wrong:
            raise BackendError(f"{args[1]}: it computes something else")
        check_packed(*args)

    module = SimulatedTensorRt(driver).as_module("tensorrt")
    monkeypatch.setattr(build_tensorrt, "load_tensorrt", lambda target: module)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.6")
    monkeypatch.setattr(build_tensorrt, "build_in_child", build)
    monkeypatch.setattr(build_tensorrt, "open_gpu", lambda: Gpu(driver))
    monkeypatch.setattr(tensorrt_stage, "check_packed", check)
    assert build_engines(bundle, replace(OPTIONS, rows=(2,))).proven
    wrong.append(True)
    before = snapshot(bundle)
    with pytest.raises(BackendError, match=r"patcher: it computes something else; blt-edge build .* --force"):
        build_engines(bundle, replace(OPTIONS, rows=(2, 3)))
    kept = {path for path in snapshot(bundle) if ".rows3.onnx" not in path.name}  # the simulation's own
    assert kept == set(before)
    wrong.clear()
    assert build_engines(bundle, replace(OPTIONS, rows=(2, 3))).engine.rows == (2, 3)
    assert driver.broken == []


@pytest.mark.usefixtures("orin")
def test_a_plan_for_several_texts_that_fails_leaves_the_engine_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engines(bundle, OPTIONS)
    before, build = snapshot(bundle), build_tensorrt.build_in_child

    def fails(target: str, graph: Path, *more: Any) -> PlanFacts:
        if graph.stem == "decoder":
            raise BackendError("decoder.onnx: TensorRT crashed")
        return build(target, graph, *more)

    monkeypatch.setattr(build_tensorrt, "build_in_child", fails)
    with pytest.raises(BackendError, match="crashed"):
        build_engines(bundle, replace(OPTIONS, rows=(2,)))
    assert snapshot(bundle) == before


@pytest.mark.usefixtures("orin")
def test_float32_stages_keep_float32_attention(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = quantize_bundle(demo, tmp_path / "mixed", precision="latent=fp16,decoder=int8w")
    build, halves = build_tensorrt.build_in_child, {}

    def watched(
        target: str, graph: Path, ranges: Ranges, plan: Path, options: PlanOptions, watch: Any
    ) -> PlanFacts:
        halves[graph.stem] = options.half_attention
        return build(target, graph, ranges, plan, options, watch)

    monkeypatch.setattr(build_tensorrt, "build_in_child", watched)
    build_engines(mixed, OPTIONS)
    assert halves == {"patcher": False, "encoder": False, "latent": True, "decoder": True}


def test_a_plan_writes_nothing(bundle: Path, orin: list[str]) -> None:
    before = snapshot(bundle)
    plan = plan_tensorrt(bundle, replace(OPTIONS, max_bytes=1000))
    assert snapshot(bundle) == before
    assert orin == []
    assert plan.capabilities == ("8.7",)
    assert plan.profiles.limits.max_patches == 1000
    weights = sum(part.weights for part in plan.parts.values())
    assert weights < plan.plan_bytes < 10 * weights
    assert plan.peak_memory > weights


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (TensorRtOptions("x"), OptionError, "target: got 'x'"),
        (replace(OPTIONS, max_bytes=10**6), OptionError, "max_bytes is 1000000"),
        (replace(OPTIONS, workspace=0), OptionError, "workspace is 0"),
        (replace(OPTIONS, optimization_level=6), OptionError, "optimization_level is 6"),
        (
            replace(OPTIONS, compute_capability=("8.6",)),
            OptionError,
            "compute_capability: TensorRT builds only for the GPU that it runs on",
        ),
    ],
)
@pytest.mark.usefixtures("orin")
def test_options_that_are_refused(
    demo: Path, options: TensorRtOptions, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_engines(demo, options)
    assert not (demo / "engines").exists()


def test_targets_that_are_refused(demo: Path, rtx: TensorRtModule, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TensorRtOptions("tensorrt-rtx")
    with pytest.raises(OptionError, match=r"got '8\.7', TensorRT-RTX .* builds for 7\.5, 8\.0.* tensorrt$"):
        plan_tensorrt(demo, replace(options, compute_capability=("8.7",)))
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: None)
    with pytest.raises(BackendError, match=r"no GPU .*name one with --compute-capability: 7\.5, 8\.0"):
        plan_tensorrt(demo, options)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.7")
    with pytest.raises(BackendError, match=r"this machine's GPU has compute capability 8\.7"):
        plan_tensorrt(demo, options)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: "8.9")
    assert plan_tensorrt(demo, options).capabilities == ("8.9",)
    several = plan_tensorrt(demo, replace(options, compute_capability=("12.0", "8.6", "8.6")))
    assert several.capabilities == ("8.6", "12.0")
    assert several.timing_cache is None


def test_full_tensorrt_needs_a_gpu(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tensorrt, "load_tensorrt", lambda target: ORIN)
    monkeypatch.setattr(build_tensorrt, "device_compute_capability", lambda: None)
    with pytest.raises(BackendError, match=r"no GPU .*build on the device"):
        plan_tensorrt(demo, OPTIONS)


@pytest.mark.usefixtures("orin")
def test_a_graph_of_another_making_is_not_shown_to_tensorrt(bundle: Path, orin: list[str]) -> None:
    manifest = load_manifest(bundle)
    for change in ("weights elsewhere", "another input"):
        graph = onnx.load(bundle / "latent.onnx", load_external_data=False)
        if change == "weights elsewhere":
            entries = next(t.external_data for t in graph.graph.initializer if t.external_data)
            next(entry for entry in entries if entry.key == "location").value = "../../secret"
        else:
            graph.graph.input[0].name = "other"
        spoiled = bundle.parent / change
        shutil.copytree(bundle, spoiled)
        onnx.save(graph, spoiled / "latent.onnx")
        with pytest.raises(BundleError, match=r"latent\.onnx"):
            build_tensorrt._check_graph(spoiled, manifest, "latent")
    assert orin == []


# Interrupted.


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (BackendError("latent.onnx: TensorRT crashed"), BackendError),
        (OSError(errno.ENOSPC, "No space left on device"), WriteError),
    ],
)
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.usefixtures("orin")
def test_a_build_that_ends_early_leaves_what_was_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type, there: bool
) -> None:
    if there:
        build_engines(bundle, OPTIONS)
    before = snapshot(bundle)
    build = build_tensorrt.build_in_child

    def interrupted(target: str, graph: Path, *more: Any) -> PlanFacts:
        facts = build(target, graph, *more)
        if graph.stem == "latent":
            raise error
        return facts

    monkeypatch.setattr(build_tensorrt, "build_in_child", interrupted)
    with pytest.raises(raised):
        build_engines(bundle, OPTIONS, force=True)
    assert snapshot(bundle) == before


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_build_and_its_child(
    rtx: TensorRtModule, bundle: Path, number: signal.Signals
) -> None:
    arguments = ["build", str(bundle), "--target", "tensorrt-rtx", "--compute-capability", "8.6"]
    start = "import sys; from blt_edge.tools.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "encoder graph\n" not in (line := process.stderr.readline()):
            assert line, "the build ended"
        wait_until(lambda: bool(children(process.pid)))
        (child,) = children(process.pid)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=60)
    assert output == ""
    assert process.returncode != 0
    wait_until(lambda: not is_running(child))
    if number == signal.SIGKILL:  # nobody could clear up: the next build does
        assert [path.name[0] for path in (bundle / "engines").iterdir()] == ["."]
        directory = plan_tensorrt(bundle, TensorRtOptions("tensorrt-rtx", ("8.6",))).directory
        with pytest.raises(RuntimeError), new_engine(directory, needed=0):
            raise RuntimeError
    assert not (bundle / "engines").exists()


def wait_until(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within half a minute")
