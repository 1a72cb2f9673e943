"""The modules' differences, on stand-ins for the modules."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from blt_edge.runtime.backends import tensorrt
from blt_edge.runtime.backends.tensorrt import TensorRtModule, load_tensorrt
from blt_edge.runtime.errors import BackendError, requirement


class Flag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Capability(IntEnum):
    NONE = 0
    CURRENT = 1
    SM75 = 75
    SM86 = 86
    SM120 = 120


def module(**parts: Any) -> Any:
    """What both modules have, as far as it is used."""
    return SimpleNamespace(
        **{
            "Builder": object,
            "NetworkDefinitionCreationFlag": Flag,
            "BuilderFlag": SimpleNamespace(TF32="tf32"),
            "MemoryPoolType": SimpleNamespace(WORKSPACE="workspace"),
            "ComputeCapability": Capability,
            **parts,
        }
    )


class Config:
    """Records what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: self.said.append((name, *values))


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str, **parts: Any) -> None:
    stand_in = ModuleType(name)
    stand_in.__dict__.update({"__version__": version, "Builder": object, **parts})
    monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)


# 1. Finding the module.


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("tensorrt", "TensorRT is not installed: on a Jetson it comes with JetPack"),
        ("tensorrt-rtx", f"TensorRT-RTX is not installed: pip install {requirement('tensorrt-rtx')}"),
    ],
    ids=["tensorrt", "tensorrt-rtx"],
)
def test_what_to_install_is_told(target: str, said: str) -> None:
    with pytest.raises(BackendError, match=f"^{re.escape(said)}"):
        load_tensorrt(target)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("target", "name", "version"),
    [
        ("tensorrt", "tensorrt", "10.3.0"),
        ("tensorrt", "tensorrt", "11.4.1.2"),
        ("tensorrt-rtx", "tensorrt_rtx", "1.7.1.116"),
        ("tensorrt-rtx", "tensorrt_rtx_bindings", "1.7.1.116"),
    ],
)
def test_a_module_is_found(monkeypatch: pytest.MonkeyPatch, target: str, name: str, version: str) -> None:
    if name == "tensorrt_rtx_bindings":  # the package beside it has nothing in it
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", ModuleType("tensorrt_rtx"))
    install(monkeypatch, name, version)
    trt = load_tensorrt(target)
    assert (trt.target, trt.version, trt.module) == (target, version, sys.modules[name])


@pytest.mark.usefixtures("nothing_installed")
def test_an_old_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "8.6.1")
    with pytest.raises(BackendError, match=r"^TensorRT 8\.6\.1 is too old, 10\.3 or newer is needed: "):
        load_tensorrt("tensorrt")


def test_a_package_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise OSError("libnvinfer.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(tensorrt.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"is installed, but can't be loaded: libnvinfer\.so\.10.* file$"):
        load_tensorrt("tensorrt")


# 2. Building.


def network_flags(flags: Any) -> int:
    asked: list[int] = []
    builder = SimpleNamespace(create_network=asked.append)
    TensorRtModule("tensorrt", "10.3", module(NetworkDefinitionCreationFlag=flags)).create_network(builder)
    return asked[0]


def test_networks_are_strongly_typed() -> None:
    assert network_flags(Flag) == 2
    assert network_flags(SimpleNamespace()) == 0  # where there is nothing else


def test_float32_stays_float32_and_targets_are_set() -> None:
    config = Config()
    rtx = TensorRtModule("tensorrt-rtx", "1.7", module())
    rtx.set_up(config, capabilities=("8.6", "12.0"), workspace=7, optimization_level=5)
    assert config.said == [
        ("clear_flag", "tf32"),
        ("set_compute_capability", Capability.SM86, 0),
        ("set_compute_capability", Capability.SM120, 1),
        ("set_memory_pool_limit", "workspace", 7),
    ]
    assert (config.num_compute_capabilities, config.builder_optimization_level) == (2, 5)
    assert rtx.compute_capabilities == ("7.5", "8.6", "12.0")


def test_full_tensorrt_has_no_targets() -> None:
    config = Config()
    full = TensorRtModule("tensorrt", "10.3", module(ComputeCapability=None))
    full.set_up(config, capabilities=(), workspace=None, optimization_level=None)
    assert config.said == [("clear_flag", "tf32")]
    assert full.compute_capabilities == ()


def test_a_monitor_reports_the_innermost_phase() -> None:
    told: list[tuple[str, int, int]] = []
    trt = TensorRtModule("tensorrt", "10.3", module(IProgressMonitor=object))
    monitor = trt.monitor(lambda *what: told.append(what))
    monitor.phase_start("build", None, 6)
    monitor.phase_start("costs", "build", 2)
    assert monitor.step_complete("costs", 0) is True
    monitor.phase_finish("costs")
    assert monitor.step_complete("costs", 1) is True  # from a thread that is late
    monitor.step_complete("build", 0)
    monitor.phase_finish("build")
    assert told == [("build", 0, 6), ("costs", 0, 2), ("costs", 1, 2), ("build", 0, 6), ("build", 1, 6)]
    assert TensorRtModule("tensorrt", "10.0", module()).monitor(print) is None


def test_a_logger_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[tuple[str, str]] = []
    trt = TensorRtModule("tensorrt", "10.3", module(ILogger=object))
    trt.logger(lambda *what: said.append(what)).log(SimpleNamespace(name="ERROR"), "no")
    assert said == [("ERROR", "no")]
    assert capfd.readouterr() == ("", "")


# 3. The timing cache.


class TimingConfig:
    """A builder configuration that takes caches that begin with `good`, as TensorRT takes its own only."""

    def __init__(self) -> None:
        self.used: bytes | None = None

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache and not cache.startswith(b"good"):
            return False
        self.used = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: (self.used or b"good") + b"+")


def test_what_was_learned_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trt = TensorRtModule("tensorrt", "10.3.0", module())
    path = trt.timing_cache_path("8.7")
    assert path == tmp_path / "blt-edge" / "tensorrt-10.3.0-sm87.timing"
    assert TensorRtModule("tensorrt-rtx", "1.7", module()).timing_cache_path("8.6") is None
    for expected in (b"good+", b"good++"):
        config = TimingConfig()
        trt.read_timing_cache(config, path)
        trt.write_timing_cache(config, path)
        assert path.read_bytes() == expected
    path.write_bytes(b"another version's")
    config = TimingConfig()
    trt.read_timing_cache(config, path)
    assert config.used == b""
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.timing"
    config = TimingConfig()
    trt = TensorRtModule("tensorrt", "10.3.0", module())
    trt.read_timing_cache(config, path)
    trt.write_timing_cache(config, path)


# 4. The real one.


def test_the_installed_module_builds_for_names() -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs TensorRT-RTX: pip install 'blt-edge[tensorrt-rtx]'"
    )
    trt = load_tensorrt("tensorrt-rtx")
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(trt.compute_capabilities)


# 5. Contexts.


def test_rtx_captures_graphs_by_itself_and_keeps_what_it_compiled() -> None:
    config = Config()
    engine = SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=lambda how: how)
    parts = {"ExecutionContextAllocationStrategy": SimpleNamespace(USER_MANAGED="ours")}
    graphs = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    trt = TensorRtModule("tensorrt-rtx", "1.7", module(**parts, CudaGraphStrategy=graphs))
    assert trt.captures
    assert trt.context_maker(engine)() is config
    assert config.cuda_graph_strategy == "whole"
    assert ("set_execution_context_allocation_strategy", "ours") in config.said
    older = Config()
    engine.create_runtime_config = lambda: older
    TensorRtModule("tensorrt-rtx", "1.1", module(**parts)).context_maker(engine)()
    assert "cuda_graph_strategy" not in vars(older)
    plain = TensorRtModule("tensorrt", "10.3", module(**parts))
    assert not plain.captures
    assert plain.context_maker(engine)() == "ours"
