"""The GPU backends on a simulated GPU, against transformers: residency, caches, staging, graphs."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export import export_checkpoint
from blt_edge.runtime import BackendError, BltError, BltModel, GenerationOptions, PromptTooLongError
from blt_edge.runtime.backends import ort_gpu
from blt_edge.runtime.backends.base import HOST, CacheLimits
from blt_edge.runtime.backends.gpu import DeviceArray, DeviceRingCache, Gpu, Packed
from blt_edge.runtime.backends.ort_gpu import PROVIDERS
from blt_edge.runtime.backends.tensorrt_profiles import Profiles
from blt_edge.runtime.backends.tensorrt_stage import TensorRtStage
from blt_edge.runtime.cache import RingCache
from blt_edge.runtime.manifest import StageSpec, load_manifest
from blt_edge.runtime.vocabulary import encode
from hypothesis import given
from hypothesis import strategies as st
from support.model_store import RandomModels
from support.parity_cases import CASES, RULE_CASES
from support.random_models import PARITY_TEXT, RandomModel
from support.simulated_gpu import SimulatedDriver, SimulatedTensorRt, simulate, write_engines, write_plan

KINDS = ("tensorrt", "tensorrt-rtx", *PROVIDERS)


Loader = Callable[..., tuple[BltModel, SimulatedDriver]]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Loader]:
    """A copy of a bundle loaded on a simulated GPU, on the device that `kind` stands for."""
    drivers: list[SimulatedDriver] = []

    def load(
        kind: str, bundle: Path, *, limits: Any = None, **options: Any
    ) -> tuple[BltModel, SimulatedDriver]:
        driver = simulate(monkeypatch, kind)
        drivers.append(driver)
        own = Path(shutil.copytree(bundle, tmp_path / "on-gpu"))
        if kind not in PROVIDERS:
            write_engines(own, kind, **(limits or {}))
        return BltModel.load(own, kind, **options), driver

    yield load
    assert [driver.broken for driver in drivers] == [[] for _ in drivers]


def encoder_engine(
    bundle: Path, plan: Path, content: bytes | str = "encoder", **limits: int
) -> TensorRtStage:
    """The encoder as the engine in `plan`: of the stage that `content` names, or these bytes."""
    manifest, driver = load_manifest(bundle), SimulatedDriver()
    ranges = Profiles.of(manifest, **limits)
    if isinstance(content, bytes):
        plan.write_bytes(content)
    else:
        write_plan(plan, bundle, content, ranges)
    trt = SimulatedTensorRt(driver).as_module("tensorrt")
    return TensorRtStage(Gpu(driver), trt, manifest, "encoder", plan, ranges, bundle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], RULE_CASES[0]], ids=lambda case: case.name)
def test_it_computes_what_transformers_computes(
    kind: str,
    case: RandomModel,
    on_gpu: Loader,
    random_models: RandomModels,
    tmp_path: Path,
) -> None:
    bundle = export_checkpoint(random_models.folder(case), tmp_path / "bundle")
    model, driver = on_gpu(kind, bundle, prefill_chunk=96)
    text = PARITY_TEXT[:700]
    wanted = random_models.reference(case).logits(PARITY_TEXT)[: 1 + len(text)]
    found = model.logits(text)
    assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    trace = model.trace(text)
    reference = random_models.reference(case).trace(PARITY_TEXT)
    states = reference.byte_states[: 1 + len(text)]
    assert np.abs(trace["byte_states"] - states).max() <= 1e-4 * np.abs(states).max()
    sample = random_models.greedy(case, 64)
    for draft in ("none", "auto", "lookup", "decoder"):
        result = model.generate(sample.prompt, GenerationOptions(max_new_bytes=64, draft=draft))
        assert result.data == sample.data[:64], draft
        assert set(result.stats.stage_seconds) == set(model.manifest.stages)
        assert all(result.stats.stage_seconds.values())
    if kind == "tensorrt":
        assert driver.launches > 100, "steps should be captured graphs"
    del model, result, trace
    gc.collect()
    assert driver.allocated == 0, "device memory must go with the model"


def test_only_what_the_host_reads_is_waited_for(tiny_bundle: Path, on_gpu: Loader) -> None:
    model, driver = on_gpu("tensorrt", tiny_bundle)
    sequence = model.sequence()
    sequence.append(np.array([1, *range(70, 130)], np.int64))
    before = driver.synchronized
    for byte in b"some more bytes, one by one":
        sequence.append(np.array([byte + 4], np.int64))
    # The patcher's entropy and the decoder's logits; nothing between encoder, latent stage and decoder.
    assert driver.synchronized - before == 2 * len(b"some more bytes, one by one")


def test_rolling_back_and_reading_on(tiny_bundle: Path, on_gpu: Loader) -> None:
    model, _ = on_gpu("tensorrt", tiny_bundle, prefill_chunk=7, rollback=20)
    wanted = BltModel.load(tiny_bundle, threads=1).logits(bytes(range(200)))
    sequence = model.sequence()
    ids = np.array([1, *(byte + 4 for byte in range(200))], np.int64)
    sequence.append(ids[:150])
    for count in (1, 5, 20, 90):
        sequence.roll_back(count)
        sequence.append(ids[150 - count : 150])
        assert np.allclose(sequence.logits, wanted[149], atol=1e-4)
    sequence.append(ids[150:])
    assert np.allclose(sequence.logits, wanted[200], atol=1e-4)


def test_results_outlive_their_sequence(tiny_bundle: Path, on_gpu: Loader) -> None:
    model, _ = on_gpu("tensorrt", tiny_bundle)
    rows = model.sequence().append(np.array([1, 80, 81], np.int64))[0].logits
    kept = rows.copy()
    gc.collect()
    model.logits(b"other text, other buffers")
    assert np.array_equal(rows, kept)


def test_shapes_outside_the_profiles_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    stage = encoder_engine(tiny_bundle, tmp_path / "encoder.plan", prefill_chunk=32)
    cache = stage.new_cache(CacheLimits(4, 64, 64))
    width = load_manifest(tiny_bundle).model.width
    with pytest.raises(BackendError, match=r"bytes is 40, .* built for 1 to 32.*--prefill-chunk 40"):
        stage.bind({"byte_embeds": (1, 40, width), "positions": (1, 40)}, cache, {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ftrt\0\0\0", r"encoder.plan: TensorRT 10.3.0 refused it: magic number"),
        ("decoder", r"encoder.plan: input 'byte_embeds' is absent"),
    ],
)
def test_what_is_no_plan_or_another_stages_is_refused(
    tiny_bundle: Path, tmp_path: Path, content: bytes | str, reason: str
) -> None:
    with pytest.raises(BltError, match=reason):
        encoder_engine(tiny_bundle, tmp_path / "encoder.plan", content)


def test_no_memory_left_is_said(tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"4000 bytes of device memory: .*out of memory; free some"):
        Gpu(SimulatedDriver(most=1000)).zeros((1000,))


@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=25),
    window=st.sampled_from([None, 1, 4, 9]),
)
def test_a_ring_on_the_device_is_a_ring(steps: list[tuple[int, int]], window: int | None) -> None:
    spec = StageSpec("g", "g.data", "fp32", 2, 3, 5, window, 400, 0)
    gpu = Gpu(SimulatedDriver())
    device = DeviceRingCache(gpu, spec, CacheLimits(6, 400, 9))
    capacity = {"first_capacity": device.capacity, "growth": 2.0}
    host = RingCache(2, 3, 5, window=window, rollback=6, limit=400, **capacity)
    random = np.random.default_rng(3)
    for count, back in steps:
        new = random.standard_normal((4, 1, 3, count, 5)).astype(np.float32)
        held = gpu.zeros(new.shape)
        held[:] = new
        for cache, values in ((device, held), (host, new)):
            cache.reserve(count)
            cache.advance({"new_kv": values}, count)
            length = cache.length - min(back, cache.length)
            if cache.can_roll_back(length):
                cache.roll_back(length)
        assert device.length == host.length
        assert np.array_equal(device.positions, host.positions)
        seen = host.positions[0] >= 0
        assert np.array_equal(np.array(device.buffer)[:, :, :, seen], host.buffer[:, :, :, seen])


@given(st.data())
def test_device_arrays_slice_and_copy_as_numpy_does(data: st.DataObject) -> None:
    gpu = Gpu(SimulatedDriver())
    plain, held = HOST.zeros((4, 5, 3)), gpu.zeros((4, 5, 3))
    for number in range(6):
        first = data.draw(st.integers(0, 3))
        start = data.draw(st.integers(0, 5))
        stop = data.draw(st.integers(start, 5))
        key: Any = data.draw(st.sampled_from([first, (first, slice(start, stop)), slice(first, None)]))
        value = np.full(plain[key].shape, number, np.float32)
        plain[key], held[key] = value, value
        value[...] = -1  # the source may change at once
        other = data.draw(st.integers(0, 3))
        plain[other], held[other] = plain[first].copy(), held[first].copy()
    assert np.array_equal(np.array(held), plain)
    assert np.array_equal(np.array(held[1:3]), plain[1:3])
    assert [len(part) for part in held] == [5] * 4
    assert held.nbytes == plain.nbytes


def test_packed_arrays_move_in_one_copy() -> None:
    gpu = Gpu(SimulatedDriver())
    packed = Packed(gpu, {"a": ((2, 3), np.int64), "b": ((), np.float32), "c": ((0, 4), np.float32)})
    packed.host["a"][...] = np.arange(6).reshape(2, 3)
    packed.host["b"][...] = 7
    packed.upload()
    gpu.synchronize()
    device = DeviceArray(gpu, packed.device["a"], (2, 3), np.int64, packed)
    assert np.array_equal(np.array(device), np.arange(6).reshape(2, 3))
    assert packed.device["b"] % 256 == packed.device["a"] % 256
    assert packed.host["c"].shape == (0, 4)


def test_what_was_dropped_is_freed_when_memory_runs_out() -> None:
    driver = SimulatedDriver(most=1000)
    gpu = Gpu(driver)
    for _ in range(5):
        assert np.array_equal(np.array(gpu.zeros((200,))), np.zeros(200))
        gpu.zeros((150,))  # dropped at once, while its clearing is queued
    assert driver.broken == []


def test_memory_dropped_during_a_capture_is_freed_after_it() -> None:
    driver = SimulatedDriver()
    gpu = Gpu(driver)
    held, own = [gpu.zeros((10,))], gpu.zeros((10,))
    gpu.synchronize()
    graph = driver.capture(lambda: (driver.clear(own.address, own.nbytes), held.clear())[0])
    assert driver.broken == []
    driver.launch(graph)
    gpu.synchronize()
    assert driver.allocated == own.nbytes


def test_other_threads_wait_while_a_graph_is_captured(tiny_bundle: Path, on_gpu: Loader) -> None:
    model, driver = on_gpu("tensorrt", tiny_bundle)
    capture = driver.capture
    begun = threading.Event()

    def slowly(work: Callable[[], None]) -> Any:
        def waiting() -> None:
            work()
            begun.set()
            time.sleep(0.02)  # the other threads get as far as they can

        return capture(waiting)

    driver.capture = slowly  # type: ignore[method-assign]
    text = bytes(range(60, 100))
    wanted = BltModel.load(tiny_bundle, threads=1).logits(text)

    def read(cuts: int) -> np.ndarray:
        sequence, rows = model.sequence(), []
        ids = np.array([1, *(byte + 4 for byte in text)], np.int64)
        for first in range(0, len(ids), cuts):
            rows.append(sequence.append(ids[first : first + cuts])[0].logits.copy())
        return np.concatenate(rows)

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(read, (1, 2, 3)):
            assert np.allclose(found, wanted, atol=1e-4)
    assert begun.is_set()
    assert driver.broken == []


def test_what_cannot_be_captured_runs_as_before(tiny_bundle: Path, on_gpu: Loader) -> None:
    model, driver = on_gpu("tensorrt", tiny_bundle)
    driver.refuses_capture = True
    text = b"the same text, byte by byte"
    wanted = BltModel.load(tiny_bundle, threads=1).logits(text)
    sequence = model.sequence()
    rows = [sequence.append(np.array([value], np.int64))[0].logits.copy() for value in encode(text)]
    assert np.allclose(np.concatenate(rows), wanted, atol=1e-4)
    assert driver.launches == 0
    gpu: Any = model._backends["encoder"].memory
    assert gpu.captured == 0
    assert "cudaStreamEndCapture" in gpu.refusal


def test_engines_for_few_patches_take_that_many(tiny_bundle: Path, on_gpu: Loader) -> None:
    model, _ = on_gpu("tensorrt", tiny_bundle, limits={"max_bytes": 300, "max_patches": 11})
    wanted = BltModel.load(tiny_bundle, threads=1)
    text = bytes(range(97, 123)) * 12
    lengths = wanted.patch_lengths(text)
    fits = sum(lengths[:11]) - 1  # the patch that is open at the end needs no slot
    assert np.allclose(model.logits(text[:fits])[-1], wanted.logits(text[:fits])[-1], atol=1e-4)
    sequence = model.sequence()
    with pytest.raises(BackendError, match=r"past is 1\d+, .* built for 1 to 11; .*--max-patches 1\d"):
        sequence.append(encode(text[: sum(lengths[:14])]))
    with pytest.raises(BackendError, match=r"failed half-way; begin a new sequence"):
        sequence.append(encode(b"")[:1])
    with pytest.raises(PromptTooLongError, match=r"its engines were built for 300; .*--max-bytes 312"):
        model.logits(text[:311])


def test_a_sequence_whose_engine_failed_is_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BltModel.load(tiny_bundle, threads=1)
    sequence = model.sequence()
    sequence.append(encode(b"some text"))
    kept = sequence.logits.copy()

    def fail(*arguments: Any) -> None:
        raise BackendError("CUDA: out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(sequence._decoder, "run", fail)
        with pytest.raises(BackendError, match="out of luck"):
            sequence.append(encode(b"more")[1:])
    with pytest.raises(BackendError, match="begin a new sequence"):
        sequence.append(encode(b"more")[1:])
    fresh = model.sequence()
    fresh.append(encode(b"some text"))
    assert np.array_equal(fresh.logits, kept)


def test_graphs_of_onnxruntime_come_back_with_their_addresses_and_end(
    tiny_bundle: Path, on_gpu: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = on_gpu("cuda", tiny_bundle)
    stage: Any = model._backends["decoder"]
    monkeypatch.setattr(ort_gpu, "_MOST_GRAPHS", len(stage._graph_ids) + 2)

    def graph(count: int, address: int) -> int:
        return stage._graph_id({"positions": (1, count)}, {"positions": address})

    first, second = graph(1, 256), graph(2, 256)
    assert first != second
    assert (graph(1, 256), graph(2, 256)) == (first, second)
    assert graph(1, 512) == graph(33, 256) == -1, "no more than the most, and none for prefill"
