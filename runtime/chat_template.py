"""A bundle's chat template: what makes one text of a conversation.

jinja2 is never imported here: templates are rendered in a process of their own (`chat_render`), within
`PATIENCE` and `MEMORY`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from .chat_spec import ChatSpec
from .errors import BltError, BundleError
from .files import open_plain
from .manifest import Manifest
from .names import CHAT_TEMPLATE_NAME
from .worker import Worker, WorkerBusyError, WorkerError

__all__ = [
    "MOST_TEMPLATE_BYTES",
    "ChatTemplate",
    "MessagesRefusedError",
    "TemplateError",
    "load_chat_template",
]

MOST_TEMPLATE_BYTES = 256 << 10
"""Ten times the longest in common use."""

PATIENCE = 2.0
"""Seconds for a conversation; a usual one takes a millisecond."""

MEMORY = 256 << 20
"""Bytes of the process that renders."""

_LARGEST_ANSWER = 64 << 20
"""Bytes of `MOST_RENDERED` characters as JSON writes the longest."""

Message = Mapping[str, str]
"""`role`, `content`, and where it was given `name`."""

_USER = {"role": "user", "content": "Hello"}
_SIMPLE: tuple[tuple[Message, ...], ...] = ((_USER,), ({"role": "system", "content": "Be kind."}, _USER))


class TemplateError(BltError):
    """The template itself is wrong, or does more than it may."""


class MessagesRefusedError(BltError):
    """The template does not take these messages: by its own word, or because it fails on them."""


class ChatTemplate:
    """A template as text, with what it has to know. Safe from any thread; one renders at a time."""

    def __init__(self, text: str, spec: ChatSpec) -> None:
        self.text, self.spec = text, spec

    @property
    def stop(self) -> tuple[bytes, ...]:
        """Strings that end an answer of the model, beside the ids that end any text."""
        return (self.spec.eos.encode(),) if self.spec.eos else ()

    def render(self, messages: Sequence[Message]) -> bytes:
        """The text that the model goes on from to answer, without BOS, in UTF-8.

        A message of the role "developer" is one of "system" in a template that does not have the word.
        Raises MessagesRefusedError, TemplateError for what takes too long or too much memory,
        WorkerBusyError where others' conversations do, OptionError where jinja2 is missing.
        """
        kind, told = self._answer(messages)
        if kind == "text":
            return told.encode()
        does = "refuses" if kind == "refused" else "fails on"
        raise MessagesRefusedError(f"the chat template {does} these messages: {told}")

    def check(self) -> None:
        """Render a simple conversation. Raises TemplateError where that can't be done, OptionError where
        jinja2 is missing."""
        answers = [self._answer(messages) for messages in _SIMPLE]
        rendered = [text for kind, text in answers if kind == "text"]
        if not rendered:
            raise TemplateError(f"the chat template renders no simple conversation: {answers[0][1]}")
        if not any(_USER["content"] in text for text in rendered):
            raise TemplateError("the chat template leaves out what a user says; is it one?")

    def _answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the worker says: "text", "refused" or "failed", and that."""
        if "developer" not in self.text:
            system = {"role": "system"}
            messages = [{**one, **system} if one["role"] == "developer" else one for one in messages]
        asked = {"template": self.text, "messages": list(messages), "eos_token": self.spec.eos or ""}
        try:
            ((kind, told),) = _worker().ask(asked, PATIENCE).items()
        except WorkerBusyError:
            raise
        except WorkerError as error:
            raise TemplateError(f"the chat template {error}") from None
        return str(kind), str(told)


def load_chat_template(directory: str | os.PathLike[str], manifest: Manifest) -> ChatTemplate | None:
    """The template in a bundle, which renders a simple conversation; None where the bundle has none.

    Raises BundleError for a file that is no such template, OptionError where jinja2 is missing.
    """
    if manifest.chat is None:
        return None
    with open_plain(Path(directory) / CHAT_TEMPLATE_NAME) as file:
        data = file.read(MOST_TEMPLATE_BYTES + 1)
    try:
        template = ChatTemplate(template_text(data), manifest.chat)
        template.check()
    except TemplateError as error:
        remedy = "export the checkpoint again with another --chat-template, or with none"
        raise BundleError(f"{CHAT_TEMPLATE_NAME}: {error}; {remedy}") from None
    return template


def template_text(data: bytes) -> str:
    """A template's file as text, without a mark of its encoding. Raises TemplateError for what is too long or
    no UTF-8."""
    if len(data) > MOST_TEMPLATE_BYTES:
        raise TemplateError(f"a chat template has at most {MOST_TEMPLATE_BYTES} bytes, this one has more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TemplateError(f"a chat template is UTF-8, this one is not at byte {error.start}") from None


@lru_cache(maxsize=1)
def _worker() -> Worker:
    return Worker("blt_edge.runtime.chat_render:render", memory=MEMORY, largest=_LARGEST_ANSWER)
