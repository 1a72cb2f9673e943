"""Packed graphs of an engine: there for the asked rows, right, and never in the way of the engine itself."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
from blt_edge.export import packed
from blt_edge.export.build_ort import build_engine
from blt_edge.export.quantize import QuantizationOptions, quantize_bundle
from blt_edge.runtime import BltModel, engines
from blt_edge.runtime.backends.ort_session import session_options
from blt_edge.runtime.files import WriteError
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.names import STAGES
from support.packed_texts import fused_feeds, outputs_of, packed_feeds, run, share_apart
from support.quantized import Session, random_feeds
from support.random_models import RandomModel, base_config, export_random_model

# Heads of 16 in every stage but the encoder, whose attention stays spelled out.
MODEL = RandomModel(
    "some-fused",
    base_config(
        width=64,
        local_attention_window_len=12,
        patcher={"hidden_size": 64, "intermediate_size": 96},
        encoder={"num_attention_heads": 8},
        decoder={"intermediate_size": 96, "num_key_value_heads": 2},
        global_stack={"intermediate_size": 96},
    ),
)
ALL = "patcher=int8w,encoder=fp16,latent=int4,decoder=int8"
COUNTS, HELD = (4, 1, 2), (9, 0, 3)


@pytest.fixture(scope="module", autouse=True)
def unmeasured() -> Iterator[None]:
    """Which threads are fastest is not asked: that takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blt_edge.export.build_ort.measure_threads", lambda *_args: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle and its engine, with packed graphs for 2 and 3 texts."""
    bundle = export_random_model(MODEL, tmp_path_factory.mktemp("float"))
    assert build_engine(bundle, rows=(2, 3)).rows == (2, 3)
    return bundle


@pytest.fixture(scope="module")
def mixed(whole: Path) -> Path:
    """Stages of four precisions, and their engine."""
    options = QuantizationOptions(windows=2)
    bundle = quantize_bundle(whole, whole.parent / "mixed", precision=ALL, quantization=options)
    assert build_engine(bundle, rows=(3,)).rows == (3,)
    return bundle


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def engine_of(bundle: Path) -> Path:
    (engine,) = (bundle / "engines").iterdir()
    return engine


def rows_there(bundle: Path) -> dict[str, set[str]]:
    """Rows -> the stages that have a packed graph for them, by the files there are."""
    found: dict[str, set[str]] = {}
    for path in engine_of(bundle).glob("*.rows*.onnx"):
        stage, rows, _ = path.name.split(".")
        found.setdefault(rows.removeprefix("rows"), set()).add(stage)
    return found


def apart(bundle: Path, stage: str) -> float:
    """How far three texts packed are from each alone, as a share of the scale."""
    engine, precision = engine_of(bundle), load_manifest(bundle).stages[stage].precision
    graphs = []
    for name in (engines.graph_file(stage), engines.packed_graph_file(stage, 3)):
        options = session_options(onnxruntime, precision, 1)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        graphs.append(Session(str(engine / name), options, providers=["CPUExecutionProvider"]))
    alone, together = graphs
    fused = any(value.name == "past_length" for value in alone.get_inputs())
    texts = [
        fused_feeds(alone, count, held=held, capacity=20, seed=held)
        if fused
        else random_feeds(alone, count, slots=held, seed=held)
        for count, held in zip(COUNTS, HELD, strict=True)
    ]
    found = outputs_of(run(together, packed_feeds(texts)), COUNTS)
    return max(
        share_apart(mine[name], values)
        for text, mine in zip(texts, found, strict=True)
        for name, values in run(alone, text).items()
        if not name.startswith("present.")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_texts_packed_give_what_each_gives_alone(whole: Path, mixed: Path, stage: str) -> None:
    assert apart(whole, stage) <= 1e-5
    assert apart(mixed, stage) <= (0.02 if stage == "decoder" else 1e-3)


def test_every_graph_reads_the_weights_that_are_there(whole: Path, mixed: Path) -> None:
    for bundle in (whole, mixed):
        engine = engine_of(bundle)
        for path in engine.glob("*.rows3.onnx"):
            stage = path.name.split(".")[0]
            one, packed_graph = (
                onnx.load(each, load_external_data=False).graph
                for each in (engine / engines.graph_file(stage), path)
            )
            # Prepacked weights are named there, too.
            assert list(one.initializer) == list(packed_graph.initializer)


def test_rows_are_recorded_and_checked(bundle: Path) -> None:
    every = set(STAGES)
    assert rows_there(bundle) == {"2": every, "3": every}
    manifest = load_manifest(bundle)
    assert engines.find_engine(bundle, manifest).rows == (2, 3)
    assert BltModel.load(bundle, "cpu", 1).engine.rows == (2, 3)
    packed_graph = engine_of(bundle) / engines.packed_graph_file("latent", 3)
    content = packed_graph.read_bytes()
    packed_graph.write_bytes(content[:-1] + b"x")
    assert "latent.rows3.onnx was changed" in str(engines.find_engine(bundle, manifest).reason)
    packed_graph.unlink()
    assert "latent.rows3.onnx is missing" in str(engines.find_engine(bundle, manifest).reason)


def test_other_rows_are_added_and_removed_without_building_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blt_edge.export.build_ort._build_stage", None)
    every = set(STAGES)
    times = {path: path.stat().st_mtime_ns for path in engine_of(bundle).glob("*.rows2.onnx")}
    for rows, there in (
        ((2, 4), {"2", "4"}),
        ((2, 4), {"2", "4"}),
        ((2,), {"2"}),
        ((), set()),
        ((5,), {"5"}),
    ):
        assert build_engine(bundle, rows=rows).rows == rows
        assert rows_there(bundle) == dict.fromkeys(there, every)
        assert engines.find_engine(bundle, load_manifest(bundle)).rows == rows
        if rows == (2, 4):
            assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_engine_of_before_stays_valid(bundle: Path) -> None:
    assert build_engine(bundle, rows=()).rows == ()
    path = engine_of(bundle) / "engine.json"
    old = json.loads(path.read_text())
    del old["rows"]
    path.write_text(json.dumps(old))
    found = engines.find_engine(bundle, load_manifest(bundle))
    assert (found.directory, found.rows) == (engine_of(bundle), ())
    assert build_engine(bundle, rows=(2,)).rows == (2,)


@pytest.mark.parametrize("rows", [None, 2, [1], [2, 2], [3, 2], [2.0], [True], ["2"], [65], {"2": 3}])
def test_rows_of_another_making_are_none(bundle: Path, rows: object) -> None:
    path = engine_of(bundle) / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": rows}))
    assert engines.rows_of(engine_of(bundle)) == ()
    assert "damaged" in str(engines.find_engine(bundle, load_manifest(bundle)).reason)


# What can't be packed is not, and the engine is as it was.


def swap(model: onnx.ModelProto) -> None:
    """Let the first text read the second's past."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in ("row0.past.0.key", "row1.past.0.key"):
                node.input[place] = "row1.past.0.key"


def widen(model: onnx.ModelProto) -> None:
    """An operator that does not exist."""
    model.graph.node[0].op_type = "Nonesuch"


@pytest.mark.parametrize(
    ("spoil", "reason"), [(swap, r": \w+, 2 texts packed: \w+ at "), (widen, r"rows2\.onnx: .* refused it: ")]
)
@pytest.mark.parametrize("anew", [True, False])
def test_a_wrong_or_refused_graph_is_not_kept(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[onnx.ModelProto], None],
    reason: str,
    anew: bool,
) -> None:
    pack = packed.pack_rows

    def spoiled(model: onnx.ModelProto, rows: int, file: str) -> onnx.ModelProto:
        result = pack(model, rows, file)
        spoil(result)
        return result

    if not anew:
        build_engine(bundle, rows=(3,))
    monkeypatch.setattr(packed, "pack_rows", spoiled)
    lines: list[str] = []
    built = build_engine(bundle, rows=(2,), force=anew, warn=lines.append)
    (line,) = lines
    assert line.startswith("no packed graphs")
    assert re.search(reason, line)
    assert "\n" not in line
    assert built.rows == (() if anew else (3,))
    assert set(rows_there(bundle)) == (set() if anew else {"3"})
    assert engines.find_engine(bundle, load_manifest(bundle)).rows == built.rows


def test_a_full_disk_leaves_the_engine_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed, "_prove", full)
    with pytest.raises(WriteError, match=r"the engine cannot be written .*; free some space$"):
        build_engine(bundle, rows=(2, 3, 4))
    assert set(rows_there(bundle)) == {"2", "3"}
    assert engines.find_engine(bundle, load_manifest(bundle)).rows == (2, 3)
