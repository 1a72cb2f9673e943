"""Warnings: each one when there is a reason, and only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.tools.doctor.jetson import read_jetson
from blt_edge.tools.profile import warnings as module
from blt_edge.tools.profile.bandwidth import Bandwidth
from blt_edge.tools.profile.warnings import case_doubts, doubts
from support.machines import ORIN, system
from support.profiles import make_case, make_profile, make_round


@pytest.fixture(autouse=True)
def few_bytes_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW_BYTES", 3)
    monkeypatch.setattr(module, "available_cores", lambda: 2)


def lines(case=None, **options) -> list[str]:
    return doubts(make_profile(case or make_case(), **options))


def test_nothing_to_doubt() -> None:
    assert lines() == []


def test_a_jetson_that_is_held_back(tmp_path: Path) -> None:
    profile = replace(make_profile(), jetson=read_jetson(system(tmp_path, ORIN)))
    mode, clocks = doubts(profile)
    assert mode.startswith("the power mode is 25W, which limits clocks and cores")
    assert clocks.startswith("clocks move with the load (GPU 306 to 918 MHz")


def test_rounds_that_differ() -> None:
    case = make_case(make_round(slower=1.0), make_round(slower=1.2))
    (line,) = lines(case)
    assert line.startswith("decode differs by 18% between rounds (0.8 to 1.0 bytes/s)")
    assert lines(make_case(make_round(slower=1.0), make_round(slower=1.05))) == []


def test_prefill_that_differs() -> None:
    (line,) = lines(make_case(make_round(), make_round(prefill_seconds=1.15, decode_seconds=2.05)))
    assert line.startswith("prefill differs by 14% between rounds")


def test_a_busy_machine() -> None:
    assert lines(make_case(other_load=0.1)) == lines(make_case(other_load=None)) == []
    (line,) = lines(make_case(other_load=0.75))
    assert line.startswith("other programs kept 0.8 cores busy")


def test_a_slow_first_run() -> None:
    assert lines(make_case(first_run=1.2)) == []
    (line,) = lines(make_case(first_run=3.0))
    assert line.startswith("the first run took 3.0 times as long")
    assert "counts here" not in line
    assert "counts here" in lines(make_case(first_run=3.0), warmup=0)[0]


def test_more_threads_than_cores() -> None:
    (line,) = lines(make_case(threads=3))
    assert line.startswith("3 threads are more than the 2 cores")


def test_beyond_the_trained_context() -> None:
    (line,) = lines(make_case(make_round(prompt_bytes=1021)))
    assert line.startswith("1025 positions are more than the 1024 the model was trained on")
    assert lines(make_case(make_round(prompt_bytes=1020))) == []


def test_a_text_that_ended_early() -> None:
    (line,) = lines(new_bytes=10)
    assert line == "the model ended the text after 3 of 10 bytes"


def test_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW_BYTES", 4)
    assert lines() == ["3 new bytes are few: patches and percentiles are left to chance"]


def test_a_short_text_is_repeated() -> None:
    (line,) = lines(prompt_bytes=(4, 1001))
    assert line.startswith("the text has 1000 bytes and is repeated to make prompts of 1001")


def test_weights_in_the_caches() -> None:
    (line,) = lines(make_case(bandwidth=Bandwidth(1e9, 2, 1 << 28, 32 << 20, 6)))
    assert line.startswith("all weights (21.9 MB) fit the processor's caches (34 MB)")


def test_faster_than_the_ceiling() -> None:
    case = make_case()
    case = replace(case, cost=replace(case.cost, bandwidth=1e6))
    (line,) = lines(case)
    assert line.startswith("decoding was faster than the ceiling")


def test_float16_weights_may_be_widened() -> None:
    profile = make_profile()
    stages = {name: replace(spec, precision="fp16") for name, spec in profile.manifest.stages.items()}
    (line,) = doubts(replace(profile, manifest=replace(profile.manifest, stages=stages)))
    assert line.startswith("patcher, encoder, latent, decoder: fp16 weights count as two bytes each")


def test_peaks_that_include_earlier_ones() -> None:
    profile = make_profile(make_case(), make_case(threads=1))
    assert doubts(profile) == []
    (line,) = doubts(replace(profile, peaks_reset=False))
    assert line.startswith("this kernel can't reset peak memory")


def test_of_several_cases_the_worst_is_told() -> None:
    cases = (make_case(other_load=0.5), make_case(other_load=0.9, threads=1), make_case(other_load=0.0))
    profile = make_profile(*cases)
    assert doubts(profile) == [
        "1 thread, 4 prompt bytes, draft none (and 1 more like it): other programs kept 0.9 cores busy; "
        "measure again on a quiet machine"
    ]
    assert list(case_doubts(cases[2], profile)) == []
