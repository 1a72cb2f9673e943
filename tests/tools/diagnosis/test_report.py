"""Whole machines: what is reported and advised, with fake files, packages and probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blt_edge.tools.doctor.advice import Advice
from blt_edge.tools.doctor.engines import Answer
from blt_edge.tools.doctor.report import Report, examine
from support.machines import ORIN, PC, PC_WITH_CARD, THOR, system

CPU, CUDA, TRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
NO_TENSORRT = Answer(error="TensorRT is not installed: on a Jetson it comes with JetPack (apt install x)")
RTX = Answer({"version": "1.7", "builds_for": ["8.6"]})
REQUIREMENTS = ['onnx>=1.18; extra == "export"', 'torch>=2.6; extra == "validate"', 'ruff; extra == "dev"']
ALL = {
    "blt-edge": "0.1.0",
    "numpy": "2.0.0",
    "onnxruntime": "1.23.2",
    "cuda-bindings": "12.9.0",
    "onnx": "1.19.0",
    "torch": "2.6.0",
}


def gpu(name: str, capability: str, unified: bool = False) -> Answer:
    device = {
        "name": name,
        "compute_capability": capability,
        "memory_bytes": 12 << 30,
        "unified_memory": unified,
    }
    return Answer({"cuda": "12.6", "devices": [device]})


def ran(*providers: str, right: bool = True, said: str = "") -> Answer:
    return Answer({"registered": list(providers), "ran": list(providers), "right": right}, said=said)


def look(
    tmp_path: Path,
    files: dict[str, str],
    *,
    packages: dict[str, str] | None = None,
    providers: dict[str, Answer] | None = None,
    bundle: Path | None = None,
    commands: dict[str, str] | None = None,
    **answers: Answer,
) -> Report:
    tried = {CPU: ran(CPU)} if providers is None else providers
    replies: dict[tuple[str, ...], Answer] = {
        ("cuda",): answers.get("cuda", Answer(error="CUDA_ERROR_NO_DEVICE")),
        ("providers",): answers.get(
            "list_", Answer({"version": "1.23.2", "providers": sorted(tried, reverse=True)})
        ),
        ("tensorrt", "tensorrt"): answers.get("tensorrt", NO_TENSORRT),
        ("tensorrt", "tensorrt-rtx"): answers.get("rtx", Answer(error="TensorRT-RTX is not installed")),
        **{("provider", name): answer for name, answer in tried.items()},
    }

    def ask(*names: str) -> Answer:
        if names[0] == "bundle":
            return Answer({"stages": {"encoder": "fp32"}, "forms": [], "asked": list(names[1:])})
        return replies[names]

    return examine(
        bundle,
        system=system(tmp_path, files, **(commands or {})),
        lookup=(ALL if packages is None else packages).get,
        requirements=REQUIREMENTS,
        ask=ask,
    )


def commands(report: Report) -> list[str]:
    return [command for piece in report.advice for command in piece.commands]


def test_a_pc_without_a_gpu_lacks_nothing(tmp_path: Path) -> None:
    report = look(tmp_path, PC)
    assert report.cpu_works
    assert report.advice == ()
    assert report.jetson is None
    assert report.to_dict()["gpus"] == []


def test_what_extras_lack_is_advised(tmp_path: Path) -> None:
    packages = {name: version for name, version in ALL.items() if name not in ("onnx", "torch")}
    report = look(tmp_path, PC, packages=packages)
    assert report.advice == (
        Advice(
            "exporting, quantizing and building bundles",
            "missing: onnx",
            ("pip install 'blt-edge[export]'",),
        ),
        Advice(
            "comparing bundles with transformers", "missing: torch", ("pip install 'blt-edge[validate]'",)
        ),
    )


def test_no_onnx_runtime(tmp_path: Path) -> None:
    packages = {name: version for name, version in ALL.items() if name != "onnxruntime"}
    report = look(
        tmp_path, PC, packages=packages, list_=Answer(error="No module named 'onnxruntime'"), providers={}
    )
    assert not report.cpu_works
    assert report.state.cpu.error == "No module named 'onnxruntime'"
    assert report.advice[0].commands == ("pip install 'blt-edge[cpu]'",)
    assert not report.advice[0].optional


def test_an_onnx_runtime_that_crashes(tmp_path: Path) -> None:
    report = look(tmp_path, PC, list_=Answer(error="crashed (SIGILL)"), providers={})
    assert not report.cpu_works
    assert commands(report)[0] == "pip install --force-reinstall onnxruntime"


def test_a_wrong_product_is_no_engine(tmp_path: Path) -> None:
    report = look(tmp_path, PC, providers={CPU: ran(CPU, right=False)})
    assert report.state.cpu.error == "a product of matrices came out wrong"


def test_two_onnx_runtimes(tmp_path: Path) -> None:
    packages = {**ALL, "onnxruntime-gpu": "1.23.2"}
    report = look(tmp_path, PC, packages=packages)
    assert "onnxruntime and onnxruntime-gpu are both installed" in report.advice[0].reason
    assert report.advice[0].commands == (
        "pip uninstall -y onnxruntime onnxruntime-gpu",
        "pip install onnxruntime-gpu",
    )
    assert report.versions["onnxruntime"] == report.versions["onnxruntime-gpu"] == "1.23.2"


def test_a_provider_that_fell_back_is_found_out(tmp_path: Path) -> None:
    packages = {**ALL, "onnxruntime-gpu": "1.23.2"}
    del packages["onnxruntime"]
    fallen = Answer(
        {"registered": [CPU], "ran": [CPU], "right": True},
        said="libcudnn.so.9: cannot open shared object file",
    )
    report = look(
        tmp_path,
        PC_WITH_CARD,
        packages=packages,
        providers={CPU: ran(CPU), CUDA: fallen, TRT: Answer(error="crashed (SIGSEGV)")},
        cuda=gpu("NVIDIA GeForce RTX 3060", "8.6"),
        rtx=RTX,
    )
    assert [engine.provider for engine in report.state.engines][:1] == [CPU]
    cuda = report.state.engine("ONNX Runtime", CUDA)
    assert cuda is not None
    assert not cuda.works
    assert cuda.error == f"ran on {CPU} instead: libcudnn.so.9: cannot open shared object file"
    assert report.cpu_works
    (advice,) = report.advice
    assert advice.purpose == "ONNX Runtime on the GPU"
    assert advice.commands[-1] == "pip install 'blt-edge[gpu]'"


def test_everything_works_on_a_gpu(tmp_path: Path) -> None:
    report = look(
        tmp_path,
        PC_WITH_CARD,
        providers={CPU: ran(CPU), CUDA: ran(CUDA)},
        cuda=gpu("NVIDIA GeForce RTX 3060", "8.6"),
        rtx=RTX,
    )
    assert report.advice == ()
    assert all(engine.works for engine in report.state.engines if engine.name != "TensorRT")


def test_a_broken_driver(tmp_path: Path) -> None:
    report = look(tmp_path, PC_WITH_CARD, cuda=Answer(error="crashed (SIGSEGV)"), rtx=RTX)
    assert report.cpu_works
    assert report.state.gpus == ()
    (advice,) = report.advice
    assert advice.reason == "driver 550.54.14 is loaded, but gives programs no GPU (crashed (SIGSEGV))"


def test_a_card_without_a_driver(tmp_path: Path) -> None:
    files = {name: text for name, text in PC_WITH_CARD.items() if "driver" not in name}
    report = look(tmp_path, files, rtx=RTX)
    assert "there is an NVIDIA card, but its driver is not loaded" in report.advice[0].reason
    assert commands(report) == ["sudo ubuntu-drivers install", "sudo reboot"]


def test_orin_as_it_comes(tmp_path: Path) -> None:
    packages = {name: version for name, version in ALL.items() if name != "cuda-bindings"}
    missing = Answer(error="the package cuda-bindings is not installed")
    report = look(tmp_path, ORIN, packages=packages, cuda=missing)
    assert commands(report) == [
        "pip install 'cuda-bindings>=12.6,<13'",
        "sudo apt-get install python3-libnvinfer",
        "bash tools/jetson/install.sh",
        "sudo nvpmodel -m 2",
        "sudo jetson_clocks",
    ]
    assert report.to_dict()["jetson"]["jetpack"] == "6.2"


def test_orin_set_up(tmp_path: Path) -> None:
    fixed = {name: "918000000" if "gpu" in name else "1344000" for name in ORIN if name.endswith("_freq")}
    report = look(
        tmp_path,
        {**ORIN, **fixed},
        cuda=gpu("Orin", "8.7", unified=True),
        tensorrt=Answer({"version": "10.3.0.30", "builds_for": []}),
        commands={"nvpmodel": "NV Power Mode: MAXN_SUPER\n2\n"},
    )
    assert report.advice == ()


def test_thor_gets_newer_bindings(tmp_path: Path) -> None:
    packages = {name: version for name, version in ALL.items() if name != "cuda-bindings"}
    report = look(tmp_path, THOR, packages=packages, commands={"nvpmodel": "NV Power Mode: MAXN\n0\n"})
    assert commands(report)[0] == "pip install 'cuda-bindings>=13.0,<14'"


def test_a_bundle_is_asked_with_the_gpus_capability(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    report = look(tmp_path, PC_WITH_CARD, cuda=gpu("x", "8.6"), bundle=Path("bundle"))
    assert report.bundle is not None
    assert report.bundle["asked"] == [str(tmp_path / "bundle"), "8.6"]
    assert report.bundle["path"] == "bundle"
    assert report.bundle["error"] is None
