"""With how many threads a bundle runs: what is free, what building it measured, what was asked for."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blt_edge.export import threads
from blt_edge.export.build_ort import build_engine
from blt_edge.export.threads import candidates, measure_threads
from blt_edge.runtime import BltModel, BltWarning, devices, model
from support.quantized import BLOCKY
from support.random_models import export_random_model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = export_random_model(BLOCKY, tmp_path_factory.mktemp("blocky"))
    build_engine(bundle)
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def record(bundle: Path) -> dict[str, Any]:
    (path,) = (bundle / "engines").glob("*/engine.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_record(bundle: Path, value: object) -> None:
    (path,) = (bundle / "engines").glob("*/engine.json")
    path.write_text(json.dumps({**record(bundle), "threads": value}))


@pytest.mark.parametrize(
    ("value", "used"),
    [
        ({"best": 2, "cores": 8}, 2),
        ({"best": 8, "cores": 8}, 6),  # all of them were best: so are all that are free
        (None, 1),  # not measured, and small
        ({"best": True, "cores": 8}, 1),
        ({"best": -1, "cores": 8}, 1),
        ({"best": 10**9, "cores": 8}, 1),
        ("many", 1),
    ],
)
def test_the_default_is_what_was_measured_and_is_free(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, value: object, used: int
) -> None:
    write_record(bundle, value)
    monkeypatch.setattr(devices, "free_cores", lambda: 6)
    found = BltModel.load(bundle).engine
    assert (found.threads, found.reason) == (used, None)
    monkeypatch.setattr(devices, "free_cores", lambda: 1)
    assert BltModel.load(bundle).engine.threads == 1


def test_a_large_model_takes_all_that_is_free(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_cores", lambda: 3)
    assert BltModel.load(bundle, portable=True).engine.threads == 1
    monkeypatch.setattr(devices, "_ONE_THREAD", 1000)
    assert BltModel.load(bundle, portable=True).engine.threads == 3


def test_more_threads_than_cores_are_warned_of(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "usable_cores", lambda: 2)
    with pytest.warns(BltWarning, match=r"threads: 3 are more than the 2 cores .* give at most 2, or leave"):
        assert BltModel.load(bundle, threads=3).engine.threads == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BltModel.load(bundle, threads=2)


def other_load(cores: float | None) -> Any:
    """In the place of `OtherLoad`: so many processors are used by others."""
    return lambda: nullcontext(SimpleNamespace(cores=cores))


class Clock:
    """Models whose turns take as long as `seconds` says for their threads."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.now, self.seconds = 0.0, seconds
        self.asked: list[tuple[int, int]] = []

    def load(self, path: Path, device: str, *, threads: int, **_: Any) -> Any:
        count = threads

        def generate(prompt: bytes, options: Any) -> None:
            self.asked.append((len(prompt), options.max_new_bytes))
            self.now += self.seconds[count] * options.max_new_bytes

        return SimpleNamespace(generate=generate, limits=SimpleNamespace(max_positions=500))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int | None, Clock]]:
    def measure(seconds: dict[int, float], others: float | None = 0.0) -> tuple[int | None, Clock]:
        clock = Clock(seconds)
        monkeypatch.setattr(threads, "BltModel", clock)
        monkeypatch.setattr(threads, "OtherLoad", other_load(others))
        axes = {"bytes": SimpleNamespace(max=500)}
        monkeypatch.setattr(threads, "load_manifest", lambda _: SimpleNamespace(axes=axes))
        monkeypatch.setattr(threads, "usable_cores", lambda: max(seconds))
        monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
        return measure_threads(Path("bundle")), clock

    return measure


def test_what_is_tried() -> None:
    assert [candidates(cores) for cores in (1, 2, 3, 6, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 0.93}, 1),
        ({1: 1.0, 2: 0.5, 4: 0.49}, 2),
        ({1: 1.0, 2: 0.5, 4: 0.2, 6: 0.3}, 4),
        ({1: 1.0, 2: 0.5, 4: 0.25}, 4),
        ({1: 1.0}, None),
    ],
)
def test_the_fewest_of_the_fastest(measured, seconds: dict[int, float], best: int | None) -> None:
    assert measured(seconds)[0] == best


def test_quick_models_take_longer_turns(measured) -> None:
    assert measured({1: 0.001, 2: 0.002})[1].asked[-1] == (128, 128)
    assert measured({1: 1.0, 2: 2.0})[1].asked[-1] == (16, 16)


@pytest.mark.parametrize("others", [None, 0.5, 3.0])
def test_a_busy_machine_tells_nothing(measured, others: float | None) -> None:
    assert measured({1: 1.0, 2: 0.5}, others)[0] is None


def test_a_model_of_few_positions_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(BLOCKY, config={**BLOCKY.config, **{
        part: {**BLOCKY.config[part], "max_position_embeddings": 24}
        for part in ("patcher_config", "encoder_config", "decoder_config")}})  # fmt: skip
    bundle = export_random_model(few, tmp_path)
    monkeypatch.setattr(threads, "OtherLoad", other_load(0.0))
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    assert build_engine(bundle).threads in (1, 2)


def test_building_keeps_what_it_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "OtherLoad", other_load(0.0))
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr("blt_edge.export.build_ort.usable_cores", lambda: 2)
    best = build_engine(bundle, force=True).threads
    assert record(bundle)["threads"] == {"best": best, "cores": 2}
    assert best in (1, 2)
    assert BltModel.load(bundle, verify=True).engine.reason is None
