"""Every field has a range; a value outside is refused in one line that names it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime.errors import OptionError
from blt_edge.runtime.options import GenerationOptions

NAN, INF = float("nan"), float("inf")

# field: (what is allowed, values that are refused, values that are accepted)
FIELDS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "max_new_bytes": ("a whole number >= 0", [-1, 1.0, True, None, "5", NAN], [0, 1, 10**9, np.int64(5)]),
    "temperature": (
        "a finite number >= 0",
        [-0.1, NAN, INF, True, None, "1", 10**400],
        [0, 1, 5e-324, 1e308, np.float32(0.5)],
    ),
    "top_k": ("a whole number >= 0", [-1, 1.0, False, None, NAN], [0, 1, 10**9]),
    "top_p": ("a finite number > 0 and <= 1", [0, -0.5, 1.01, NAN, INF, True, None], [1, 5e-324]),
    "min_p": ("a finite number >= 0 and <= 1", [-0.1, 1.1, NAN, INF, False, None], [0, 1]),
    "repetition_penalty": ("a finite number > 0", [0, -1.0, NAN, INF, True, None], [5e-324, 1, 1e308]),
    "seed": ("a whole number >= 0", [-1, 1.0, True, "7", NAN], [None, 0, 2**200]),
    "draft_length": ("a whole number from 1 to 32", [0, -1, 33, 2.0, True, "4", NAN], [None, 1, 32]),
    "details": ("true or false", [0, 1, "yes", None], [False, True]),
    "prompt_details": ("true or false", [0, 1, "yes", None], [False, True]),
    "logprobs": ("a whole number from 0 to 20", [-1, 21, 1.0, True, "5", NAN], [None, 0, 20, np.int64(3)]),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_takes_its_range_and_nothing_else(field: str) -> None:
    allowed, refused, accepted = FIELDS[field]
    for value in refused:
        with pytest.raises(OptionError, match=f"^{field} is .*allowed is {allowed}") as caught:
            GenerationOptions(**{field: value})
        assert "\n" not in str(caught.value)
    for value in accepted:
        assert getattr(GenerationOptions(**{field: value}), field) == value


@pytest.mark.parametrize("draft", ["", "Decoder", None, 3, ["auto"]])
def test_an_unknown_draft_is_refused_with_those_there_are(draft: Any) -> None:
    with pytest.raises(OptionError, match=r"^draft is .*; allowed are auto, none, decoder, patcher, lookup$"):
        GenerationOptions(draft=draft)


@pytest.mark.parametrize("logprobs", [0, 5])
def test_logprobs_imply_details(logprobs: int) -> None:
    assert GenerationOptions(logprobs=logprobs).details
    assert GenerationOptions(prompt_details=True).details
    assert GenerationOptions(details=True).logprobs is None


def test_values_are_kept_as_plain_numbers() -> None:
    options = GenerationOptions(np.int32(9), temperature=np.float32(0.5), top_k=np.int64(3), min_p=1)
    assert json.loads(json.dumps(dataclasses.asdict(options)))["temperature"] == 0.5
    assert [type(v) for v in (options.max_new_bytes, options.top_k, options.min_p)] == [int, int, float]


def test_the_defaults_are_greedy_with_everything_off() -> None:
    options = GenerationOptions()
    off = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "seed": None}
    more = {"max_new_bytes": 256, "stop": (), "draft": "auto", "draft_length": None, "details": False}
    fit = {"constraint": None, "utf8": False, "logit_bias": ()}
    assert dataclasses.asdict(options) == {**off, **more, "logprobs": None, "prompt_details": False, **fit}


def test_options_are_frozen_and_replaceable() -> None:
    options = GenerationOptions(stop=("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]
    assert dataclasses.replace(options, seed=3) == GenerationOptions(seed=3, stop=(b"x",))
    with pytest.raises(OptionError):
        dataclasses.replace(options, top_p=2.0)
    assert len({options, GenerationOptions(stop=(b"x",))}) == 1


def test_stop_strings_become_bytes() -> None:
    options = GenerationOptions(stop=("é\n", b"\xff", "a", "a\udcff"))  # the last as a command line gives it
    assert options.stop == options.stop_bytes == ("é\n".encode(), b"\xff", b"a", b"a\xff")
    assert GenerationOptions(stop=["a"]).stop == (b"a",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ("END", "stop is 'END'; allowed is a list or tuple"),
        (b"END", "stop is b'END'; allowed is a list or tuple"),
        (None, "stop is None; allowed is a list or tuple"),
        (7, "stop is 7; allowed is a list or tuple"),
        (("",), "a stop string is empty"),
        (("a", b""), "a stop string is empty"),
        ((5,), "a stop string is 5; allowed are strings and bytes"),
        (("\ud800",), "not valid text"),
    ],
)
def test_bad_stop_strings_are_refused(stop: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        GenerationOptions(stop=stop)
    assert "\n" not in str(caught.value)
