"""Engines for this device: equal results, whole or not at all, and never a wrong one used."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from blt_edge.export import build_ort as building
from blt_edge.export.build_ort import build_engine, spelled_out
from blt_edge.export.bundle import load_stage
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.graphs.attention import fuse_attention
from blt_edge.runtime import BltError, BltModel, BundleError, GenerationOptions, engines
from blt_edge.runtime.backends import ort_session as backend
from blt_edge.runtime.files import WriteError
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.vocabulary import encode
from support.ort_versions import VERSION, fuses_blocks
from support.quantized import BLOCKY
from support.random_models import RandomModel, base_config, export_random_model

TEXT = "Once upon a time, in a café far away. ".encode() * 3
WINDOWS = QuantizationOptions(windows=2)
ALL = "patcher=int8w,encoder=fp16,latent=int4,decoder=int8"


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(BLOCKY, tmp_path_factory.mktemp("blocky"))


@pytest.fixture(scope="module")
def built(float_bundle: Path) -> Path:
    """A bundle with stages of four precisions, and its engine."""
    bundle = quantize_bundle(float_bundle, float_bundle.parent / "mixed", precision=ALL, quantization=WINDOWS)
    build_engine(bundle)
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def engine_of(bundle: Path) -> Path:
    (engine,) = (bundle / "engines").iterdir()
    return engine


def load(bundle: Path, **options: Any) -> BltModel:
    return BltModel.load(bundle, "cpu", 1, prefill_chunk=16, **options)


def refused(bundle: Path, reason: str, **options: Any) -> None:
    """It runs from the portable graphs, and says why."""
    model = load(bundle, **options)
    assert model.engine.directory is None
    assert model.engine.name == "portable graphs"
    assert reason in str(model.engine.reason)
    assert "\n" not in str(model.engine)
    assert np.isfinite(model.logits(b"abc")).all()


@fuses_blocks
def test_results_are_those_of_the_portable_graphs(built: Path) -> None:
    fast, portable = load(built), load(built, portable=True)
    assert fast.engine.reason is None
    assert fast.engine.directory == engine_of(built)
    assert (portable.engine.directory, portable.engine.reason) == (None, None)
    assert fast.patch_lengths(TEXT) == portable.patch_lengths(TEXT)
    for name, values in portable.trace(TEXT).items():
        # Sums in another order may round an activation to the next integer: rare, and small beside the scale.
        difference = np.abs(fast.trace(TEXT)[name] - values)
        assert difference.mean() < 1e-3 * np.abs(values).max(), name


@pytest.fixture(scope="module", params=["windows", "no-windows"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle whose heads all are wide enough to be fused, and its engine."""
    windowed = request.param == "windows"
    config = base_config(
        width=64,
        local_attention_window_len=24 if windowed else None,
        patcher={"hidden_size": 64, "sliding_window": 16 if windowed else None, "num_key_value_heads": 2},
        decoder={"num_key_value_heads": 2},
        global_stack={"hidden_size": 128, "num_key_value_heads": 1},
    )
    model = RandomModel(request.param, config, share=0.3)
    bundle = export_random_model(model, tmp_path_factory.mktemp(request.param))
    build_engine(bundle)
    return bundle


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_fused_attention_gives_what_the_portable_graphs_give(wide: Path, chunk: int) -> None:
    text = bytes(range(256)) + TEXT * 4
    fast = BltModel.load(wide, threads=1, prefill_chunk=chunk)
    portable = BltModel.load(wide, threads=1, portable=True)
    assert fast.engine.directory is not None
    assert all(spec.fusable for spec in load_manifest(wide).stages.values())
    assert fast.patch_lengths(text) == portable.patch_lengths(text)
    found = fast.trace(text)
    for name, values in portable.trace(text).items():
        scale = max(1.0, float(np.abs(values).max()))
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("draft", ["none", "decoder", "patcher", "lookup", "auto"])
def test_fused_attention_generates_what_the_portable_graphs_do(wide: Path, draft: str) -> None:
    fast, portable = BltModel.load(wide, threads=1), BltModel.load(wide, threads=1, portable=True)
    for temperature in (0.0, 0.8):
        options = GenerationOptions(max_new_bytes=150, temperature=temperature, seed=3, draft=draft)
        plain = portable.generate(TEXT, replace(options, draft="none"))
        assert fast.generate(TEXT, options).data == plain.data


def test_fused_attention_takes_bytes_back(wide: Path) -> None:
    model = BltModel.load(wide, threads=1, rollback=10)
    sequence, ids = model.sequence(), encode(TEXT * 2)
    sequence.append(ids)
    for back in (3, 10, 40):
        sequence.roll_back(back)
        sequence.append(ids[len(ids) - back : len(ids) - back + 1])
        fresh = model.sequence()
        fresh.append(sequence.ids.copy())
        np.testing.assert_allclose(sequence.logits, fresh.logits, rtol=0, atol=1e-4)
        sequence.append(ids[len(ids) - back + 1 :])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda graph: graph.inputs.remove(next(v for v in graph.inputs if v.name == "past_positions")),
        lambda graph: graph.inputs.remove(next(v for v in graph.inputs if v.name == "past.0.key")),
        lambda graph: graph.initializers.pop("decoder.rotary_emb.inv_freq"),
        lambda graph: [setattr(node, "name", "x") for node in graph],
        lambda graph: [setattr(node, "op_type", "Identity") for node in graph if node.op_type == "Reshape"],
        lambda graph: [setattr(node, "op_type", "Neg") for node in graph if node.op_type == "Cos"],
    ],
)
def test_a_graph_of_another_making_is_refused_in_one_line(
    wide: Path, spoil: Callable[[ir.Graph], object]
) -> None:
    spec = load_manifest(wide).stages["decoder"]
    model = load_stage(wide, spec)
    spoil(model.graph)
    with pytest.raises(BltError, match=r"^decoder\.onnx: .*[^\n]$"):
        fuse_attention(model, spec)


@pytest.mark.skipif(VERSION < (1, 31), reason="before ONNX Runtime 1.31 prepacked blocks can't be kept")
def test_weights_are_kept_as_the_kernels_want_them(built: Path) -> None:
    graph = onnx.load(engine_of(built) / "latent.onnx", load_external_data=False).graph
    kept = {tensor.name: {entry.key for entry in tensor.external_data} for tensor in graph.initializer}
    weights = {node.input[1] for node in graph.node if node.op_type == "MatMulNBits"}
    outside = [kept[name] for name in weights if kept[name]]  # the smallest stay inside the graph
    assert len(outside) > len(weights) // 2
    assert all(any(key.startswith("prepacked") for key in keys) for keys in outside)
    assert all(node.op_type != "DequantizeLinear" for node in graph.node)


@pytest.mark.parametrize(
    ("offsets", "aligned"),
    [
        ({"offset": "0"}, True),
        ({"offset": "20864", "prepacked_0": "MatMulNBits+8865|31232;11646;0"}, True),
        ({"offset": "20862"}, False),
        ({"offset": "0", "prepacked_0": "MatMulNBits+8865|31230;11646;0"}, False),
        ({"offset": "0", "prepacked_0": "in another spelling"}, False),
    ],
)
def test_weights_that_lie_where_no_vector_may_are_not_kept(
    tmp_path: Path, offsets: dict[str, str], aligned: bool
) -> None:
    tensor = onnx.TensorProto(name="scales", data_type=onnx.TensorProto.FLOAT, dims=[2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in offsets.items():
        tensor.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph([], "graph", [], [], [tensor])
    (tmp_path / "graph.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    assert building._aligned(tmp_path / "graph.onnx") is aligned


def test_without_prepacked_weights_results_are_the_same(
    built: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_aligned", lambda graph: False)
    build_engine(bundle, force=True)
    assert b"prepacked_0" not in (engine_of(bundle) / "latent.onnx").read_bytes()
    np.testing.assert_allclose(load(bundle).logits(TEXT), load(built).logits(TEXT), rtol=0, atol=1e-5)


def test_attention_is_fused_in_every_layer(built: Path) -> None:
    for stage, spec in load_manifest(built).stages.items():
        graph = onnx.load(engine_of(built) / f"{stage}.onnx", load_external_data=False).graph
        fused = [node.op_type for node in graph.node].count("GroupQueryAttention")
        assert fused == (0 if spec.head_dim % 16 else spec.layers), stage
        assert ("past_positions" in [value.name for value in graph.input]) == (fused == 0)


def test_the_bundle_is_sound_with_an_engine_and_without(bundle: Path) -> None:
    assert load(bundle, verify=True).engine.directory == engine_of(bundle)
    shutil.rmtree(bundle / "engines")
    refused(bundle, "no engine was built for this device; blt-edge build ", verify=True)


def test_a_sound_engine_stays_and_force_replaces_it(bundle: Path) -> None:
    before = engine_of(bundle).stat().st_ino
    assert build_engine(bundle).directory == engine_of(bundle)
    assert engine_of(bundle).stat().st_ino == before
    assert build_engine(bundle, force=True).directory == engine_of(bundle)
    assert engine_of(bundle).stat().st_ino != before
    assert load(bundle).engine.directory == engine_of(bundle)


# What an engine was made for.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"processor": "GenuineIntel 6 1"}, "for processor 'GenuineIntel 6 1', here it is "),
        ({"features": "sse2"}, "for a processor with other instructions"),
        ({"machine": "riscv64"}, "for machine 'riscv64', here it is "),
    ],
)
def test_another_machines_engine_is_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], reason: str
) -> None:
    bundle = Path(shutil.copytree(built, tmp_path / "b", ignore=shutil.ignore_patterns("engines")))
    describe = engines.describe_processor
    with monkeypatch.context() as other:
        other.setattr(engines, "describe_processor", lambda: {**describe(), **change})
        build_engine(bundle)
        assert load(bundle).engine.reason is None
    refused(bundle, reason)
    build_engine(bundle)
    assert load(bundle).engine.reason is None
    assert len(list((bundle / "engines").iterdir())) == 2


def test_another_version_of_the_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = onnxruntime.__version__
    monkeypatch.setattr(onnxruntime, "__version__", "9.9.9")
    refused(bundle, f"was built for ONNX Runtime '{here}', here it is '9.9.9'; blt-edge build {bundle}")


def test_other_options(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = backend.session_entries
    monkeypatch.setattr(
        engines, "session_entries", lambda precision: {**entries(precision), "session.x": "1"}
    )
    refused(bundle, "was built for other graphs or options")


def test_another_bundles_engine_under_the_right_name(
    bundle: Path, float_bundle: Path, tmp_path: Path
) -> None:
    other = quantize_bundle(float_bundle, tmp_path / "other", precision="int8w")
    (other / "engines").mkdir()
    wanted = engines.engine_path(other, engines.describe_engine(load_manifest(other)))
    shutil.copytree(engine_of(bundle), wanted)
    refused(other, "engine.json is damaged")
    assert build_engine(other).reason is None
    assert load(other).engine.reason is None


# Damage.


@pytest.mark.parametrize("name", ["latent.onnx", "decoder.onnx.data"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has extra bytes"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "its sha256 differs"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
    ],
)
def test_a_damaged_file_is_refused(
    bundle: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(engine_of(bundle) / name)
    refused(bundle, reason)
    assert build_engine(bundle).reason is None
    assert load(bundle).engine.reason is None


@pytest.mark.parametrize("text", ["", '{"description": {}, "files": 3}'])
def test_a_damaged_description_is_refused(bundle: Path, text: str) -> None:
    (engine_of(bundle) / "engine.json").write_text(text)
    refused(bundle, "engine.json is damaged; blt-edge build --force")


def test_a_link_is_refused_like_any_in_the_bundle(bundle: Path) -> None:
    path = engine_of(bundle) / "latent.onnx.data"
    path.rename(bundle.parent / "elsewhere")
    path.symlink_to(bundle.parent / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        load(bundle)
    with pytest.raises(BundleError, match="is a link"):
        build_engine(bundle, force=True)


@pytest.mark.parametrize("other", ["encoder.onnx", "engine.json"])
def test_a_graph_of_other_shapes_is_refused(bundle: Path, other: str) -> None:
    engine = engine_of(bundle)
    shutil.copy(engine / other, engine / "latent.onnx")
    path = engine / "engine.json"
    payload = json.loads(path.read_text())
    payload["files"]["latent.onnx"] = vars(file_record(engine / "latent.onnx"))
    path.write_text(json.dumps(payload))
    refused(bundle, "latent.onnx")


# Interruptions.


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, OSError(28, "No space left")])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_build_leaves_what_was_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Any, there: bool
) -> None:
    if not there:
        shutil.rmtree(bundle / "engines")
    before = {path: path.stat().st_ino for path in bundle.rglob("*")}
    save = backend.save_optimized
    made = []

    def interrupted(model: bytes, weights: Path, precision: str, graph: Path) -> None:
        save(model, weights, precision, graph)
        made.append(graph)
        if len(made) == 2:
            raise error

    monkeypatch.setattr(building, "save_optimized", interrupted)
    with pytest.raises(building.WriteError if isinstance(error, OSError) else error):
        build_engine(bundle, force=True)
    assert len(made) == 2
    assert {path: path.stat().st_ino for path in bundle.rglob("*")} == before


def test_too_little_space_is_seen_before(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(bundle / "engines")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(building.WriteError, match="1 bytes are free; free some space"):
        build_engine(bundle)
    assert not (bundle / "engines").exists()


def test_what_a_killed_build_left_is_cleared(bundle: Path) -> None:
    engine = engine_of(bundle)
    left = engine.with_name(f".{engine.name}.partial-999999999-0123abcd")
    left.mkdir()
    (left / "latent.onnx").write_bytes(b"half")
    assert load(bundle).engine.reason is None
    build_engine(bundle, force=True)
    assert not left.exists()


def test_what_is_not_fused_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(bundle)
    assert spelled_out(manifest) == ()
    monkeypatch.setattr(building, "window_offset", lambda: None)
    (line,) = spelled_out(manifest)
    assert line.startswith("attention: the fused operator of ONNX Runtime ")
    stages = {name: replace(spec, precision="int4") for name, spec in manifest.stages.items()}
    monkeypatch.setattr(building, "multiplies_blocks", lambda bits: bits != 4)
    assert [line.partition(":")[0] for line in spelled_out(replace(manifest, stages=stages))] == [
        "attention",
        "products over 4-bit blocks",
    ]


@pytest.mark.parametrize(
    ("blocked", "number", "advice"),
    [
        ("engines", errno.EACCES, "check its permissions"),
        ("engines", errno.ENOSPC, "free some space"),
        ("partial", errno.EACCES, "check its permissions"),
        ("partial", errno.ENOSPC, "free some space"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str, number: int, advice: str
) -> None:
    """Its message once named the place and the advice twice, and advised permissions on a full disk."""
    make = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if blocked in path.name:
            raise OSError(number, os.strerror(number), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    place = tmp_path / "engines" / "one"
    with pytest.raises(WriteError) as caught, building.new_engine(place, 0):
        pass
    text = str(caught.value)
    assert text.count(f"{place.parent}: ") == 1
    assert text.count(advice) == 1
    assert list(tmp_path.iterdir()) == []
