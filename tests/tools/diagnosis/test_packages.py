"""Versions by metadata, and what an extra lacks."""

from __future__ import annotations

from blt_edge.tools.doctor.packages import installed, missing_by_extra, versions

REQUIREMENTS = [
    "numpy>=1.24",
    'onnxruntime>=1.20; extra == "cpu"',
    'onnxruntime-gpu>=1.20; extra == "gpu"',
    "onnx>=1.18 ; extra == 'export'",
    'safetensors>=0.5; extra == "export"',
    'blt-edge[cpu,export]; extra == "optimum"',
    'optimum[onnx]>=2.0; extra == "optimum"',
    'onnxruntime-genai>=0.18; python_version >= "3.11" and extra == "bench"',
]


def test_missing_by_extra() -> None:
    here = {"onnxruntime-gpu": "1.31.0", "onnx": "1.17.0", "safetensors": "0.10.1", "optimum": "2.1.0.dev1"}
    assert missing_by_extra(here.get, REQUIREMENTS) == {
        "cpu": [],
        "gpu": [],
        "export": ["onnx>=1.18, here is 1.17.0"],
        "optimum": [],
    }
    assert missing_by_extra(lambda name: None, REQUIREMENTS) == {
        "cpu": ["onnxruntime"],
        "gpu": ["onnxruntime-gpu"],
        "export": ["onnx", "safetensors"],
        "optimum": ["optimum"],
    }


def test_our_own_requirements_are_understood() -> None:
    found = missing_by_extra(lambda name: None)
    assert found["cpu"] == ["onnxruntime"]
    assert {"onnx", "onnx-ir", "onnxscript", "safetensors"} <= set(found["export"])
    assert {"torch", "transformers"} <= set(found["validate"])


def test_versions_show_what_matters() -> None:
    here = {"blt-edge": "1", "onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0", "torch": "2.13.0+cpu"}
    shown = versions(here.get)
    assert list(shown) == ["python", "blt-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "torch"]
    assert shown["numpy"] is None
    assert versions(lambda name: None)["onnxruntime"] is None


def test_metadata_is_asked() -> None:
    assert installed("numpy")
    assert installed("no-such-package-of-ours") is None
