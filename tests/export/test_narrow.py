"""Engines whose caches are in 8 bits: close to float32 ones whatever a text does, and all or nothing."""

from __future__ import annotations

import errno
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.calibration.caches import scales_of
from blt_edge.export import build_ort as building
from blt_edge.export import narrow
from blt_edge.export.build_ort import build_engine
from blt_edge.export.proof import WrongEngineError
from blt_edge.runtime import BackendError, BltModel, GenerationOptions, OptionError, engines
from blt_edge.runtime.files import WriteError
from blt_edge.runtime.manifest import load_manifest
from blt_edge.runtime.narrow_cache import SCALES_NAME, NarrowCache
from blt_edge.runtime.sequence import Sequence
from blt_edge.runtime.vocabulary import encode
from support.ort_versions import attends_in_8_bits
from support.random_models import RandomModel, base_config, export_random_model

pytestmark = attends_in_8_bits
TEXT = "Once upon a time, in a café far away. ".encode() * 5
IDS = encode(TEXT)
# Of the logits' scale: random weights make little of their input, texts more.
APART = 0.03


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose engine has float32 caches."""
    config = base_config(
        width=64,
        local_attention_window_len=24,
        patcher={"hidden_size": 64, "sliding_window": 16, "num_key_value_heads": 2},
        decoder={"num_key_value_heads": 2},
        global_stack={"hidden_size": 128, "num_key_value_heads": 1},
    )
    bundle = export_random_model(RandomModel("narrow", config, share=0.3), tmp_path_factory.mktemp("whole"))
    build_engine(bundle, rows=(2,))
    return bundle


@pytest.fixture(scope="module")
def built(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with caches in 8 bits."""
    bundle = Path(shutil.copytree(whole, tmp_path_factory.mktemp("narrow") / "bundle"))
    assert build_engine(bundle, rows=(2,), caches="int8").caches == "int8"
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def load(bundle: Path, **options: Any) -> BltModel:
    return BltModel.load(bundle, "cpu", 1, **{"prefill_chunk": 64, **options})


def read(model: BltModel, sizes: tuple[int, ...]) -> tuple[np.ndarray, list[int]]:
    """Logits [N, V] of the text, read in passes of these sizes in turn, and where its patches begin."""
    sequence, found, done = model.sequence(), [], 0
    while done < len(IDS):
        size = sizes[len(found) % len(sizes)]
        for chunk in sequence.extend(IDS[done : done + size]):
            found.append(np.array(chunk.logits))
        done += size
    return np.concatenate(found), list(sequence.boundaries.starts)


def step(sequence: Sequence, place: int) -> np.ndarray:
    """Logits after one more id of the text."""
    return np.array(sequence.append(IDS[place : place + 1])[-1].logits)


def files_of(bundle: Path) -> set[str]:
    (engine,) = (bundle / "engines").iterdir()
    return {path.name for path in engine.iterdir()}


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("sizes", [(1,), (5, 1, 1), (64, 1, 1, 20, 40, 3)])
def test_logits_are_close_to_those_of_float32_caches(
    whole: Path, built: Path, sizes: tuple[int, ...]
) -> None:
    model = load(built)
    assert str(model.engine).endswith(" with int8 caches")
    (found, starts), (wanted, others) = read(model, sizes), read(load(whole), sizes)
    # An entropy may be next to the threshold, and where a patch begins elsewhere all else differs.
    alike = min({*starts} ^ {*others}, default=len(IDS))
    assert alike > 20
    assert 0 < apart(found[: alike - 1], wanted[: alike - 1]) < APART


def test_a_prompt_read_in_chunks_is_read_in_float32(whole: Path, built: Path) -> None:
    end = len(IDS) // 64 * 64  # of the patcher, which has no fewer positions in a chunk than there are bytes
    found, wanted = (load(one).entropies(TEXT)[:end] for one in (built, whole))
    assert np.array_equal(found, wanted)


def test_a_text_takes_less_memory_once_it_goes_on(whole: Path, built: Path) -> None:
    sizes = []
    for bundle in (whole, built):
        sequence = load(bundle).sequence()
        sequence.append(IDS[:-1])
        sequence.append(IDS[-1:])
        sizes.append(sum(cache.bytes for cache in sequence.state.caches.values()))
    assert 4 * sizes[1] == sizes[0]


def test_taking_bytes_back_gives_the_same_again(built: Path) -> None:
    sequence = load(built).sequence()
    sequence.append(IDS[:100])
    first = [step(sequence, place) for place in range(100, 120)]
    sequence.roll_back(20)
    again = [step(sequence, place) for place in range(100, 120)]
    assert np.array_equal(first, again)


def test_forks_do_not_see_each_other(built: Path) -> None:
    model = load(built)
    sequence = model.sequence()
    sequence.append(IDS[:90])
    sequence.append(IDS[90:91])
    forks = [sequence.fork(), sequence.fork(), sequence.fork(packed=True).fork()]
    for number, fork in enumerate(forks):
        fork.append(IDS[number : number + 2])
    for fork in (sequence, forks[0]):
        assert fork.length in (91, 93)
    alone = model.sequence()
    alone.append(IDS[:90])
    alone.append(IDS[90:91])
    assert np.array_equal(step(sequence, 91), step(alone, 91))


def test_a_saved_state_goes_on_with_the_same_numbers(built: Path, whole: Path, tmp_path: Path) -> None:
    model = load(built)
    sequence = model.sequence()
    sequence.append(IDS[:90])
    sequence.append(IDS[90:92])
    sequence.save(tmp_path / "state")
    restored = model.restore(tmp_path / "state")
    wanted = step(sequence, 92)
    # What lies in other slots is summed in another order.
    assert apart(step(restored, 92), wanted) < 1e-5
    # The file is of the bundle, not of an engine: one of float32 caches takes it, and the other way round.
    other = load(whole).restore(tmp_path / "state")
    assert apart(step(other, 92), wanted) < APART
    other.save(tmp_path / "other")
    assert model.restore(tmp_path / "other").length == 93


@pytest.mark.parametrize("draft", ["none", "decoder", "patcher", "lookup"])
def test_drafts_are_checked_over_the_same_caches(built: Path, draft: str) -> None:
    model = load(built, rollback=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(TEXT[:40], GenerationOptions(max_new_bytes=20, draft=draft))
    assert 0 < len(result.data) <= 20


def test_texts_share_passes(built: Path) -> None:
    model = load(built)
    assert model._backends["decoder"].rows == (2,)
    options = GenerationOptions(max_new_bytes=12, draft="none")
    prompts = [TEXT[:70], TEXT[5:20]]
    alone = [model.generate(prompt, options).data for prompt in prompts]
    together = [one.data for one in model.generate_many(prompts, options)]
    assert together == alone


# Building.


def test_what_is_added_is_recorded_and_goes_again(bundle: Path, whole: Path) -> None:
    manifest = load_manifest(bundle)
    added = engines.cache_files(manifest.stages, (2,), "int8")
    assert files_of(bundle) - files_of(whole) == added
    assert engines.find_engine(bundle, manifest, full=True).caches == "int8"
    # Nothing said: they stay, with other rows too.
    assert build_engine(bundle, rows=(2, 3)).caches == "int8"
    assert files_of(bundle) >= engines.cache_files(manifest.stages, (2, 3), "int8")
    assert engines.find_engine(bundle, manifest, full=True).rows == (2, 3)
    assert build_engine(bundle, rows=(2,)).rows == (2,)
    assert build_engine(bundle, rows=(2,), caches="float32").caches == "float32"
    assert files_of(bundle) == files_of(whole)
    assert np.array_equal(read(load(bundle), (1,))[0], read(load(whole), (1,))[0])


def test_building_again_keeps_what_caches_are(bundle: Path) -> None:
    assert build_engine(bundle, rows=(), force=True).caches == "int8"
    assert load(bundle).engine.caches == "int8"


@pytest.mark.parametrize(
    "name", [SCALES_NAME, "patcher.int8.onnx", "self_test.int8.bin", "latent.int8.rows2.onnx"]
)
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


def test_other_scales_fail_the_self_test(bundle: Path) -> None:
    (engine,) = (bundle / "engines").iterdir()
    path = engine / SCALES_NAME
    path.write_bytes((np.frombuffer(path.read_bytes(), "<f4") * np.float32(3)).tobytes())
    description = engine / engines.ENGINE_NAME
    record = building.file_record(path)
    text = engines.with_caches(
        engine,
        "int8",
        {
            name: building.file_record(engine / name)
            for name in engines.cache_files(load_manifest(bundle).stages, (2,), "int8")
        },
    )
    description.write_text(text)
    assert record.bytes == path.stat().st_size
    assert "its self-test failed" in str(load(bundle).engine.reason)


def test_caches_of_another_making_are_float32(bundle: Path) -> None:
    (engine,) = (bundle / "engines").iterdir()
    description = engine / engines.ENGINE_NAME
    description.write_text(description.read_text().replace('"caches": "int8"', '"caches": "int3"'))
    assert engines.caches_of(engine) == "float32"
    assert load(bundle).engine.directory is None  # it has files that no such engine has


def test_what_is_wrong_is_not_kept(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(whole, tmp_path / "bundle"))
    rewrite = narrow.narrow_caches
    monkeypatch.setattr(narrow, "narrow_caches", lambda model, scales, name: rewrite(model, 2 * scales, name))
    with pytest.raises(WrongEngineError, match=r"with int8 caches made is wrong: .*; nothing was kept"):
        build_engine(bundle, rows=(2,), caches="int8")
    assert files_of(bundle) == files_of(whole)
    assert load(bundle).engine.caches == "float32"


def test_a_full_disk_leaves_the_engine_as_it_was(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    bundle = Path(shutil.copytree(whole, tmp_path / "bundle"))
    monkeypatch.setattr(narrow, "write_scales", full)
    with pytest.raises(WriteError, match=r"the engine cannot be written .*; free some space$"):
        build_engine(bundle, rows=(2,), caches="int8")
    assert files_of(bundle) == files_of(whole)


def test_an_old_version_and_other_words_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"^caches: got 'int3', allowed are float32 and int8$"):
        build_engine(whole, caches="int3")
    monkeypatch.setattr(building, "OLDEST_NARROW", (99, 0))
    with pytest.raises(
        BackendError, match=r"^keeping caches in int8 needs ONNX Runtime 99.0 or newer, .*float32$"
    ):
        build_engine(whole, rows=(2,), caches="int8")


# Scales.


def test_a_pair_of_a_keys_channels_has_the_range_of_both() -> None:
    largest = np.zeros((2, 1, 4), np.float32)
    largest[0, 0] = [3, 0, 4, 1]
    largest[1, 0] = [127, 0, 12.7, 1.27]
    keys, values = scales_of(largest)
    assert np.allclose(keys[0] * 127, [5, 1, 5, 1])
    # A channel that was always 0 gets a small part of the others' range.
    assert np.allclose(values[0], [1, 0.001, 0.1, 0.01])
    assert (scales_of(np.zeros((2, 1, 4), np.float32)) > 0).all()


def test_scales_are_those_of_texts(built: Path) -> None:
    """No number of a text like those that were read is cut off, and few channels leave bits unused."""
    sequence = load(built).sequence()
    for place in range(len(IDS)):
        sequence.append(IDS[place : place + 1])
    for cache in sequence.state.caches.values():
        assert isinstance(cache, NarrowCache)
        filled = np.abs(cache.buffer.astype(np.int16)[:, :, :, : cache.length - cache.first])
        assert (filled >= 127).mean() < 0.01
        assert np.median(filled.max(axis=3)) > 30
