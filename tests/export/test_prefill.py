"""Engines that read chunks in products of integers: close to the others, and all or nothing."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blt_edge.export import prefill
from blt_edge.export.build_ort import build_engine
from blt_edge.export.proof import WrongEngineError
from blt_edge.export.quantize import quantize_bundle
from blt_edge.runtime import (
    BackendError,
    BltModel,
    BundleError,
    GenerationOptions,
    OptionError,
    engines,
    full_disk,
)
from blt_edge.runtime.files import WriteError
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.names import CHUNK_POSITIONS
from blt_edge.runtime.options import LONGEST_DRAFT
from blt_edge.runtime.vocabulary import encode
from support.ort_versions import attends_in_8_bits
from support.quantized import BLOCKY
from support.random_models import RandomModel, base_config, export_random_model

TEXT = "Once upon a time, in a café far away. ".encode() * 9
IDS = encode(TEXT)
SOME = ("latent", "decoder")
APART = 0.05


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in blocks whose engine reads chunks as all else. Patches are short: a chunk closes many."""
    config = base_config(
        width=64,
        local_attention_window_len=48,
        patcher={"hidden_size": 64, "intermediate_size": 96, "sliding_window": 40},
        encoder={"intermediate_size": 64},
        decoder={"intermediate_size": 96, "num_key_value_heads": 2},
        global_stack={"hidden_size": 128, "intermediate_size": 96},
    )
    folder = tmp_path_factory.mktemp("plain")
    portable = export_random_model(RandomModel("prefill", config, share=0.5), folder)
    quantize_bundle(portable, folder / "int4", precision="int4")
    build_engine(folder / "int4", rows=(2,))
    return folder / "int4"


@pytest.fixture(scope="module")
def built(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, whose latent stage and decoder read chunks in int8."""
    bundle = Path(shutil.copytree(plain, tmp_path_factory.mktemp("built") / "bundle"))
    assert build_engine(bundle, rows=(2,), int8_prefill=SOME).int8_prefill == SOME
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def load(bundle: Path, **options: Any) -> BltModel:
    return BltModel.load(bundle, "cpu", 1, **{"prefill_chunk": 100, **options})


def read(model: BltModel, size: int) -> np.ndarray:
    """Logits [N, V] of the text, read in passes of this size."""
    sequence = model.sequence()
    passes = (IDS[start : start + size] for start in range(0, len(IDS), size))
    return np.concatenate([np.array(chunk.logits) for part in passes for chunk in sequence.extend(part)])


def files_of(bundle: Path) -> set[str]:
    (engine,) = (bundle / "engines").iterdir()
    return {path.name for path in engine.iterdir()}


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_chunks_are_close_to_what_blocks_give(plain: Path, built: Path) -> None:
    model = load(built)
    assert str(model.engine).endswith(", int8 prefill of latent and decoder")
    passes: list[tuple[str, int]] = []
    model.observer = lambda stage, began, seconds, count: passes.append((stage, count))
    assert len(model.patch_lengths(TEXT)) > 100
    found, wanted = read(model, 100), read(load(plain), 100)
    assert 0 < apart(found, wanted) < APART
    assert max(count for stage, count in passes if stage == "latent") >= CHUNK_POSITIONS
    # The patcher has no such graph, so patches are the same ones.
    assert np.array_equal(model.entropies(TEXT), load(plain).entropies(TEXT))


def test_steps_and_short_passes_are_as_they_were(plain: Path, built: Path) -> None:
    for size in (1, 16, LONGEST_DRAFT + 1):
        assert np.array_equal(read(load(built), size), read(load(plain), size))
    assert not np.array_equal(read(load(built), CHUNK_POSITIONS), read(load(plain), CHUNK_POSITIONS))


def test_a_text_goes_on_after_a_chunk_and_reads_chunks_again(plain: Path, built: Path) -> None:
    found = []
    for bundle in (built, plain):
        sequence = load(bundle).sequence()
        for start, end in ((0, 100), (100, 101), (101, 104), (104, 180), (180, 181)):
            logits = sequence.append(IDS[start:end])[-1].logits[-1].copy()
        sequence.roll_back(1)
        again = sequence.append(IDS[180:181])[-1].logits[-1]
        assert np.array_equal(again, logits)
        found.append(logits)
    assert 0 < apart(*found) < APART


def test_states_move_between_engines(plain: Path, built: Path, tmp_path: Path) -> None:
    sequence = load(built).sequence()
    sequence.append(IDS[:150])
    fork = sequence.fork()
    sequence.save(tmp_path / "state")
    restored = load(plain).restore(tmp_path / "state")
    ours, theirs, forked = (each.append(IDS[150:151])[-1].logits[-1] for each in (sequence, restored, fork))
    # What lies in other slots is summed in another order.
    assert apart(theirs, ours) < 1e-5
    assert np.array_equal(ours, forked)


def test_texts_that_share_passes_read_chunks_alone(built: Path) -> None:
    model = load(built)
    assert model._backends["decoder"].packed_positions == CHUNK_POSITIONS - 1
    assert model._backends["patcher"].packed_positions is None
    options = GenerationOptions(max_new_bytes=12, draft="none")
    prompts = [TEXT[:170], TEXT[5:20]]
    alone = [model.generate(prompt, options).data for prompt in prompts]
    assert [one.data for one in model.generate_many(prompts, options)] == alone


@attends_in_8_bits
def test_caches_in_8_bits_stand_beside_it(bundle: Path) -> None:
    engine = build_engine(bundle, rows=(2,), caches="int8")
    assert (engine.caches, engine.int8_prefill) == ("int8", SOME)
    assert str(load(bundle).engine).endswith(" with int8 caches, int8 prefill of latent and decoder")
    assert apart(read(load(bundle), 100), read(load(bundle, prefill_chunk=33), 33)) < 2 * APART
    assert build_engine(bundle, rows=(2,), int8_prefill=()).caches == "int8"


# Building.


def test_what_is_added_is_recorded_and_goes_again(bundle: Path, plain: Path) -> None:
    manifest = load_manifest(bundle)
    assert files_of(bundle) - files_of(plain) == engines.prefill_files(SOME)
    assert engines.find_engine(bundle, manifest, full=True).int8_prefill == SOME
    # Nothing said: they stay, with other rows too.
    assert build_engine(bundle, rows=()).int8_prefill == SOME
    assert build_engine(bundle, rows=(2,)).int8_prefill == SOME
    assert build_engine(bundle, rows=(2,), int8_prefill=("decoder",)).int8_prefill == ("decoder",)
    assert files_of(bundle) - files_of(plain) == engines.prefill_files(["decoder"])
    assert build_engine(bundle, rows=(2,), int8_prefill=("all",)).int8_prefill == tuple(manifest.stages)
    assert engines.find_engine(bundle, manifest, full=True).reason is None
    assert build_engine(bundle, rows=(2,), int8_prefill=()).int8_prefill == ()
    assert files_of(bundle) == files_of(plain)
    assert np.array_equal(read(load(bundle), 100), read(load(plain), 100))


def test_building_again_keeps_what_reads_chunks(bundle: Path) -> None:
    assert build_engine(bundle, rows=(), force=True).int8_prefill == SOME
    assert load(bundle).engine.int8_prefill == SOME


@pytest.mark.parametrize("name", ["latent.prefill.onnx", "decoder.prefill.onnx.data"])
def test_a_missing_or_damaged_file_is_told(bundle: Path, name: str) -> None:
    (engine,) = (bundle / "engines").iterdir()
    data = (engine / name).read_bytes()
    for damaged in (None, data[:-4]):
        (engine / name).unlink(missing_ok=True)
        if damaged is not None:
            (engine / name).write_bytes(damaged)
        model = load(bundle)
        assert model.engine.name == "portable graphs"
        assert name in str(model.engine.reason)


@pytest.mark.parametrize("stages", ['"latent"', "[1]", '["latent", "encoder"]', "{}"])
def test_a_description_that_says_otherwise_is_passed_over(bundle: Path, stages: str) -> None:
    (engine,) = (bundle / "engines").iterdir()
    path = engine / engines.ENGINE_NAME
    before, _, rest = path.read_text().partition('"int8_prefill": [')
    path.write_text(f'{before}"int8_prefill": {stages}{rest.partition("]")[2]}')
    model = load(bundle)
    assert model.engine.directory is None
    assert "damaged" in str(model.engine.reason)


def test_what_is_wrong_is_not_kept(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(plain, tmp_path / "bundle"))
    monkeypatch.setattr(prefill, "prefill_bits", lambda: 2)
    with pytest.raises(
        WrongEngineError,
        match=r"with int8 prefill made is wrong: .* from what the engine's own graph gives, .*; nothing was "
        "kept, and the engine's own graphs, which are right, go on",
    ):
        build_engine(bundle, rows=(2,), int8_prefill=SOME)
    assert files_of(bundle) == files_of(plain)
    assert load(bundle).engine.int8_prefill == ()


@pytest.mark.parametrize("off", [-8, -1, 1, 8])
def test_a_window_that_is_off_is_found(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    bundle = Path(shutil.copytree(plain, tmp_path / "bundle"))
    offset = prefill.window_offset()
    if offset is None:
        pytest.skip("this ONNX Runtime's fused attention is not used")
    monkeypatch.setattr(prefill, "window_offset", lambda: offset + off)
    with pytest.raises(WrongEngineError, match=r"^decoder: .* (its window|the engine's own graph gives)"):
        build_engine(bundle, rows=(2,), int8_prefill=("decoder",))


def test_what_a_killed_build_left_is_cleared(bundle: Path) -> None:
    (engine,) = (bundle / "engines").iterdir()
    left = engine.with_name(f".{engine.name}.partial-{2**22 + 1}-0123abcd")
    left.mkdir()
    (left / "latent.prefill.onnx").write_bytes(b"half")
    build_engine(bundle, rows=(2,), int8_prefill=("all",))
    assert not left.exists()
    assert [path.name for path in (bundle / "engines").iterdir()] == [engine.name]


def test_a_damaged_engine_is_made_again_as_it_was(bundle: Path) -> None:
    (engine,) = (bundle / "engines").iterdir()
    (engine / "latent.prefill.onnx.data").write_bytes(b"")
    assert load(bundle).engine.directory is None
    assert build_engine(bundle, rows=(2,)).int8_prefill == SOME
    assert load(bundle).engine.int8_prefill == SOME


def test_too_little_space_is_told_before(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(plain, tmp_path / "bundle"))
    monkeypatch.setattr(full_disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    told = r"the int8 prefill needs \d+ bytes.*, 1000 bytes are free; free some"
    with pytest.raises(WriteError, match=told):
        build_engine(bundle, rows=(2,), int8_prefill=SOME)
    assert files_of(bundle) == files_of(plain)


def test_weights_under_several_names_are_told(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "again").hardlink_to(bundle / "encoder.onnx.data")
    with pytest.raises(BundleError, match=r"encoder.onnx.data is one file under 2 names \(hard links\)"):
        build_engine(bundle, rows=(2,), int8_prefill=("all",))
    assert load(bundle).engine.int8_prefill == SOME


def test_products_that_are_inexact_here_are_not_used(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(plain, tmp_path / "bundle"))
    monkeypatch.setattr(prefill, "multiplies_integers", lambda: False)
    with pytest.raises(
        BackendError, match=r"^int8 prefill: products of integers are inexact in ONNX Runtime"
    ):
        build_engine(bundle, rows=(2,), int8_prefill=SOME)
    assert files_of(bundle) == files_of(plain)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        BackendError("latent.prefill.onnx: ONNX Runtime refused it: failed to write external initializers"),
    ],
)
def test_a_full_disk_leaves_the_engine_as_it_was(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    left = [10**9]

    def full(*_args: object) -> None:
        left[0] = 1000
        raise error

    bundle = Path(shutil.copytree(plain, tmp_path / "bundle"))
    monkeypatch.setattr(full_disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=left[0]))
    monkeypatch.setattr(prefill, "save_for_prefill", full)
    with pytest.raises(WriteError, match=r"the disk is full; the int8 prefill needs .*; free some space$"):
        build_engine(bundle, rows=(2,), int8_prefill=SOME)
    assert files_of(bundle) == files_of(plain)
    assert [path.name for path in (bundle / "engines").iterdir()] == [
        path.name for path in (plain / "engines").iterdir()
    ]


@pytest.mark.parametrize("left", [b"", None])
def test_an_engine_that_fails_on_its_first_chunk_is_passed_over(bundle: Path, left: bytes | None) -> None:
    model = load(bundle)
    (engine,) = (bundle / "engines").iterdir()
    (engine / "latent.prefill.onnx").unlink()
    if left is not None:
        (engine / "latent.prefill.onnx").write_bytes(left)
    with pytest.warns(Warning, match="latent"):
        logits = model.logits(TEXT)
    assert np.isfinite(logits).all()
    assert model.engine.directory is None


@pytest.mark.parametrize(
    ("precision", "stages", "message"),
    [
        ("int4", ("global",), r"^int8 prefill: got 'global', allowed are patcher, encoder, .*, all$"),
        ("int4", ("none",), r"^int8 prefill: got 'none', allowed are patcher, encoder, .*, all$"),
        ("int4", [["latent"]], r"^int8 prefill: got \['latent'\], allowed are patcher, encoder, .*, all$"),
        ("int4", 5, r"^int8 prefill: got 5, allowed are patcher, encoder, .*, all$"),
        (
            "int4,latent=fp32",
            SOME,
            r"^int8 prefill: the latent is fp32, .*; name patcher and encoder and dec",
        ),
        (
            "fp16",
            ("decoder",),
            r"^int8 prefill: the decoder is fp16, .*; quantize the bundle to int4 or int8w",
        ),
        ("fp16", ("all",), r"^int8 prefill: no stage of this bundle has weights in blocks \(int8w, int4\)"),
    ],
)
def test_stages_that_have_no_blocks_are_refused(
    float_bundle: Path, tmp_path: Path, precision: str, stages: Any, message: str
) -> None:
    quantize_bundle(float_bundle, tmp_path / "bundle", precision=precision)
    with pytest.raises(OptionError, match=message):
        build_engine(tmp_path / "bundle", int8_prefill=stages)


@pytest.fixture(scope="module")
def float_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(BLOCKY, tmp_path_factory.mktemp("floats"))
