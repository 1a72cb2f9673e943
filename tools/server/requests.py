"""A completion request: its body, read within a limit as JSON without surprises, and what it may say.

OpenAI's parameters and ours, each checked or refused by name. The rules of a value are those of
`GenerationOptions`; only the names and defaults are OpenAI's. A refusal is a status and OpenAI's
`{"error": {message, type, param, code}}`.
What it does not know: routes, the model, how an answer is made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from ...runtime import GenerationOptions, OptionError
from ...runtime.fields import checked_flag, checked_int, shown

MOST_CHOICES = 128
"""Choices of a request: prompts times n."""
MOST_TOLD = 65_536
"""Bytes of a request's answer, or as many as the model has positions, that may have logprobs or details: each
takes some 3 KB of memory while the answer is made."""
MOST_STOPS = 64
"""Sixteen times OpenAI's: tasks of evaluations send eight and more."""
LARGEST_SEED = 2**63 - 1
"""Seeds go from minus this less one, as at OpenAI; -1 is none, as other servers have it."""
BODY_SECONDS = 20.0
"""For the next bytes of a request's body."""

_LONGEST_PARAM = 100
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}

# A client that hears of a refusal only after it has sent everything gets it more surely than one whose
# connection breaks: so much, in bodies and in seconds, is read and thrown away.
_PATIENCE_BODIES = 4
_PATIENCE_SECONDS = 2.0

T = TypeVar("T")
_Types = type | tuple[type, ...]


# 1. Refusals.


class ApiError(Exception):
    """What a client is told instead of an answer: what was got, what is allowed, what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """code: a word for programs. param: the parameter at fault."""
        super().__init__(message)
        if param is not None:  # a client's own key may be long, and have what UTF-8 has no bytes for
            param = param[:_LONGEST_PARAM].encode("utf-8", "backslashreplace").decode("utf-8")
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status, self.headers = status, dict(headers or {})
        self.document = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.document, self.status, self.headers)


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is told anything."""


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400: the request itself is wrong."""
    return ApiError(400, message, code, param=param)


def unknown_model(name: object, known: str) -> ApiError:
    """A 404: this server's model has another name."""
    message = f"there is no model {shown(name)}; this server has {known!r}"
    return ApiError(404, message, "model_not_found", param="model")


def late_body(seconds: float) -> ApiError:
    """A 408: the client did not go on."""
    message = f"the body did not arrive within {seconds:g} s"
    return ApiError(408, message, "timeout", headers={"Connection": "close"})


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again: whole seconds, 1 to 60 (clients ignore more)."""
    return {"Retry-After": str(max(1, min(60, round(seconds))))}


# 2. The body.


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The body's JSON object, of at most `most` bytes. Raises ApiError, ClientGoneError."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        got = shown(kind) if kind else "missing"
        raise invalid(f"the content type is {got}; allowed is application/json", code="invalid_content_type")
    try:
        document = parse_json(await _read(request, most))
    except ClientDisconnect:
        raise ClientGoneError from None
    if not isinstance(document, dict):
        raise invalid(f"the body is {shown(document)}; allowed is a JSON object", code="invalid_json")
    return document


async def _read(request: Request, most: int) -> bytes:
    too_large = ApiError(
        413,
        f"the body is longer than {most} bytes; send less, or raise the server's --max-body",
        "body_too_large",
        headers={"Connection": "close"},
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:18]) > most and "expect" in request.headers:
        raise too_large  # it waits to be told to send anything
    body, size = bytearray(), 0
    with anyio.CancelScope(deadline=anyio.current_time() + BODY_SECONDS) as scope:
        async for piece in request.stream():
            size += len(piece)
            if size <= most:
                body += piece
                scope.deadline = anyio.current_time() + BODY_SECONDS
                continue
            body.clear()
            scope.deadline = min(scope.deadline, anyio.current_time() + _PATIENCE_SECONDS)
            if size > _PATIENCE_BODIES * most:
                break
    if scope.cancelled_caught and size <= most:
        raise late_body(BODY_SECONDS)
    if size > most:
        raise too_large
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no key twice, no depth or number that Python refuses. Raises ApiError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
    except RecursionError:
        raise invalid("the body's JSON is nested too deep", code="invalid_json") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise invalid(f"the body is no JSON: {error.msg} at {place}", code="invalid_json") from None
    except ValueError:  # more digits than Python turns into a number
        raise invalid("the body has a number of too many digits", code="invalid_json") from None


def _no_number(word: str) -> NoReturn:
    raise invalid(f"the body has {word}, which JSON has no number for", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key, count in times.items() if count > 1)
        raise invalid(f"the body has {shown(twice)} twice", param=twice, code="invalid_json")
    return found


# 3. The request.

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs"),
    *("draft", "draft_length"),
)
"""Parameters that are a field of `GenerationOptions`, by the same name."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
"""OpenAI's parameters that are not there, and what they may be because it means nothing."""

_ALLOWED = (
    *("model", "prompt", "max_tokens", *_SAMPLING, "n", "stop"),
    *("echo", "stream", "stream_options", "user", "blt_details"),
)

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


def parse_completion(document: Mapping[str, Any], facts: ModelFacts) -> CompletionRequest:
    """Check a request's JSON object. Any parameter that is null counts as not given. Raises ApiError."""
    given = {name: value for name, value in document.items() if value is not None}
    _check_names(given)
    if given.get("logprobs") is False:
        del given["logprobs"]
    if given.get("model", facts.name) != facts.name:
        raise unknown_model(given["model"], facts.name)
    for name, neutral in _NEUTRAL.items():
        if name in given and (isinstance(given[name], bool) or given[name] not in neutral):
            raise _unsupported(name, given[name], f"leave it out, or give {neutral[0]!r}")
    if not isinstance(given.get("user", ""), str):
        raise invalid(f"user is {shown(given['user'])}; allowed is a string", "user", "invalid_type")
    prompts, most = _prompts(given.get("prompt")), facts.max_positions - 1
    for prompt in prompts:
        if len(prompt) > most:
            message = f"prompt has {len(prompt)} bytes, the model reads at most {most}; shorten it"
            raise invalid(message, "prompt", "context_length_exceeded")
    n = _whole("n", given.get("n", 1), 1, MOST_CHOICES)
    if n * len(prompts) > MOST_CHOICES:
        raise invalid(f"{len(prompts)} prompts times n = {n}; allowed are {MOST_CHOICES} choices", "n")
    if "best_of" in given and _whole("best_of", given["best_of"], 1, None) != n:
        raise _unsupported("best_of", given["best_of"], f"leave it out, or give n, which is {n}")
    stream = _flag("stream", given)
    echo = _flag("echo", given)
    usual = min(facts.defaults.max_new_bytes, facts.max_positions)
    new = _whole("max_tokens", given.get("max_tokens", usual), 0, facts.max_positions)
    if new == 0 and not echo:
        raise invalid("max_tokens is 0, which needs echo: there would be no text at all", "max_tokens")
    blt_details = _flag("blt_details", given)
    details = blt_details or (echo and "logprobs" in given)
    options = _options(given, facts.defaults, max_new_bytes=new, details=blt_details, prompt_details=details)
    request = CompletionRequest(
        prompts=prompts,
        options=options,
        n=n,
        echo=echo,
        stream=stream,
        include_usage=_include_usage(given.get("stream_options"), stream),
        blt_details=blt_details,
    )
    _check_told(request, facts)
    return request


# 4. Names.


def _check_names(given: Mapping[str, Any]) -> None:
    known = {*_ALLOWED, *_NEUTRAL, "best_of"}
    unknown = [name for name in given if name not in known]
    if unknown:
        names = ", ".join(map(shown, unknown[:5]))
        message = f"there is no parameter {names}; allowed are {', '.join(_ALLOWED)}"
        raise invalid(message, unknown[0], "unknown_parameter")


def _unsupported(name: str, value: Any, advice: str) -> ApiError:
    return invalid(
        f"{name} is {shown(value)}, which is not supported; {advice}", name, "unsupported_parameter"
    )


# 5. The prompt.


def _prompts(prompt: Any) -> tuple[bytes, ...]:
    if prompt is None:
        raise invalid('prompt is missing; give a text, or ""', "prompt", "missing_required_parameter")
    if isinstance(prompt, str):
        return (_text("prompt", prompt),)
    if not isinstance(prompt, list):
        raise _no_prompt(prompt)
    if not prompt:
        raise invalid("prompt is an empty list; give at least one text", "prompt")
    if all(isinstance(one, str) for one in prompt):
        return tuple(_text("prompt", one) for one in prompt)
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


def _text(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise invalid(
            f"{name} has half a character, {half}, at {error.start}; bytes that are no text go as a list of "
            "byte values",
            name,
        ) from None


def _check_told(request: CompletionRequest, facts: ModelFacts) -> None:
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


# 6. Values.


def _options(given: Mapping[str, Any], defaults: GenerationOptions, **fields: Any) -> GenerationOptions:
    if "stop" in given:
        fields["stop"] = _stops(given["stop"])
    given = {**given, **_translated(given)}
    for name in _SAMPLING:
        if given.get(name) is not None:
            fields[name] = _option(name, given[name], str if name == "draft" else (int, float))
    return replace(defaults, **fields)


def _translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenAI's clients send and `GenerationOptions` has other words for."""
    others: dict[str, Any] = {}
    if "seed" in given:
        seed = _whole("seed", given["seed"], -LARGEST_SEED - 1, LARGEST_SEED - MOST_CHOICES)
        others["seed"] = None if seed == -1 else seed % 2**64
    top_p = given.get("top_p")
    if top_p == 0 and not isinstance(top_p, bool):  # the fewest ids that make up nothing: the likeliest alone
        if given.get("temperature") is not None:  # has no effect, but is no less wrong
            _option("temperature", given["temperature"], (int, float))
        others |= {"top_p": None, "temperature": 0}
    return others


def _stops(stop: Any) -> tuple[bytes, ...]:
    stops = [stop] * bool(stop) if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        message = f"stop is {shown(stop)}; allowed are a string and a list of strings"
        raise invalid(message, "stop", "invalid_type")
    if len(stops) > MOST_STOPS:
        raise invalid(f"stop has {len(stops)} strings; allowed are {MOST_STOPS}", "stop")
    found: tuple[bytes, ...] = _option("stop", tuple(_text("stop", one) for one in stops), tuple)
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
    _flag("include_obfuscation", given)
    return _flag("include_usage", given)


def _option(name: str, value: Any, types: _Types) -> Any:
    def check(name: str, value: Any) -> Any:
        return getattr(GenerationOptions(**{name: value}), name)

    return _checked(check, name, value, types=types)


def _flag(name: str, given: Mapping[str, Any]) -> bool:
    return _checked(checked_flag, name, given.get(name, False), types=())


def _whole(name: str, value: Any, least: int, most: int | None) -> int:
    return _checked(checked_int, name, value, least, most, types=(int, float))


def _checked(check: Callable[..., T], name: str, value: Any, *limits: int | None, types: _Types) -> T:
    """What `check` makes of a value of one of the types. Raises ApiError."""
    try:
        return check(name, value, *limits)
    except OptionError as error:
        fits = isinstance(value, types) and not isinstance(value, bool)
        raise invalid(str(error), name, "invalid_value" if fits else "invalid_type") from None
