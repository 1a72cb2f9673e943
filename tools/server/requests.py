"""A completion request: what its JSON object may say, OpenAI's parameters and ours, each checked or refused.

The rules of a value are those of `GenerationOptions`; only the names and defaults are OpenAI's. What chats
(`chat_requests`) share with completions is in section 2.
What it does not know: routes, the model, how an answer is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...runtime import GenerationOptions
from ...runtime.fields import shown
from . import constraints
from .refusals import ApiError, invalid, unknown_model
from .values import flag, option, text_bytes, whole

MOST_CHOICES = 128
"""Choices of a request: prompts times n."""
MOST_TOLD = 65_536
"""Bytes of a request's answer, or as many as the model has positions, that may have logprobs or details: each
takes some 3 KB of memory while the answer is made."""
MOST_STOPS = 64
"""Sixteen times OpenAI's: tasks of evaluations send eight and more."""
LARGEST_SEED = 2**63 - 1
"""Seeds go from minus this less one, as at OpenAI; -1 is none, as other servers have it."""

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs"),
    *("draft", "draft_length"),
)
"""Parameters that are a field of `GenerationOptions`, by the same name."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
"""OpenAI's parameters that are not there, and what they may be because it means nothing."""

_ALLOWED = (
    *("model", "prompt", "max_tokens", *_SAMPLING, "n", "stop"),
    *("echo", "stream", "stream_options", "user", "blt_details"),
    *constraints.NAMES,
)

_OWN = ("prompt", "echo", "suffix")
SHARED = tuple(name for name in _ALLOWED if name not in _OWN)
"""Parameters of completions and of chats."""
SHARED_NEUTRAL = {name: values for name, values in _NEUTRAL.items() if name not in _OWN}
"""Those of both that are not there, and what they may be."""

_STREAM_OPTIONS = ("include_usage", "include_obfuscation")
"""The second has no effect: what a network sees of the events' lengths is a matter for who encrypts them."""


@dataclass(frozen=True)
class ModelFacts:
    """What a request is checked against."""

    name: str
    """The model's id."""
    max_positions: int
    """Of prompt and new bytes, and one for BOS."""
    defaults: GenerationOptions
    """Of a request that says nothing. Length: as `blt-edge generate` makes; OpenAI's 16 tokens would be 16
    bytes."""
    chat_stop: tuple[bytes, ...] = ()
    """Strings that end a chat's answer, beside those that are asked for."""


@dataclass(frozen=True)
class CompletionRequest:
    """A request that can be run."""

    prompts: tuple[bytes, ...]
    """At least one."""
    options: GenerationOptions
    """Of the first choice of each prompt; with a seed, choice j of it has seed + j."""
    n: int = 1
    """Choices of each prompt, those of the first prompt come first."""
    echo: bool = False
    """The prompt is part of the text."""
    stream: bool = False
    """As server-sent events."""
    include_usage: bool = False
    """One more event with the counts."""
    blt_details: bool = False
    """Tell of patches, entropies and times."""
    constraint_field: str | None = None
    """The parameter that the options' constraint is from."""


def parse_completion(document: Mapping[str, Any], facts: ModelFacts) -> CompletionRequest:
    """Check a request's JSON object. Any parameter that is null counts as not given. Raises ApiError."""
    given = {name: value for name, value in document.items() if value is not None}
    check_names(given, _ALLOWED, (*_NEUTRAL, "best_of"))
    if given.get("logprobs") is False:
        del given["logprobs"]
    check_shared(given, facts, _NEUTRAL)
    prompts = _prompts(given.get("prompt"))
    for prompt in prompts:
        check_length("prompt has", prompt, facts, "prompt")
    n = whole("n", given.get("n", 1), 1, MOST_CHOICES)
    if n * len(prompts) > MOST_CHOICES:
        raise invalid(f"{len(prompts)} prompts times n = {n}; allowed are {MOST_CHOICES} choices", "n")
    if "best_of" in given and whole("best_of", given["best_of"], 1, None) != n:
        raise unsupported("best_of", given["best_of"], f"leave it out, or give n, which is {n}")
    echo = flag("echo", given)
    new = new_bytes("max_tokens", given, facts)
    if new == 0 and not echo:
        raise invalid("max_tokens is 0, which needs echo: there would be no text at all", "max_tokens")
    request = shared_request(given, facts, prompts, n=n, new=new, echo=echo)
    check_told(request, facts)
    return request


# 1. The prompt.


def _prompts(prompt: Any) -> tuple[bytes, ...]:
    if prompt is None:
        raise invalid('prompt is missing; give a text, or ""', "prompt", "missing_required_parameter")
    if isinstance(prompt, str):
        return (text_bytes("prompt", prompt),)
    if not isinstance(prompt, list):
        raise _no_prompt(prompt)
    if not prompt:
        raise invalid("prompt is an empty list; give at least one text", "prompt")
    if all(isinstance(one, str) for one in prompt):
        return tuple(text_bytes("prompt", one) for one in prompt)
    if all(isinstance(one, list) for one in prompt):
        return tuple(map(_byte_values, prompt))
    return (_byte_values(prompt),)


def _byte_values(values: list[Any]) -> bytes:
    """A list of numbers: this model's tokens are bytes."""
    for place, value in enumerate(values):
        if type(value) is not int:
            raise _no_prompt(value)
        if not 0 <= value <= 255:
            raise invalid(
                f"prompt has {shown(value)} at place {place}; a list of numbers is taken as byte values, "
                "0 to 255: the model has no other tokens, send the text itself",
                "prompt",
            )
    return bytes(values)


def _no_prompt(value: Any) -> ApiError:
    return invalid(
        f"prompt is or has {shown(value)}; allowed are a string, a list of strings, a list of byte values, "
        "or a list of such lists",
        "prompt",
        "invalid_type",
    )


# 2. What chats have, too.


def check_names(given: Mapping[str, Any], allowed: Sequence[str], others: Iterable[str]) -> None:
    """Raises ApiError for a name that is neither allowed nor one of the others, which are not advertised."""
    known = {*allowed, *others}
    unknown = [name for name in given if name not in known]
    if unknown:
        names = ", ".join(map(shown, unknown[:5]))
        message = f"there is no parameter {names}; allowed are {', '.join(allowed)}"
        raise invalid(message, unknown[0], "unknown_parameter")


def check_shared(given: Mapping[str, Any], facts: ModelFacts, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """The model's name, what may mean nothing only, and the user. Raises ApiError."""
    if given.get("model", facts.name) != facts.name:
        raise unknown_model(given["model"], facts.name)
    for name, values in neutral.items():
        if name in given and not any(_same(given[name], value) for value in values):
            raise unsupported(name, given[name], f"leave it out, or give {json.dumps(values[0])}")
    if not isinstance(given.get("user", ""), str):
        raise invalid(f"user is {shown(given['user'])}; allowed is a string", "user", "invalid_type")


def _same(value: Any, neutral: Any) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def unsupported(name: str, value: Any, advice: str) -> ApiError:
    """A 400 for a parameter that is known, and whose value is not supported."""
    return invalid(
        f"{name} is {shown(value)}, which is not supported; {advice}", name, "unsupported_parameter"
    )


def check_length(what: str, prompt: bytes, facts: ModelFacts, param: str) -> None:
    """Raises ApiError for a prompt that the model has no positions for. what: how the message begins."""
    most = facts.max_positions - 1
    if len(prompt) > most:
        message = f"{what} {len(prompt)} bytes, the model reads at most {most}; shorten it"
        raise invalid(message, param, "context_length_exceeded")


def new_bytes(name: str, given: Mapping[str, Any], facts: ModelFacts, least: int = 0) -> int:
    """How many bytes to make at most, by the parameter of that name. Raises ApiError."""
    usual = max(least, min(facts.defaults.max_new_bytes, facts.max_positions))
    return whole(name, given.get(name, usual), least, facts.max_positions)


def shared_request(
    given: Mapping[str, Any],
    facts: ModelFacts,
    prompts: tuple[bytes, ...],
    *,
    n: int,
    new: int,
    echo: bool = False,
) -> CompletionRequest:
    """The request for so many choices of so many new bytes: all that completions and chats read alike.

    Raises ApiError.
    """
    stream, blt_details = flag("stream", given), flag("blt_details", given)
    details = blt_details or (echo and "logprobs" in given)
    rules = constraints.text_rules(given)
    told = {"details": blt_details, "prompt_details": details}
    options = _options(given, facts.defaults, max_new_bytes=new, **told, **rules.options)
    return CompletionRequest(
        prompts=prompts,
        options=options,
        n=n,
        echo=echo,
        stream=stream,
        include_usage=_include_usage(given.get("stream_options"), stream),
        blt_details=blt_details,
        constraint_field=rules.constraint_field,
    )


def check_told(request: CompletionRequest, facts: ModelFacts) -> None:
    """Raises ApiError where more would be told byte by byte than may be."""
    options = request.options
    if not options.details:
        return
    each = (
        min(options.max_new_bytes, facts.max_positions - len(prompt)) + len(prompt) * options.prompt_details
        for prompt in request.prompts
    )
    told, most = request.n * sum(each), max(MOST_TOLD, facts.max_positions)
    if told > most:
        name = "blt_details" if options.logprobs is None else "logprobs"
        raise invalid(
            f"{name} would be of up to {told} bytes, prompts, n and max_tokens counted; allowed are {most}; "
            "ask for fewer or shorter choices at a time",
            name,
        )


# 3. Values.


def _options(given: Mapping[str, Any], defaults: GenerationOptions, **fields: Any) -> GenerationOptions:
    if "stop" in given:
        fields["stop"] = _stops(given["stop"])
    given = {**given, **_translated(given)}
    for name in _SAMPLING:
        if given.get(name) is not None:
            fields[name] = option(name, given[name], str if name == "draft" else (int, float))
    return replace(defaults, **fields)


def _translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenAI's clients send and `GenerationOptions` has other words for."""
    others: dict[str, Any] = {}
    if "seed" in given:
        seed = whole("seed", given["seed"], -LARGEST_SEED - 1, LARGEST_SEED - MOST_CHOICES)
        others["seed"] = None if seed == -1 else seed % 2**64
    top_p = given.get("top_p")
    if top_p == 0 and not isinstance(top_p, bool):  # the fewest ids that make up nothing: the likeliest alone
        if given.get("temperature") is not None:  # has no effect, but is no less wrong
            option("temperature", given["temperature"], (int, float))
        others |= {"top_p": None, "temperature": 0}
    return others


def _stops(stop: Any) -> tuple[bytes, ...]:
    stops = [stop] * bool(stop) if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        message = f"stop is {shown(stop)}; allowed are a string and a list of strings"
        raise invalid(message, "stop", "invalid_type")
    if len(stops) > MOST_STOPS:
        raise invalid(f"stop has {len(stops)} strings; allowed are {MOST_STOPS}", "stop")
    found: tuple[bytes, ...] = option("stop", tuple(text_bytes("stop", one) for one in stops), tuple)
    return found


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options is given without stream; leave it out", "stream_options")
    given = {} if not isinstance(options, dict) else {k: v for k, v in options.items() if v is not None}
    if not isinstance(options, dict) or not set(given) <= set(_STREAM_OPTIONS):
        message = (
            f"stream_options is {shown(options)}; allowed is an object with {' and '.join(_STREAM_OPTIONS)}"
        )
        raise invalid(message, "stream_options")
    flag("include_obfuscation", given)
    return flag("include_usage", given)
