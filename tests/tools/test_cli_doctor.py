"""`blt-edge doctor` on this machine, and its words about others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.tools.doctor import report as module
from blt_edge.tools.doctor.machine import read_driver, read_jetson, read_memory
from blt_edge.tools.doctor.processor import read_processor
from blt_edge.tools.doctor.raspberry_pi import Throttling, read_raspberry_pi
from blt_edge.tools.doctor.report import Advice, MachineReport, examine
from blt_edge.tools.doctor.software import CudaDevice, Software, TriedEngine
from blt_edge.tools.doctor.storage import Storage
from support.machines import ORIN, PC_WITH_CARD, PI_4, PI_5, PI_5_ANSWERS, system


@pytest.fixture(scope="module")
def here() -> MachineReport:
    return examine()


@pytest.fixture
def told(cli, monkeypatch: pytest.MonkeyPatch):
    """`told(report)`: what the verb says about it."""

    def tell(report: MachineReport, *arguments: str):
        monkeypatch.setattr(module, "examine", lambda *_, **__: report)
        return cli("doctor", *arguments)

    return tell


def test_this_machine_runs_bundles(here: MachineReport) -> None:
    assert here.cpu_works
    assert here.software.cpu.ran == ("CPUExecutionProvider",)
    assert here.versions["numpy"]
    json.dumps(here.to_dict())


def test_the_verb_as_one_calls_it(cli, tiny_model) -> None:
    result = cli("doctor", "-m", tiny_model.bundle)
    assert result.exit_code == 0
    for word in ("versions", "ONNX Runtime, CPU", "computed a product itself", "portable graphs: "):
        assert word in result.stdout
    assert "trying ONNX Runtime's CPUExecutionProvider" in result.stderr
    # Commands are to be pasted: they stay whole.
    wide = [line for line in result.stdout.splitlines() if len(line) > 100]
    assert all(line.startswith("    ") for line in wide)


def test_json(told, here: MachineReport) -> None:
    result = told(here, "--json", "-", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document["cpu_works"] is True
    assert document["engines"][0]["provider"] == "CPUExecutionProvider"


def test_without_the_processors_path_the_exit_code_is_1(told, here: MachineReport) -> None:
    broken = TriedEngine("ONNX Runtime", "CPUExecutionProvider", error="crashed (SIGILL)")
    result = told(replace(here, software=replace(here.software, engines=(broken,))))
    assert result.exit_code == 1
    assert "crashed (SIGILL)" in result.stdout
    assert result.stderr == "blt-edge: error: bundles can't run on the processor: crashed (SIGILL)\n"


def test_a_jetson_in_words(told, here: MachineReport, tmp_path: Path) -> None:
    orin = system(tmp_path, ORIN)
    gpus = (CudaDevice("Orin", "8.7", 8 << 30, True),)
    board = {"processor": read_processor(orin), "memory": read_memory(orin), "jetson": read_jetson(orin)}
    software = Software(gpus, None, "12.6", here.software.engines, ())
    words = told(replace(here, **board, driver=read_driver(orin), software=software)).stdout
    for line in (
        "processor   Cortex-A78AE, 6 cores\n",
        "dot product (asimddp)       yes   int8, int4\n",
        "INT8 matrix product (i8mm)  no    prompts\n",
        "FP16 (asimdhp)              yes   float16\n",
        "memory      8.0 GB, of it 5.1 GB available, 4.0 GB of swap, shared with the GPU",
        "JetPack     6.2 (Jetson Linux 36.4.3)",
        "power mode  25W (limited)",
        "clocks      GPU 306 to 918 MHz; CPU 730 to 1344 MHz",
        "GPU         Orin, compute capability 8.7, 8.6 GB (driver 540.4.0, CUDA 12.6)",
    ):
        assert line in words


def test_a_raspberry_pi_in_words(told, here: MachineReport, tmp_path: Path) -> None:
    pi = system(tmp_path, PI_5, **PI_5_ANSWERS)
    board = read_raspberry_pi(pi)
    assert board is not None
    report = replace(
        here,
        processor=read_processor(pi),
        memory=read_memory(pi),
        raspberry_pi=board,
        bundle={"path": "b", "stages": {"latent": "int4"}, "forms": [], "error": None},
        storage=Storage("SD card", "mmcblk0", "/", "ext4"),
    )
    words = told(report).stdout
    for line in (
        "processor  Cortex-A76, 4 cores\n",
        "memory     8.4 GB, of it 7.5 GB available, 2.1 GB of swap (2.1 GB of it in compressed memory)\n",
        "board      Raspberry Pi 5 Model B Rev 1.0\n",
        "state      51.0 °C; not held back\n",
        "fan        level 1 of 4\n",
        "system     governor ondemand, 64-bit programs, pages of 16 KB\n",
        "storage    SD card (mmcblk0), ext4 at /\n",
    ):
        assert line in words
    held = replace(board, throttling=Throttling(("under-voltage",), ("under-voltage", "throttled")))
    words = told(replace(report, raspberry_pi=held)).stdout
    assert "51.0 °C; now: under-voltage; since the start: under-voltage, throttled\n" in words


def test_a_pi_that_tells_little(told, here: MachineReport, tmp_path: Path) -> None:
    words = told(replace(here, raspberry_pi=read_raspberry_pi(system(tmp_path, PI_4)))).stdout
    assert "state      48.2 °C; vcgencmd does not say whether it is held back\n" in words
    assert "fan        none that the system drives\n" in words
    assert "system     governor powersave, programs of unknown width, pages of unknown size\n" in words


def test_what_is_wrong_in_words(told, here: MachineReport, tmp_path: Path) -> None:
    report = replace(
        here,
        driver=read_driver(system(tmp_path, PC_WITH_CARD)),
        software=replace(here.software, gpus=(), gpu_error="crashed (SIGSEGV)"),
        bundle={"path": "x", "error": "manifest.json was changed"},
        advice=(Advice("pictures", "missing: matplotlib", ("pip install x",)),),
    )
    words = told(report).stdout
    assert "NVIDIA GeForce RTX 3060, not usable (driver 550.54.14): crashed (SIGSEGV)" in words
    assert "problem  manifest.json was changed" in words
    assert "pictures: missing: matplotlib\n    pip install x\n" in words


def test_no_bundle(refused, tmp_path: Path) -> None:
    assert "has no manifest.json" in refused("doctor", "-m", tmp_path)
