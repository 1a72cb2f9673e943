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

REFUSED: dict[str, tuple[str, list[Any]]] = {
    "max_new_bytes": ("a whole number >= 1", [0, -1, 1.0, True, None, "5", NAN]),
    "temperature": ("a finite number >= 0", [-0.1, NAN, INF, True, None, "1", 10**400]),
    "top_k": ("a whole number >= 0", [-1, 1.0, False, None, NAN]),
    "top_p": ("a finite number > 0 and <= 1", [0, 0.0, -0.5, 1.01, NAN, INF, True, None]),
    "min_p": ("a finite number >= 0 and <= 1", [-0.1, 1.1, NAN, INF, False, None]),
    "repetition_penalty": ("a finite number > 0", [0, -1.0, NAN, INF, True, None]),
    "seed": ("a whole number >= 0", [-1, 1.0, True, "7", NAN]),
    "draft_length": ("a whole number from 1 to 32", [0, -1, 33, 2.0, True, "4", NAN]),
    "details": ("true or false", [0, 1, "yes", None]),
    "logprobs": ("a whole number from 0 to 20", [-1, 21, 1.0, True, "5", NAN]),
}

ACCEPTED: dict[str, list[Any]] = {
    "max_new_bytes": [1, 10**9, np.int64(5)],
    "temperature": [0, 0.0, 1, 5e-324, 1e308, np.float32(0.5)],
    "top_k": [0, 1, 10**9],
    "top_p": [1, 1.0, 5e-324],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [5e-324, 1, 1.0, 1e308],
    "seed": [None, 0, 2**200],
    "draft": ["auto", "none", "decoder", "patcher", "lookup"],
    "draft_length": [None, 1, 32, np.int64(8)],
    "details": [False, True],
    "logprobs": [None, 0, 20, np.int64(3)],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, (_, values) in REFUSED.items() for v in values])
def test_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    allowed = REFUSED[field][0]
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**{field: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{field} is ")
    assert f"allowed is {allowed}" in message
    assert "\n" not in message


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in ACCEPTED.items() for v in values])
def test_the_whole_range_is_accepted(field: str, value: object) -> None:
    options = GenerationOptions(**{field: value})  # type: ignore[arg-type]
    assert getattr(options, field) == value


@pytest.mark.parametrize("draft", ["", "Decoder", None, 3, ["auto"]])
def test_an_unknown_draft_is_refused_with_those_there_are(draft: Any) -> None:
    with pytest.raises(OptionError, match=r"^draft is .*; allowed are auto, none, decoder, patcher, lookup$"):
        GenerationOptions(draft=draft)


@pytest.mark.parametrize("logprobs", [0, 5])
def test_logprobs_imply_details(logprobs: int) -> None:
    assert GenerationOptions(logprobs=logprobs).details
    assert GenerationOptions(details=True).logprobs is None


def test_values_are_kept_as_plain_numbers() -> None:
    options = GenerationOptions(np.int32(9), temperature=np.float32(0.5), top_k=np.int64(3), min_p=1)
    assert json.loads(json.dumps(dataclasses.asdict(options)))["temperature"] == 0.5
    assert [type(v) for v in (options.max_new_bytes, options.top_k, options.min_p)] == [int, int, float]


def test_the_defaults_are_greedy_with_everything_off() -> None:
    assert dataclasses.asdict(GenerationOptions()) == {
        "max_new_bytes": 256,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": (),
        "draft": "auto",
        "draft_length": None,
        "details": False,
        "logprobs": None,
    }


def test_options_are_frozen_and_replaceable() -> None:
    options = GenerationOptions(stop=("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]
    assert dataclasses.replace(options, seed=3) == GenerationOptions(seed=3, stop=(b"x",))
    with pytest.raises(OptionError):
        dataclasses.replace(options, top_p=2.0)
    assert len({options, GenerationOptions(stop=(b"x",))}) == 1


def test_stop_strings_become_bytes() -> None:
    options = GenerationOptions(stop=("é\n", b"\xff", "a"))
    assert options.stop == ("é\n".encode(), b"\xff", b"a")
    assert options.stop_bytes == options.stop
    assert GenerationOptions(stop=["a"]).stop == (b"a",)  # type: ignore[arg-type]


def test_a_command_lines_invalid_bytes_come_back() -> None:
    assert GenerationOptions(stop=("a\udcff",)).stop == (b"a\xff",)


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
