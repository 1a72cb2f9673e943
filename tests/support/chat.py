"""A chat on a model, an answer as it is shown, and the program as a process, also slowed down."""

from __future__ import annotations

import codecs
import os
import sys
import threading
from collections.abc import Mapping
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest
from blt_edge.runtime import BltModel, GenerationOptions
from blt_edge.runtime.vocabulary import decode
from blt_edge.tools.cli.chat_session import ChatSession

from .processes import HEEDING

MAIN = "from blt_edge.tools.cli import main; main()"
# The tiny model is fast: slowed down, it can be interrupted in the middle.
SLOW = (
    "import time; from blt_edge.runtime.generation import _Generation as g; before = g._reason_to_end\n"
    "g._reason_to_end = lambda *a: (time.sleep(0.02), before(*a))[1]\n" + MAIN
)
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and terminals")


def start(
    *arguments: object, code: str = MAIN, env: Mapping[str, str] | None = None, **options: Any
) -> Popen[Any]:
    """The program as a process, its streams in pipes; `code` runs it."""
    return Popen(
        [sys.executable, "-c", code, *(one if isinstance(one, bytes) else str(one) for one in arguments)],
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        **{**HEEDING, **options},
    )


def state(model: BltModel, start: bytes = b"", **fields: Any) -> ChatSession:
    return ChatSession(model, GenerationOptions(**{"max_new_bytes": 20, "draft": "none", **fields}), start)


def go_on(chat: ChatSession, typed: bytes = b"") -> str:
    written: list[bytes] = []
    chat.turn(typed, written.append, threading.Event())
    return b"".join(written).decode("utf-8", "replace")


def visible(data: bytes) -> str:
    """What is shown of an answer: a last character that is not complete waits for the next turn."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def closed(data: bytes) -> str:
    """An answer on stdout, where what follows begins on a line of its own."""
    shown = visible(data)
    return shown if shown.endswith("\n") or not shown else shown + "\n"


def assert_sound(chat: ChatSession) -> None:
    """The state is that of a beginning of the text."""
    read = chat.text[: max(0, chat.sequence.length - 1)]
    assert decode(chat.sequence.ids) == read
    assert read + chat.unread == chat.text
    if chat.sequence.length:
        expected = chat.model.logits(read)[-1]
        np.testing.assert_allclose(chat.sequence.logits, expected, rtol=0, atol=2e-5)
