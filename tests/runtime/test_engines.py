"""Which TensorRT engines of a bundle fit a machine, and why others do not: no TensorRT is needed.

ONNX Runtime's engines are tested with their building, in `tests/export`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime.backends.tensorrt import TensorRtModule
from blt_edge.runtime.backends.tensorrt_profiles import Profiles, plan_file
from blt_edge.runtime.engines import (
    Engine,
    describe_tensorrt,
    engine_path,
    engine_profiles,
    find_tensorrt_engine,
    render_engine,
)
from blt_edge.runtime.errors import BundleError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import Manifest
from blt_edge.runtime.self_test import SELF_TEST_NAME
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import write_bundle

ORIN = TensorRtModule("tensorrt", "10.3.0.26", None)
RTX = TensorRtModule("tensorrt-rtx", "1.7.1.116", None)

Edit = Callable[[dict[str, Any]], object]


def write_engine(
    bundle: Path,
    manifest: Manifest,
    trt: TensorRtModule = ORIN,
    capabilities: tuple[str, ...] = ("8.7",),
    **limits: int,
) -> Path:
    """Engines whose plans are noise."""
    description = describe_tensorrt(manifest, trt, capabilities, Profiles.of(manifest, **limits))
    path = engine_path(bundle, description)
    path.mkdir(parents=True)
    for stage in manifest.stages:
        (path / plan_file(stage)).write_bytes(stage.encode() * 100)
    (path / SELF_TEST_NAME).write_bytes(b"")
    files = {file.name: file_record(file) for file in path.iterdir()}
    (path / "engine.json").write_text(render_engine(description, files))
    return path


def change(path: Path, edit: Edit) -> None:
    payload = json.loads((path / "engine.json").read_text())
    edit(payload["description"])
    (path / "engine.json").write_text(json.dumps(payload))


def find(
    bundle: Path, manifest: Manifest, trt: TensorRtModule = ORIN, capability: str = "8.7", **options: Any
) -> Engine:
    return find_tensorrt_engine(bundle, manifest, trt, capability, **options)


def refused(bundle: Path, manifest: Manifest, reason: str, **options: Any) -> None:
    engine = find(bundle, manifest, **options)
    assert (engine.name, engine.directory) == ("portable graphs", None)
    assert reason in str(engine.reason)
    assert str(engine.reason).isprintable()
    assert f"blt-edge build {bundle} --target " in str(engine.reason)


def test_engines_that_fit_are_found(bundle: Path, manifest: Manifest) -> None:
    refused(bundle, manifest, "TensorRT has no engines here; ")
    path = write_engine(bundle, manifest, max_patches=100)
    engine = find(bundle, manifest, full=True)
    assert engine == Engine(f"engines/{path.name}", None, path)
    assert engine_profiles(engine, manifest).limits.max_patches == 100
    refused(bundle, manifest, "TensorRT-RTX has no engines here; ", trt=RTX)
    several = write_engine(bundle, manifest, RTX, ("8.9", "8.6"))
    assert find(bundle, manifest, RTX, "8.6").directory == several
    assert find(bundle, manifest, RTX, "8.9").directory == several
    assert find(bundle, manifest).directory == path


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"trt": replace(ORIN, version="10.16.0")},
            "was built by TensorRT '10.3.0.26', here it is '10.16.0'",
        ),
        ({"capability": "11.0"}, "was built for compute capability 8.7, here it is 11.0"),
        ({"prefill_chunk": 256}, "was built for a prefill_chunk of up to 128, here it is 256"),
        ({"rollback": 65, "prefill_chunk": 128}, "was built for a rollback of up to 64, here it is 65"),
    ],
)
def test_engines_for_something_else(
    bundle: Path, manifest: Manifest, options: dict[str, Any], reason: str
) -> None:
    write_engine(bundle, manifest, prefill_chunk=128)
    assert find(bundle, manifest, prefill_chunk=100).directory is not None
    refused(bundle, manifest, reason, **options)


@pytest.mark.parametrize("part", ["file", "data", "precision"])
def test_engines_for_other_graphs(bundle: Path, manifest: Manifest, part: str) -> None:
    write_engine(bundle, manifest)
    spec = manifest.stages["latent"]
    if part == "precision":
        other = replace(manifest, stages={**manifest.stages, "latent": replace(spec, precision="fp16")})
    else:
        name = getattr(spec, part)
        changed = replace(manifest.files[name], sha256="0" * 64)
        other = manifest.with_files({**manifest.files, name: changed})
    refused(bundle, other, "was built for other graphs")


def test_of_several_those_for_the_longest_texts(bundle: Path, manifest: Manifest) -> None:
    long = write_engine(bundle, manifest, max_bytes=500, max_patches=100)
    write_engine(bundle, manifest, max_bytes=80)
    longer = write_engine(bundle, manifest, max_bytes=500, max_patches=200)
    assert find(bundle, manifest).directory == longer
    (longer / "latent.plan").write_bytes(b"x")
    assert find(bundle, manifest).directory == long
    refused(bundle, manifest, f"{longer.name} was built for compute capability", capability="8.9")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("latent.plan", None, "latent.plan is missing"),
        ("latent.plan", b"x" * 600, "latent.plan was changed after it was"),
        ("latent.plan", b"x", "latent.plan is truncated"),
        ("engine.json", None, "has a damaged engine.json"),
        ("engine.json", b"[" * 100_000, "has a damaged engine.json"),
        ("engine.json", b'{"description":' * 600 + b"{}" + b"}" * 600, "has a damaged engine.json"),
        ("engine.json", b"[]", "has a damaged engine.json"),
        ("engine.json", b"{}", "has a damaged engine.json"),
    ],
)
def test_damaged_engines(
    bundle: Path, manifest: Manifest, file: str, content: bytes | None, reason: str
) -> None:
    damaged = write_engine(bundle, manifest) / file
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    refused(bundle, manifest, reason)


@pytest.mark.parametrize("files", [{"latent.plan": {}}, [], {}])
def test_damaged_records(bundle: Path, manifest: Manifest, files: object) -> None:
    path = write_engine(bundle, manifest) / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    refused(bundle, manifest, "its engine.json is damaged")


def test_engines_of_an_earlier_version(bundle: Path, manifest: Manifest) -> None:
    """Sound by themselves, at their right path, and of another meaning."""
    path = write_engine(bundle, manifest)
    change(path, lambda told: told.update(blt_edge_form=1))
    path.rename(engine_path(bundle, json.loads((path / "engine.json").read_text())["description"]))
    refused(bundle, manifest, "was built by another version of blt-edge; blt-edge build ")
    newer = write_engine(bundle, manifest, max_patches=100)
    assert find(bundle, manifest).directory == newer


DAMAGED = "has a damaged engine.json"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda told: told["profiles"]["limits"].update(max_patches=100), "profiles of another version"),
        (lambda told: told["profiles"]["limits"].update(max_patches=-1), "its profiles are damaged"),
        (lambda told: told["profiles"]["limits"].update(max_bytes=10**9), "its profiles are damaged"),
        (lambda told: told["profiles"]["limits"].update(extra=1), "its profiles are damaged"),
        (lambda told: told["profiles"].pop("limits"), "its profiles are damaged"),
        (lambda told: told.update(profiles=[]), "its profiles are damaged"),
        (lambda told: told["profiles"]["stages"].pop("latent"), "profiles of another version"),
        (lambda told: told.update(compute_capabilities="8.7"), DAMAGED),
        (lambda told: told.update(compute_capabilities=[8.7]), DAMAGED),
        (lambda told: told.update(compute_capabilities=["\x1b[2J"]), DAMAGED),
        (lambda told: told.update(target="onnxruntime"), DAMAGED),
        (lambda told: told.update(version="\x1b[2J" * 1000), "was built by TensorRT '\\x1b[2J"),
        (lambda told: told.pop("blt_edge_form"), "was built by another version of blt-edge"),
        (lambda told: told.update(more=1), DAMAGED),
    ],
)
def test_a_changed_description(bundle: Path, manifest: Manifest, edit: Edit, reason: str) -> None:
    change(write_engine(bundle, manifest), edit)
    refused(bundle, manifest, reason)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("blt_edge_form", "version", "target", "compute_capabilities", "stages", "profiles", "options")


@given(st.sampled_from(KEYS), JSON)
def test_no_description_makes_it_raise(key: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "b")
        manifest = write_bundle(bundle)
        change(write_engine(bundle, manifest), lambda told: told.update({key: value}))
        assert find(bundle, manifest).directory is None


def test_links_and_strangers_are_passed_over(bundle: Path, manifest: Manifest) -> None:
    path = write_engine(bundle, manifest)
    shutil.move(path, bundle / "elsewhere")
    path.symlink_to(bundle / "elsewhere")
    (bundle / "engines" / "tensorrt-file").write_text("x")
    (bundle / "engines" / ".tensorrt-0123.partial-1-0123abcd").mkdir()
    assert find(bundle, manifest).directory is None


def test_damaged_profiles_are_refused_when_they_are_read(bundle: Path, manifest: Manifest) -> None:
    path = write_engine(bundle, manifest)
    (path / "engine.json").write_text("{}")
    with pytest.raises(BundleError, match="its profiles are damaged"):
        engine_profiles(Engine("x", None, path), manifest)
