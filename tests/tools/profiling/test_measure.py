"""Options, and what a whole profile of a small bundle holds. No times are compared."""

from __future__ import annotations

import json

import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.tools.profile.bandwidth import measure_bandwidth
from blt_edge.tools.profile.measure import ProfileError, ProfileOptions, profile
from blt_edge.tools.profile.recorder import record_round
from support.profiles import make_case

TEXT = b"It was the best of times, it was the worst of times, it was the age of wisdom"


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from blt_edge.tools.profile import bandwidth, measure

    monkeypatch.setattr(bandwidth, "_SECONDS", 0.01)
    monkeypatch.setattr(measure, "measure_bandwidth", lambda threads: measure_bandwidth(threads, 1 << 20))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"new_bytes": 1}, "new_bytes: got 1, a whole number from 2"),
        ({"warmup": -1}, "warmup: got -1, a whole number from 0"),
        ({"repeat": 0}, "repeat: got 0, a whole number from 1"),
        ({"prompt_bytes": (4, 0)}, "prompt_bytes: got 0, a whole number from 1"),
        ({"threads": (2, 5000)}, "threads: got 5000, a whole number from 1 to 1024"),
        ({"threads": ()}, "threads: got nothing; give at least one value"),
    ],
)
def test_options_out_of_range(options: dict[str, object], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        ProfileOptions(**options)


@pytest.mark.parametrize(
    ("options", "text", "line"),
    [
        ({"prompt_bytes": (490,)}, TEXT, "prompt_bytes: got 490, with 12 new bytes .* has positions for 487"),
        ({"drafts": ("none", "oracle")}, TEXT, "draft is 'oracle'"),
        ({"draft_length": 0}, TEXT, "draft_length"),
        ({}, b"", "text: is empty"),
    ],
)
def test_refused_before_anything_is_loaded(tiny_model, options, text: bytes, line: str) -> None:
    with pytest.raises(OptionError, match=line):
        profile(tiny_model.bundle, text, ProfileOptions(**{"new_bytes": 12, **options}))


def test_a_sweep(tiny_model) -> None:
    options = ProfileOptions(
        threads=(1, 2), prompt_bytes=(20, 100), drafts=("none", "decoder"), new_bytes=12, repeat=2
    )
    said: list[str] = []
    measured = profile(tiny_model.bundle, TEXT, options, said.append)
    names = [(case.threads, case.figures.prompt_bytes, case.draft) for case in measured.cases]
    assert names == [(t, p, d) for t in (1, 2) for p in (20, 100) for d in ("none", "decoder")]
    assert said[0] == "loading, threads: 1"
    assert said[-1] == "measuring memory bandwidth"
    for case in measured.cases:
        figures = case.figures
        assert figures.new_bytes <= 12
        assert sum(figures.decode_shares.values()) == pytest.approx(1)
        assert set(figures.stages) <= set(measured.manifest.stages)
        assert (figures.speculation is None) == (case.draft == "none")
        if case.draft == "none":
            assert figures.stages["decoder"].calls_per_byte == 1
            assert figures.stages["decoder"].rows_per_call == 1
        assert case.ceiling_reached > 0
    assert json.loads(json.dumps(measured.to_dict()))["cases"][0]["threads"] == 1


def test_a_round_is_what_the_model_generates(tiny_model) -> None:
    from blt_edge.runtime import BltModel, GenerationOptions

    model = BltModel.load(tiny_model.bundle, threads=1)
    options = GenerationOptions(max_new_bytes=10, draft="none")
    one = record_round(model, TEXT, options)
    assert model.observer is None
    assert sum(arrival.count for arrival in one.arrivals) == one.stats.new_bytes
    assert len([event for event in one.decode_events if event.stage == "decoder"]) == one.decode_steps
    assert sum(event.rows for event in one.prefill_events if event.stage == "decoder") == len(TEXT) + 1
    assert len(list(one.byte_latencies())) == one.decode_steps
    runs = {name: sum(event.stage == name for event in one.events) for name in one.stats.stage_calls}
    assert runs == one.stats.stage_calls


def test_a_text_that_ends_at_once_is_an_error(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    from blt_edge.tools.profile import measure
    from support.profiles import make_round

    monkeypatch.setattr(measure, "record_round", lambda *_: make_round(new_bytes=1))
    with pytest.raises(ProfileError, match="ended the text after 1 bytes"):
        profile(tiny_model.bundle, TEXT, ProfileOptions(prompt_bytes=(4,), new_bytes=4))


def test_names_of_cases() -> None:
    assert make_case(threads=None, draft="auto").name == "threads not limited, 4 prompt bytes, draft auto"
    assert make_case(threads=1).name == "1 thread, 4 prompt bytes, draft none"
