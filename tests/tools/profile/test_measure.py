"""Options, what a whole profile of a small bundle holds (no times are compared), and each warning."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.tools.doctor.machine import read_jetson
from blt_edge.tools.doctor.raspberry_pi import read_raspberry_pi
from blt_edge.tools.profile import ceiling, measure
from blt_edge.tools.profile.ceiling import measure_bandwidth
from blt_edge.tools.profile.measure import (
    ProfileError,
    ProfileOptions,
    case_warnings,
    profile,
    profile_warnings,
)
from support.machines import ORIN, PI_5, PI_5_ANSWERS, system
from support.profiles import make_bandwidth, make_case, make_profile, make_round

TEXT = b"It was the best of times, it was the worst of times, it was the age of wisdom"


@pytest.mark.parametrize(
    ("options", "text", "line"),
    [
        ({"new_bytes": 1}, TEXT, "new_bytes is 1; .* from 2"),
        ({"warmup": -1}, TEXT, "warmup is -1; .* from 0"),
        ({"repeat": 0}, TEXT, "repeat is 0"),
        ({"prompt_bytes": (4, 0)}, TEXT, "prompt_bytes is 0"),
        ({"threads": (2, 5000)}, TEXT, "threads is 5000; .* from 1 to 1024"),
        ({"threads": ()}, TEXT, "threads: got nothing"),
        ({}, b"", "text: is empty"),
    ],
)
def test_refused_before_anything_is_loaded(tiny_model, options, text: bytes, line: str) -> None:
    with pytest.raises(OptionError, match=line):
        profile(tiny_model.bundle, text, ProfileOptions(**{"new_bytes": 12, **options}))


def test_a_sweep(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_SECONDS", 0.01)
    monkeypatch.setattr(measure, "measure_bandwidth", lambda threads: measure_bandwidth(threads, 1 << 20))
    options = ProfileOptions("auto", (1, 2), (20, 100), drafts=("none", "decoder"), new_bytes=12, repeat=2)
    said: list[str] = []
    measured = profile(tiny_model.bundle, TEXT, options, said.append)
    names = [(case.threads, case.prompt_bytes, case.draft) for case in measured.cases]
    assert names == [(t, p, d) for t in (1, 2) for p in (20, 100) for d in ("none", "decoder")]
    assert [case.first_run is None for case in measured.cases] == 2 * [False, True, True, True]
    assert said[0] == "loading, threads: 1"
    assert said[-1] == "measuring memory bandwidth"
    for case in measured.cases:
        decode = case.decode
        assert case.new_bytes <= 12
        assert sum(decode.shares.values()) == pytest.approx(1)
        assert set(decode.stages) <= set(measured.manifest.stages)
        assert (decode.speculation is None) == (case.draft == "none")
        if case.draft == "none":
            assert decode.stages["decoder"].calls_per_byte == decode.stages["decoder"].rows_per_call == 1
        assert case.ceiling_reached > 0
    assert json.loads(json.dumps(measured.to_dict()))["cases"][0]["threads"] == 1


def test_a_text_that_ends_at_once_is_an_error(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "record", lambda *_: make_round(new_bytes=1))
    with pytest.raises(ProfileError, match="ended the text after 1 bytes"):
        profile(tiny_model.bundle, TEXT, ProfileOptions(prompt_bytes=(4,), new_bytes=4))


# Warnings: each one when there is a reason, and only then.


SLOW_PREFILL = make_round(prefill_seconds=1.15, decode_seconds=2.05)


@pytest.fixture(autouse=True)
def few_bytes_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_FEW_BYTES", 3)
    monkeypatch.setattr(measure, "usable_cores", lambda: 2)


@pytest.mark.parametrize(
    ("case", "options", "line"),
    [
        (make_case(), {}, None),
        (make_case(make_round(), make_round(slower=1.05)), {}, None),
        (make_case(make_round(), make_round(slower=1.2)), {}, "decode differs by 18%"),
        (make_case(make_round(), SLOW_PREFILL), {}, "prefill differs"),
        (make_case(other_load_cores=0.1), {}, None),
        (make_case(other_load_cores=None), {}, None),
        (make_case(other_load_cores=0.75), {}, "0.8 cores busy"),
        (make_case(first_run=1.2), {}, None),
        (make_case(first_run=3.0), {"warmup": 1}, "first run took 3.0 times as long"),
        (make_case(first_run=3.0), {"warmup": 0}, "counts here"),
        (make_case(threads=3), {}, "3 threads are more than the 2 cores"),
        (make_case(make_round(prompt_bytes=1020)), {}, None),
        (make_case(make_round(prompt_bytes=1021)), {}, "1025 positions are more than the 1024"),
        (make_case(), {"new_bytes": 10}, "ended the text after 3 of 10 bytes"),
        (make_case(), {"prompt_bytes": (4, 1001)}, "1000 bytes and is repeated"),
        (make_case(bandwidth=make_bandwidth(32 << 20)), {}, "all weights (21.9 MB) fit the processor"),
        (make_case(ceiling_reached=1.1), {}, "faster than the ceiling (110%)"),
    ],
)
def test_warnings(case, options: dict[str, object], line: str | None) -> None:
    found = profile_warnings(make_profile(case, **options))
    assert len(found) == (line is not None)
    assert all(line in one for one in found)


def test_a_jetson_that_is_held_back(tmp_path: Path) -> None:
    held_back = replace(make_profile(), jetson=read_jetson(system(tmp_path, ORIN)))
    mode, clocks = profile_warnings(held_back)
    assert "mode is 25W" in mode
    assert "clocks move" in clocks


def test_a_raspberry_pi_that_is_held_back(tmp_path: Path) -> None:
    """Also when it is over: the figures were measured meanwhile."""
    answers = {**PI_5_ANSWERS, "vcgencmd get_throttled": "throttled=0x40000"}
    board = read_raspberry_pi(system(tmp_path, PI_5, **answers))
    hot = replace(make_profile(), raspberry_pi=board)
    (warning,) = profile_warnings(hot)
    assert "has been slowed down since the start (throttled)" in warning
    assert hot.to_dict()["machine"]["raspberry_pi"]["throttling"]["since_start"] == ("throttled",)
    assert make_profile().to_dict()["machine"]["raspberry_pi"] is None


def test_float16_weights_may_be_widened() -> None:
    whole = make_profile()
    stages = {name: replace(spec, precision="fp16") for name, spec in whole.manifest.stages.items()}
    (line,) = profile_warnings(replace(whole, manifest=replace(whole.manifest, stages=stages)))
    assert line.startswith("patcher, encoder, latent, decoder: fp16 weights")


def test_peaks_that_include_earlier_ones_and_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    two = make_profile(make_case(), make_case(threads=1))
    assert profile_warnings(two) == []
    assert ["peak memory" in line for line in profile_warnings(replace(two, peaks_reset=False))] == [True]
    monkeypatch.setattr(measure, "_FEW_BYTES", 4)
    assert "3 new bytes are few" in profile_warnings(make_profile())[0]


def test_of_several_cases_the_worst_is_told() -> None:
    loads = {2: 0.5, 1: 0.9, None: 0.0}
    cases = [make_case(threads=threads, other_load_cores=load) for threads, load in loads.items()]
    several = make_profile(*cases)
    (line,) = profile_warnings(several)
    assert re.match(r"1 thread, 4 prompt bytes, draft none \(and 1 more like it\): .* kept 0\.9", line)
    assert list(case_warnings(cases[2], several)) == []
