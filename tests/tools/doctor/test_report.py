"""Whole machines: what is reported and advised, with fake files, packages and replies."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.doctor.report import MachineReport, examine
from blt_edge.tools.doctor.software import Reply
from support.machines import ORIN, PC, PC_WITH_CARD, PI_4, PI_5, PI_5_ANSWERS, THOR, system

CPU, CUDA, TRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
NO_TENSORRT = Reply(error="TensorRT is not installed: on a Jetson it comes with JetPack (apt install x)")
NO_DLA = Reply(error="TensorRT is installed, but can't be loaded: libnvdla_compiler.so: cannot open")
RTX = Reply({"version": "1.7", "builds_for": ["8.6"]})
REQUIREMENTS = ['onnx>=1.18; extra == "export"', 'torch>=2.6; extra == "validate"', 'ruff; extra == "dev"']
ALL = dict.fromkeys(("blt-edge", "numpy", "onnxruntime", "cuda-bindings"), "1.23.2")
ALL |= {"onnx": "1.19.0", "torch": "2.6.0"}
BOTH = {**ALL, "onnxruntime-gpu": "1.23.2"}
NO_DRIVER = {name: text for name, text in PC_WITH_CARD.items() if "driver" not in name}
FIXED = {name: "918000000" if "gpu" in name else "1344000" for name in ORIN if name.endswith("_freq")}


def gpu(name: str, capability: str, unified: bool = False) -> Reply:
    device = {"name": name, "compute_capability": capability, "memory_bytes": 1, "unified_memory": unified}
    return Reply({"cuda": "12.6", "devices": [device]})


def ran(*providers: str, right: bool = True, said: str = "") -> Reply:
    return Reply({"registered": list(providers), "ran": list(providers), "right": right}, said=said)


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in ALL.items() if name not in names}


def look(
    tmp_path: Path, files: dict[str, str], packages=ALL, providers=None, bundle=None, commands=None, **replies
) -> MachineReport:
    """A report of these; replies: cuda, list_ (of providers), tensorrt, rtx."""
    tried = providers or {CPU: ran(CPU)}
    listed = Reply({"version": "1.23.2", "providers": sorted(tried, reverse=True)})
    known: dict[tuple[str, ...], Reply] = {
        ("cuda",): replies.get("cuda", Reply(error="CUDA_ERROR_NO_DEVICE")),
        ("providers",): replies.get("list_", listed),
        ("tensorrt", "tensorrt"): replies.get("tensorrt", NO_TENSORRT),
        ("tensorrt", "tensorrt-rtx"): replies.get("rtx", Reply(error="TensorRT-RTX is not installed")),
        **{("provider", name): reply for name, reply in tried.items()},
    }

    def ask(*names: str) -> Reply:
        if names[0] == "bundle":
            return Reply({"stages": {"encoder": "fp32"}, "forms": [], "asked": list(names[1:])})
        return known[names]

    machine = system(tmp_path, files, **(commands or {}))
    return examine(bundle, system=machine, lookup=packages.get, requirements=REQUIREMENTS, ask=ask)


RTX_3060 = {"cuda": gpu("NVIDIA GeForce RTX 3060", "8.6"), "rtx": RTX}
MAXN = {"nvpmodel": "NV Power Mode: MAXN\n0\n"}
SUPER = {"nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n"}
FULL_ORIN = {**ORIN, **FIXED}
ORIN_GPU = {"cuda": gpu("Orin", "8.7", unified=True), "tensorrt": Reply({"version": "10", "builds_for": []})}
LOW_VOLTAGE = "throttled=0x10001\n"
NO_BINDINGS = {"packages": without("cuda-bindings")}


@pytest.mark.parametrize(
    ("files", "given", "commands"),
    [
        (PC, {}, []),
        (PC, {"packages": without("onnx", "torch")}, ["[export]", "[validate]"]),
        (PC, {"packages": without("onnxruntime"), "list_": Reply(error="x")}, ["[cpu]"]),
        (PC, {"list_": Reply(error="crashed (SIGILL)")}, ["--force-reinstall onnxruntime"]),
        (PC, {"packages": BOTH}, ["uninstall -y onnxruntime onnxruntime-gpu", "install onnxruntime-gpu"]),
        (PC_WITH_CARD, {"providers": {CPU: ran(CPU), CUDA: ran(CUDA)}, **RTX_3060}, []),
        (PC_WITH_CARD, RTX_3060, ["uninstall -y onnxruntime", "[gpu]"]),
        (PC_WITH_CARD, {"cuda": Reply(error="crashed"), "rtx": RTX}, ["nvidia-smi", "sudo reboot"]),
        (PC_WITH_CARD, {}, ["nvidia-smi", "sudo reboot", "[tensorrt-rtx]"]),
        (NO_DRIVER, {"rtx": RTX}, ["sudo ubuntu-drivers install", "sudo reboot"]),
        (
            ORIN,
            {**NO_BINDINGS, "cuda": Reply(error="not installed")},
            ["cuda-bindings>=12.6,<13", "python3-libnvinfer", "install.sh", "nvpmodel -m 2", "jetson_clocks"],
        ),
        (FULL_ORIN, {**ORIN_GPU, "commands": SUPER}, []),
        (FULL_ORIN, {"tensorrt": RTX, "commands": SUPER}, ["--reinstall nvidia-l4t-cuda nvidia-l4t-core"]),
        (FULL_ORIN, {**ORIN_GPU, "tensorrt": NO_DLA, "commands": SUPER}, ["nvidia-l4t-dla-compiler"]),
        (THOR, {**NO_BINDINGS, "tensorrt": RTX, "commands": MAXN}, ["cuda-bindings>=13.0,<14"]),
        (NO_DRIVER, {**NO_BINDINGS, "rtx": RTX}, ["'cuda-bindings>=12.6'"]),
        (PI_5, {"commands": PI_5_ANSWERS}, []),
        (PI_5, {"commands": {**PI_5_ANSWERS, "vcgencmd get_throttled": LOW_VOLTAGE}}, ["get_throttled"]),
        (PI_4, {}, ["echo ondemand | sudo tee"]),
        (PI_5, {"commands": {**PI_5_ANSWERS, "getconf LONG_BIT": "32"}}, ["rpi-imager"]),
    ],
)
def test_advice(tmp_path: Path, files: dict[str, str], given: dict, commands: list[str]) -> None:
    """What each command holds, machine by machine."""
    found = [command for advice in look(tmp_path, files, **given).advice for command in advice.commands]
    assert len(found) == len(commands)
    assert all(word in command for word, command in zip(commands, found, strict=True))


def test_a_pc_without_a_gpu(tmp_path: Path) -> None:
    report = look(tmp_path, PC)
    assert (report.cpu_works, report.jetson, report.to_dict()["gpus"]) == (True, None, [])


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ({"list_": Reply(error="No module named 'onnxruntime'")}, "No module named 'onnxruntime'"),
        ({"providers": {CPU: ran(CPU, right=False)}}, "came out wrong"),
        ({"providers": {CUDA: ran(CUDA)}}, "no CPU provider"),
    ],
)
def test_a_processor_that_runs_nothing(tmp_path: Path, replies: dict, error: str) -> None:
    report = look(tmp_path, PC, **replies)
    assert not report.cpu_works
    assert error in str(report.software.cpu.error)
    assert not report.advice[0].optional


def test_a_provider_that_fell_back_is_found_out(tmp_path: Path) -> None:
    azure = "AzureExecutionProvider"
    providers = {
        azure: ran(CPU),
        CPU: ran(CPU),
        CUDA: ran(CPU, said="libcudnn.so.9: cannot open shared object file"),
        TRT: Reply(error="crashed (SIGSEGV)"),
    }
    software = look(tmp_path, PC_WITH_CARD, providers=providers, **RTX_3060).software
    assert software.engines[0].provider == CPU
    errors = {engine.provider: engine.error for engine in software.engines if engine.provider}
    assert errors[CUDA] == f"ran on {CPU} instead: libcudnn.so.9: cannot open shared object file"
    assert errors[azure].endswith("as it should: it is for calls to remote services only")
    assert (errors[TRT], errors[CPU]) == ("crashed (SIGSEGV)", None)


def test_a_bundle_is_asked_with_the_gpus_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = look(tmp_path, PC_WITH_CARD, cuda=gpu("x", "8.6"), bundle=Path("bundle"))
    assert report.bundle is not None
    assert report.bundle["asked"] == [str(tmp_path / "bundle"), "8.6"]
    assert (report.bundle["path"], report.bundle["error"]) == ("bundle", None)


def test_a_bundle_on_an_sd_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it could lie better, the command that copies it there is one that a shell takes as it is."""
    (card := tmp_path / "sys/dev/block/179:2").parent.mkdir(parents=True)
    card.symlink_to("../../devices/platform/mmc0/mmc0:aaaa/block/mmcblk0/mmcblk0p2")
    (tmp_path / "sys/dev/block/259:1").symlink_to("../../devices/nvme/nvme0/nvme0n1/nvme0n1p1")
    monkeypatch.chdir(tmp_path)
    report = look(tmp_path, PI_5, commands=PI_5_ANSWERS, bundle=Path("my bundle"))
    assert report.to_dict()["storage"] == {
        "kind": "SD card",
        "device": "mmcblk0",
        "mount": "/",
        "filesystem": "ext4",
    }
    (advice,) = report.advice
    assert "on an SD card (mmcblk0)" in advice.reason
    assert advice.commands == (f"rsync -a --exclude engines '{tmp_path}/my bundle' /srv/blt-edge/",)
    there = look(tmp_path, PI_5, commands=PI_5_ANSWERS, bundle=Path("/mnt/fast ssd/x"))
    assert there.storage is not None
    assert (there.storage.kind, there.advice) == ("NVMe", ())


def test_boards_in_json(tmp_path: Path) -> None:
    document = look(tmp_path, PI_5, commands=PI_5_ANSWERS).to_dict()
    assert document["raspberry_pi"]["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert document["memory"]["swap_spaces"][0]["compressed"] is True
    assert {"flag": "asimddp", "name": "dot product", "purpose": "int8, int4", "present": True} in document[
        "processor"
    ]["features"]
    assert (document["jetson"], document["storage"]) == (None, None)
    assert look(tmp_path / "pc", PC).to_dict()["raspberry_pi"] is None


def test_programs_of_32_bits_on_a_kernel_of_64(tmp_path: Path) -> None:
    (advice,) = look(tmp_path, PI_5, commands={**PI_5_ANSWERS, "getconf LONG_BIT": "32\n"}).advice
    assert (advice.purpose, advice.optional) == ("running bundles", False)
    assert "programs have 32 bits here (the kernel is aarch64)" in advice.reason
