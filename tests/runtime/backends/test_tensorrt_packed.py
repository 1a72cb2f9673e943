"""Several texts in one pass of TensorRT on a simulated GPU: each gets what it gets alone."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, BltWarning
from blt_edge.runtime.backends.base import CacheLimits, PackedPart
from blt_edge.runtime.backends.gpu import Gpu, GpuCall
from blt_edge.runtime.backends.signatures import input_type, new_axis, stage_inputs
from blt_edge.runtime.backends.tensorrt_packed import TensorRtPackedStage
from blt_edge.runtime.backends.tensorrt_profiles import PROFILED_PADDING, Profiles
from blt_edge.runtime.backends.tensorrt_stage import TensorRtStage
from blt_edge.runtime.batch import Batch
from blt_edge.runtime.cache import StageCache
from blt_edge.runtime.errors import BackendError, BltError
from blt_edge.runtime.manifest import Manifest, load_manifest
from blt_edge.runtime.names import STAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import export_random_model
from support.simulated_gpu import SimulatedDriver, SimulatedTensorRt, simulate, write_engines, write_plan
from support.state_walks import LIMITS, WIDE, agree

TEXT = (Path(__file__).parents[2] / "data" / "alice.txt").read_bytes()
ROWS = (2, 4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_random_model(WIDE, tmp_path_factory.mktemp("packed"))


@dataclass
class Stage:
    """A stage on a device, its plan for one text and one for several."""

    name: str
    manifest: Manifest
    driver: SimulatedDriver
    alone: TensorRtStage
    ranges: Profiles
    files: dict[int, Path]

    def packed(self, rows: int) -> TensorRtPackedStage:
        trt = SimulatedTensorRt(self.driver).as_module("tensorrt")
        gpu = self.alone.memory
        return TensorRtPackedStage(gpu, trt, self.manifest, self.name, self.files[rows], rows, self.ranges)


def open_stage(bundle: Path, folder: Path, name: str, most: int | None = None) -> Stage:
    manifest, driver = load_manifest(bundle), SimulatedDriver(most)
    ranges = Profiles.of(manifest, **LIMITS)
    write_plan(folder / "one.plan", bundle, name, ranges)
    files = {rows: folder / f"{rows}.plan" for rows in ROWS}
    for rows, path in files.items():
        write_plan(path, bundle, name, ranges, rows)
    trt = SimulatedTensorRt(driver).as_module("tensorrt")
    plan = folder / "one.plan"
    alone = TensorRtStage(Gpu(driver), trt, manifest, name, plan, ranges, bundle, packed=files)
    return Stage(name, manifest, driver, alone, ranges, files)


@pytest.fixture(scope="module")
def stages(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stage]]:
    found = {name: open_stage(bundle, tmp_path_factory.mktemp(name), name) for name in STAGES}
    yield found
    assert [stage.driver.broken for stage in found.values()] == [[]] * len(STAGES)


class Text:
    """One text's cache in a stage, and the numbers that it reads."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage, self.random = stage, np.random.default_rng(seed)
        spec = stage.manifest.stages[stage.name]
        limits = CacheLimits(LIMITS["rollback"], 300, LIMITS["prefill_chunk"])
        self.cache: StageCache = stage.alone.new_cache(limits)
        self.shared = {}
        if stage.name == "decoder":
            values = stage.alone.memory.zeros((7, spec.patch_values or 0))
            values[:] = self.random.standard_normal(values.shape).astype(np.float32)
            self.shared["patch_values"] = values

    def part(self, count: int, padded: int = 4) -> PackedPart:
        stage, gpu = self.stage, self.stage.alone.memory
        inputs = stage_inputs(stage.manifest, stage.name)
        sizes = {"batch": 1, new_axis(stage.name): count, "patch_length": padded}
        bounds = {"byte_ids": (4, 260), "patch_index": (0, 7), "patch_lengths": (1, padded + 1)}
        given: dict[str, Any] = {}
        for name, axes in inputs.items():
            if name in ("positions", "past_positions", *self.shared) or name.startswith("past."):
                continue
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
            given[name] = self.random.standard_normal(shape).astype(np.float32)
            if input_type(name) is np.int64:
                given[name] = self.random.integers(*bounds[name], shape)
        self.cache.reserve(count)
        shapes = {**{name: each.shape for name, each in given.items()}, "positions": (1, count)}
        call = stage.alone.bind(shapes, self.cache, self.shared)
        call.begin()
        for name, values in given.items():
            if isinstance(call.inputs[name], np.ndarray):
                call.inputs[name][...] = values
            else:
                moved = gpu.zeros(values.shape)
                moved[:] = values
                call.inputs[name][:] = moved
        call.inputs["positions"][0] = self.cache.length + np.arange(count)
        self.cache.prepare(call.inputs, count)
        return PackedPart(call, self.cache, self.shared, count)

    def took(self, part: PackedPart) -> dict[str, np.ndarray]:
        outputs = {name: np.array(each) for name, each in part.call.outputs.items()}
        self.cache.advance(part.call.outputs, part.count)
        return outputs


def alike(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.isfinite(found[name]).all()
        agree(found[name], values)


# 1. What texts get.

COUNTS = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@pytest.mark.parametrize("name", STAGES)
@settings(max_examples=12, deadline=None)
@given(st.lists(COUNTS, min_size=1, max_size=5), st.sampled_from([4, 8]), st.booleans())
def test_ragged_texts_get_what_each_gets_alone(
    stages: dict[str, Stage], name: str, passes: list[list[int]], padded: int, joins: bool
) -> None:
    """Texts of other lengths, who come late (`joins`) or leave, in whatever row they find."""
    stage = stages[name]
    packed = stage.packed(4)
    alone, together = ([Text(stage, seed) for seed in range(5)] for _ in range(2))
    for step, counts in enumerate(passes):
        first = step % 2 if joins else 0
        chosen = range(first, first + len(counts))
        padding = [padded if number % 2 else 4 for number in chosen]
        wanted = []
        for number, count, size in zip(chosen, counts, padding, strict=True):
            part = alone[number].part(count, size)
            part.call.run(lambda seconds: None)
            wanted.append(alone[number].took(part))
        parts = [together[number].part(*each) for number, *each in zip(chosen, counts, padding, strict=True)]
        assert packed.run(parts) > 0
        for number, part, each in zip(chosen, parts, wanted, strict=True):
            alike(together[number].took(part), each)
    packed.release()


def test_a_fork_in_the_midst_goes_its_own_way(stages: dict[str, Stage]) -> None:
    stage = stages["latent"]
    packed, texts = stage.packed(2), [Text(stage, seed) for seed in range(2)]
    parts = [text.part(3) for text in texts]
    packed.run(parts)
    for text, part in zip(texts, parts, strict=True):
        text.took(part)
    texts[1].cache = texts[0].cache.fork()
    parts = [text.part(2) for text in texts]
    packed.run(parts)
    found = [text.took(part) for text, part in zip(texts, parts, strict=True)]
    assert np.abs(found[0]["patch_values"] - found[1]["patch_values"]).max() > 0.01
    again = Text(stage, 0)
    for count, wanted in ((3, None), (2, found[0])):
        part = again.part(count)
        part.call.run(lambda seconds: None)
        each = again.took(part)
        if wanted is not None:
            alike(each, wanted)


def test_only_what_has_changed_is_told_again(stages: dict[str, Stage]) -> None:
    stage = stages["decoder"]
    packed, texts = stage.packed(4), [Text(stage, seed) for seed in range(3)]
    told: list[str] = []
    context = packed._context
    tell = context.set_tensor_address

    def set_tensor_address(name: str, address: int) -> bool:
        told.append(name)
        return bool(tell(name, address))

    context.set_tensor_address = set_tensor_address
    calls = [text.part(1).call for text in texts]
    for step in range(4):
        parts = []
        for text, call in zip(texts, calls, strict=True):
            assert isinstance(call, GpuCall)
            call.inputs["positions"][0] = text.cache.length
            text.cache.prepare(call.inputs, 1)
            parts.append(PackedPart(call, text.cache, text.shared, 1))
        told.clear()
        packed.run(parts[::-1] if step == 2 else parts)
        assert len(told) > 20 if step == 0 else told == ["rows"]
        for text, part in zip(texts, parts, strict=True):
            text.took(part)


# 2. What fails.


def test_a_run_that_fails_leaves_all_as_it_was(stages: dict[str, Stage]) -> None:
    stage = stages["encoder"]
    packed, texts = stage.packed(2), [Text(stage, seed) for seed in range(2)]
    parts = [text.part(2) for text in texts]
    execute = packed._context.execute_async_v3
    packed._context.execute_async_v3 = lambda stream: False
    with pytest.raises(BackendError, match=r"2\.plan: TensorRT 10\.3\.0 could not run it: it gave no reason"):
        packed.run(parts)
    packed._context.execute_async_v3 = execute
    packed.run(parts)
    for seed, (text, part) in enumerate(zip(texts, parts, strict=True)):
        alone = Text(stage, seed)
        wanted = alone.part(2)
        wanted.call.run(lambda seconds: None)
        alike(text.took(part), alone.took(wanted))


def test_what_was_half_told_is_told_again(stages: dict[str, Stage]) -> None:
    stage = stages["decoder"]
    packed, texts = stage.packed(2), [Text(stage, seed) for seed in range(2)]
    packed.run([text.part(1) for text in texts])
    told: list[str] = []
    tell = packed._context.set_tensor_address

    def set_tensor_address(name: str, address: int) -> bool:
        told.append(name)
        return len(told) != 3 and bool(tell(name, address))

    packed._context.set_tensor_address = set_tensor_address
    with pytest.raises(BackendError, match="refused shapes that its profile has"):
        packed.run([text.part(2) for text in texts])
    told.clear()
    packed._context.set_tensor_address = lambda name, address: told.append(name) or tell(name, address)
    packed.run([text.part(2) for text in texts])
    assert set(told) == set(packed._known)


@pytest.mark.parametrize("what", ["sizes", "another stage", "noise", "one text"])
def test_a_plan_of_another_making_is_refused(bundle: Path, tmp_path: Path, what: str) -> None:
    stage = open_stage(bundle, tmp_path, "encoder")
    if what == "sizes":
        plan = json.loads(stage.files[2].read_text())
        plan["profiles"][0]["positions"][2][1] += 1
        stage.files[2].write_text(json.dumps(plan))
    elif what == "noise":
        stage.files[2].write_bytes(b"noise")
    else:
        name, rows = ("decoder", 2) if what == "another stage" else ("encoder", 1)
        write_plan(stage.files[2], bundle, name, stage.ranges, rows)
    errors = {
        "sizes": r"2\.plan: it was built for other sizes; build it again",
        "another stage": r"2\.plan: input .* the manifest asks for",
        "noise": r"2\.plan: TensorRT 10\.3\.0 refused it: magic number mismatch",
        "one text": r"2\.plan: input .* the manifest asks for",
    }
    for _ in range(2):  # the second time without looking at the file again
        with pytest.raises(BltError, match=errors[what]):
            stage.alone.packed(2)
        stage.files[2].unlink(missing_ok=True)
    stage.alone.packed(3)


def test_a_plan_that_computes_something_else_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = open_stage(bundle, tmp_path, "decoder")
    run = TensorRtPackedStage.run

    def swapped(self: TensorRtPackedStage, parts: Sequence[PackedPart]) -> float:
        seconds = run(self, parts)
        parts[0].call.outputs["logits"][0, 0] = parts[-1].call.outputs["logits"][0, 0]
        return seconds

    monkeypatch.setattr(TensorRtPackedStage, "run", swapped)
    command = re.escape(f"; blt-edge build {bundle} --target tensorrt --force makes it again")
    with pytest.raises(BackendError, match=rf"decoder, 4 texts at once: logits at .*{command}"):
        stage.alone.packed(4)


# 3. In a model.

Loader = Callable[..., tuple[BltModel, SimulatedDriver]]


@pytest.fixture
def load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    drivers: list[SimulatedDriver] = []

    def loaded(kind: str, device: str | None = None) -> tuple[BltModel, SimulatedDriver]:
        write_engines(bundle, kind, rows=ROWS, **LIMITS)
        drivers.append(simulate(monkeypatch, kind))
        return BltModel.load(bundle, device or kind, **LIMITS), drivers[-1]

    yield loaded
    for path in (bundle / "engines").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert [driver.broken for driver in drivers] == [[]] * len(drivers)


def passes_of(model: BltModel, prompts: Sequence[bytes], new_bytes: int) -> tuple[list[bytes], list[Any]]:
    """What each prompt is continued with in one batch, and its passes: (stage, texts)."""
    batch, seen, found = model.batch(), [], {}
    batch.observer = lambda stage, texts, seconds: seen.append((stage, texts))

    def work(number: int) -> Callable[[], None]:
        def go() -> None:
            found[number] = model.generate(prompts[number], max_new_bytes=new_bytes).data

        return go

    tasks = [batch.start(work(number)) for number in range(len(prompts))]
    while batch.step():
        pass
    assert [task.error for task in tasks] == [None] * len(prompts)
    return [found[number] for number in range(len(prompts))], seen


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
def test_a_model_packs_texts_of_any_lengths_and_gives_their_memory_back(
    load: Loader, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    model, driver = load(kind)
    assert model.rows == ROWS
    prompts = [TEXT[40 * number : 40 * number + 9 * number + 1] for number in range(6)]
    cpu = BltModel.load(model.path, "cpu", 1, portable=True, **LIMITS)
    wanted = [cpu.generate(prompt, max_new_bytes=20).data for prompt in prompts]
    found, passes = passes_of(model, prompts, 20)
    assert found == wanted
    assert not recwarn.list
    assert {
        stage: max(texts for each, texts in passes if each == stage) for stage in STAGES
    } == dict.fromkeys(STAGES, 4)
    model.generate(prompts[0], max_new_bytes=5)
    del model
    gc.collect()
    assert driver.allocated == 0, "device memory must go with the model"


def test_who_has_more_new_positions_than_a_plan_takes_runs_alone(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load("tensorrt")
    counts: list[tuple[int, ...]] = []
    run = TensorRtPackedStage.run

    def watched(self: TensorRtPackedStage, parts: Sequence[PackedPart]) -> float:
        if self._axis == "patches":
            counts.append(tuple(part.count for part in parts))
        return run(self, parts)

    monkeypatch.setattr(TensorRtPackedStage, "run", watched)
    # Every other byte begins a patch: a chunk of 16 closes more than the 8 that one text may bring.
    _, passes = passes_of(model, [b"a b c d e f g h i j k l m n o p q r" * 4, TEXT[:60], TEXT[90:130]], 30)
    assert model._backends["latent"].packed_positions == 8
    assert model._backends["latent"].padding == PROFILED_PADDING
    assert all(count <= 8 for each in counts for count in each)
    assert counts
    assert any(stage == "latent" and texts == 1 for stage, texts in passes)


def test_an_engine_that_is_lost_in_the_midst_is_replaced_for_all(load: Loader) -> None:
    model, _ = load("tensorrt", "auto")
    assert "tensorrt" in model.engine.name
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(4)]
    cpu = BltModel.load(model.path, "cpu", 1, portable=True, **LIMITS)
    wanted = [cpu.generate(prompt, max_new_bytes=20).data for prompt in prompts]
    decoder = model._backends["decoder"]
    left = [12]
    packed, bind = decoder.packed(4), decoder.bind
    execute = packed._context.execute_async_v3

    def failing(stream: int) -> bool:
        left[0] -= 1
        return bool(left[0] > 0 and execute(stream))

    def bound(*args: Any) -> Any:
        if left[0] <= 0:
            raise BackendError("decoder: the device is lost")
        return bind(*args)

    packed._context.execute_async_v3 = failing
    decoder.bind = bound
    decoder._run = lambda context: (_ for _ in ()).throw(BackendError("decoder: the device is lost"))
    with pytest.warns(BltWarning) as warned:
        found, _ = passes_of(model, prompts, 20)
    assert found == wanted
    told = [str(each.message) for each in warned]
    assert any("decoder: a pass over several texts failed" in line for line in told)
    assert any("the portable graphs go on in its place" in line for line in told)


def test_a_plan_that_cannot_be_loaded_leaves_texts_to_go_on_one_by_one(load: Loader) -> None:
    model, _ = load("tensorrt")
    assert model.engine.directory is not None
    for path in model.engine.directory.glob("latent.rows*.plan"):
        path.write_bytes(b"out of memory")
    prompts = [TEXT[30 * number : 30 * number + 20] for number in range(4)]
    wanted = [model.generate(prompt, max_new_bytes=12).data for prompt in prompts]
    with pytest.warns(BltWarning, match="latent: a pass over several texts failed") as warned:
        found, passes = passes_of(model, prompts, 12)
    assert found == wanted
    assert len(warned) == 1
    assert max(texts for stage, texts in passes if stage == "decoder") == 4
    assert isinstance(model.batch(), Batch)
