"""A chat's request: what its JSON object may say, and the conversation in it.

What is no matter of chats is as in completions (`requests`). What it does not know: how a conversation
becomes a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.fields import shown
from .refusals import invalid
from .requests import (
    MOST_CHOICES,
    SHARED,
    SHARED_NEUTRAL,
    CompletionRequest,
    ModelFacts,
    check_length,
    check_names,
    check_shared,
    check_told,
    new_bytes,
    shared_request,
)
from .values import flag, text_bytes, whole

MOST_MESSAGES = 2048
"""Templates may take time that grows with the square of their number."""

ROLES = ("system", "developer", "user", "assistant")

_OWN = ("messages", "max_completion_tokens", "top_logprobs")
_UNUSED = ("safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Accepted like `user`, and without effect: what is kept of prompts is the server's matter."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **SHARED_NEUTRAL,
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""OpenAI's parameters that are not there, and what they may be because it means nothing."""

_TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
}
_NO_TOOLS = "this model calls no tools: describe them in a message, and read the answer's text"

_OF_MESSAGE = ("role", "content", "name")
_OF_ANSWERS: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "annotations": ([],)}
"""What clients send back of an answer, and what it may be because it means nothing."""


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be run once its messages have become a prompt."""

    messages: tuple[dict[str, str], ...]
    """At least one: `role`, one of `ROLES`, `content`, and `name` where it was given."""
    completion: CompletionRequest
    """All else; its prompt is empty."""

    def with_prompt(self, prompt: bytes, facts: ModelFacts) -> CompletionRequest:
        """What to run. Raises ApiError where that is too long, or too much would be told of it."""
        check_length("messages make a prompt of", prompt, facts, "messages")
        request = replace(self.completion, prompts=(prompt,))
        check_told(request, facts)
        return request


def parse_chat(document: Mapping[str, Any], facts: ModelFacts) -> ChatRequest:
    """Check a request's JSON object. Any parameter that is null counts as not given. Raises ApiError."""
    given = {name: value for name, value in document.items() if value is not None}
    for name, values in _TOOLS.items():
        if name in given and given[name] not in values:
            raise invalid(f"{name} is {shown(given[name])}; {_NO_TOOLS}", name, "unsupported_parameter")
    check_names(given, (*_OWN[:1], *SHARED, *_OWN[1:]), (*_NEUTRAL, *_TOOLS, *_UNUSED))
    check_shared(given, facts, _NEUTRAL)
    for name in _UNUSED:
        if not isinstance(given.get(name, ""), str):
            raise invalid(f"{name} is {shown(given[name])}; allowed is a string", name, "invalid_type")
    messages = _messages(given.get("messages"))
    given["logprobs"] = _logprobs(given)
    n, new = whole("n", given.get("n", 1), 1, MOST_CHOICES), _new_bytes(given, facts)
    completion = shared_request(given, facts, (b"",), n=n, new=new)
    stop = tuple(dict.fromkeys((*completion.options.stop, *facts.chat_stop)))
    return ChatRequest(messages, replace(completion, options=replace(completion.options, stop=stop)))


def _new_bytes(given: Mapping[str, Any], facts: ModelFacts) -> int:
    old = new_bytes("max_tokens", given, facts, 1)
    if "max_completion_tokens" not in given:
        return old
    new = new_bytes("max_completion_tokens", given, facts, 1)
    if "max_tokens" in given and new != old:
        told = f"max_completion_tokens is {new}, and max_tokens, an older name of it, {old}; leave out one"
        raise invalid(told, "max_tokens")
    return new


def _logprobs(given: Mapping[str, Any]) -> int | None:
    """`GenerationOptions.logprobs`, by OpenAI's two names: whether, and how many of the likeliest."""
    asked, top = flag("logprobs", given), whole("top_logprobs", given.get("top_logprobs", 0), 0, 20)
    if top and not asked:
        raise invalid("top_logprobs is given without logprobs; give logprobs: true, too", "top_logprobs")
    return top if asked else None


# The conversation.


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if value is None:
        told = 'messages is missing; give [{"role": "user", "content": "..."}]'
        raise invalid(told, "messages", "missing_required_parameter")
    if not isinstance(value, list):
        raise invalid(f"messages is {shown(value)}; allowed is a list", "messages", "invalid_type")
    if not 1 <= len(value) <= MOST_MESSAGES:
        raise invalid(f"messages has {len(value)}; allowed are 1 to {MOST_MESSAGES}", "messages")
    return tuple(_message(f"messages[{number}]", one) for number, one in enumerate(value))


def _message(place: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        told = f"{place} is {shown(value)}; allowed is an object with role and content"
        raise invalid(told, place, "invalid_type")
    given = {name: one for name, one in value.items() if one is not None}
    role = given.get("role")
    if role in ("tool", "function"):
        told = f"{place}.role is {role!r}; {_NO_TOOLS}; what a tool said goes into a user's message"
        raise invalid(told, f"{place}.role", "unsupported_parameter")
    if role not in ROLES:
        got = "missing" if role is None else shown(role)
        raise invalid(f"{place}.role is {got}; allowed are {', '.join(ROLES)}", f"{place}.role")
    for name, one in given.items():
        if name in _OF_ANSWERS:
            if one not in _OF_ANSWERS[name]:
                told = f"{place}.{name} is {shown(one)}; " + (_NO_TOOLS if "tool" in name else "leave it out")
                raise invalid(told, f"{place}.{name}", "unsupported_parameter")
        elif name not in _OF_MESSAGE:
            told = f"{place} has {shown(name)}; allowed are {', '.join(_OF_MESSAGE)}"
            raise invalid(told, f"{place}.{name}", "unknown_parameter")
    message = {"role": str(role), "content": _content(f"{place}.content", given.get("content"))}
    if "name" in given:
        message["name"] = _text(f"{place}.name", given["name"])
    return message


def _content(place: str, value: Any) -> str:
    """A message's text; parts become lines, since their bounds would be lost otherwise."""
    if value is None:
        raise invalid(f"{place} is missing; give a text", place, "missing_required_parameter")
    if isinstance(value, list):
        return "\n".join(_part(f"{place}[{number}]", one) for number, one in enumerate(value))
    if not isinstance(value, str):
        told = f"{place} is {shown(value)}; allowed are a string and a list of text parts"
        raise invalid(told, place, "invalid_type")
    return _text(place, value)


def _part(place: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None:
        told = f'{place} is {shown(value)}; allowed is {{"type": "text", "text": "..."}}'
        raise invalid(told, place, "invalid_type")
    if kind != "text":
        told = f"{place} is of type {shown(kind)}; this model reads text only: leave it out"
        raise invalid(told, f"{place}.type", "unsupported_parameter")
    return _text(f"{place}.text", value.get("text"))


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(f"{place} is {shown(value)}; allowed is a string", place, "invalid_type")
    text_bytes(place, value)
    return value
