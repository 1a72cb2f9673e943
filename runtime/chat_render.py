"""Renders chat templates, in the process of a worker: nobody else imports this, or jinja2.

A template is a program by whoever made the bundle. jinja2's sandbox keeps it from Python's insides, and the
process' limits from memory and time. What a template finds is what transformers gives it, so that one renders
the same here and there.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from importlib import metadata
from typing import Any, NoReturn

from .errors import OptionError, requirement
from .fields import plain_text

try:
    from jinja2 import Template, TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace
except ImportError:
    JINJA = None
else:
    JINJA = metadata.version("jinja2")

__all__ = ["MOST_RENDERED", "render"]

MOST_RENDERED = 4 << 20
"""Characters that a template may make of a conversation."""

_OLDEST = (3, 1, 6)
"""Sandboxes of older versions can be left."""
_LONGEST_REASON = 300
_KEPT = 4


def render(request: dict[str, Any]) -> dict[str, str]:
    """Render `template` with `messages` (objects of `role`, `content` and what else the template knows) and
    `eos_token`, up to where the model answers.

    Returns one of: `text`, what was rendered; `refused`, what the template's `raise_exception` said;
    `failed`, why the template can't be rendered, one line. Raises OptionError where jinja2 is missing.
    """
    _check_jinja()
    names = {"messages": request["messages"], "tools": None, "documents": None, "add_generation_prompt": True}
    strings = {"bos_token": "", "eos_token": request["eos_token"]}
    pieces, size = [], 0
    try:
        for piece in _compiled(request["template"]).generate(**names, **strings):
            size += len(piece)
            if size > MOST_RENDERED:
                return {"failed": f"it makes more than {MOST_RENDERED} characters"}
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # half a character, which a template can write, is no text
    except _RefusalError as error:
        return {"refused": _one_line(str(error))}
    except MemoryError:
        return {"failed": "it takes more memory than it may have"}
    except Exception as error:
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if isinstance(line, int) else ""
        return {"failed": _one_line(f"{type(error).__name__}{place}: {error}")}
    return {"text": text}


def _one_line(text: str) -> str:
    return plain_text(" ".join(text[: 4 * _LONGEST_REASON].split()).rstrip("."), _LONGEST_REASON)


def _check_jinja() -> None:
    numbers = [] if JINJA is None else JINJA.split(".")[:3]
    if tuple(int("".join(filter(str.isdecimal, one)) or 0) for one in numbers) < _OLDEST:
        raise OptionError(
            f"chat templates need jinja2 {'.'.join(map(str, _OLDEST))} or newer, here is {JINJA or 'none'}: "
            f"pip install {requirement('serve')}"
        )


@lru_cache(maxsize=_KEPT)
def _compiled(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _dict,
    }
    return environment.from_string(text)


# What templates find.

if JINJA is not None:

    class _RefusalError(TemplateError):
        """The template's own word against a conversation."""

    class _Generation(Extension):
        """`{% generation %}` marks what an assistant says, for training; here it is its contents."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class _Namespace(Namespace):
        """Without names that Python has a meaning for."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__()
            for name, value in dict(*given, **named).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace has no name {name!r}")
            super().__setitem__(name, value)


def _raise_exception(message: Any = "") -> NoReturn:
    raise _RefusalError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own makes it fit for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*given: Any, **named: Any) -> dict[Any, Any]:
    return dict(*given, **named)
