"""The chat template that a bundle gets, the checkpoint's own or a file, tried before anything is written.

As in transformers, `chat_template.jinja` wins over `chat_template` in `tokenizer_config.json`, of whose named
ones "default" is meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.chat_spec import LONGEST_EOS, ChatSpec
from ..runtime.chat_template import MOST_TEMPLATE_BYTES, ChatTemplate, TemplateError, template_text
from ..runtime.errors import OptionError
from ..runtime.fields import shown
from ..runtime.names import CHAT_TEMPLATE_NAME
from ..runtime.vocabulary import BYTE_OFFSET
from .checkpoint_base import CheckpointError, one_line, read_json

__all__ = ["NO_TEMPLATE", "ChatPlan", "find_chat_template"]

NO_TEMPLATE = "none"
"""In the place of a template's file: the checkpoint's own is left out."""

_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"
_DEFAULT = "default"
_OTHERWISE = "give another with --chat-template FILE, or leave it out with --chat-template none"


@dataclass(frozen=True)
class ChatPlan:
    """A template that a bundle will have; it renders a simple conversation."""

    text: str
    """The template."""
    spec: ChatSpec
    origin: str
    """Where it was found: a file, and which of the templates in it."""
    eos: str
    """What became of `eos_token`, in words."""


def find_chat_template(folder: Path, given: str | Path | None = None) -> ChatPlan | None:
    """Of the checkpoint in `folder`; None where there is none.

    given: a file to take in the place of the checkpoint's own, or `NO_TEMPLATE`; None takes the checkpoint's.
    Raises CheckpointError for a template that is no text, too long, no template, or does not render a simple
    conversation within its limits; OptionError where jinja2 is missing.
    """
    if given == NO_TEMPLATE:
        return None
    config = _json(folder / _CONFIG)
    path = folder / CHAT_TEMPLATE_NAME if given is None else Path(given)
    if given is not None or path.is_file():
        found, origin = _read(path), str(path)
    elif config.get("chat_template") is None:
        return None
    else:
        found, origin = _chosen(config["chat_template"], folder / _CONFIG)
    spec, told = _eos(folder, config)
    try:
        template = ChatTemplate(template_text(found), spec)
        template.check()
    except TemplateError as error:
        raise CheckpointError(f"{origin}: {error}; {_OTHERWISE}") from None
    except OptionError as error:
        raise OptionError(f"{error}; or leave the template out with --chat-template none") from None
    return ChatPlan(template.text, spec, origin, told)


def _json(path: Path) -> dict[str, Any]:
    """What a tokenizer's file says, nothing where there is none; nothing else is read from it."""
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or leave the chat template out with --chat-template none") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_TEMPLATE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}; {_OTHERWISE}") from None


def _chosen(value: Any, path: Path) -> tuple[bytes, str]:
    """The template that a config's `chat_template` means, and where it stands."""
    if isinstance(value, str):
        return _encoded(value, path), f"{path}, chat_template"
    named = value if isinstance(value, list) else [value]
    if not all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in named):
        told = f"chat_template is {shown(value)}; allowed are a text and a list of named ones"
        raise CheckpointError(f"{path}: {told}; {_OTHERWISE}")
    names = ", ".join(one_line(str(one["name"]))[:60] for one in named[:5])
    for one in named:
        if one["name"] == _DEFAULT and isinstance(one["template"], str):
            return _encoded(one["template"], path), f'{path}, chat_template "{_DEFAULT}" of {names}'
    told = f'chat_template has none named "{_DEFAULT}" (there are: {names or "none"})'
    raise CheckpointError(f"{path}: {told}; {_OTHERWISE}")


def _encoded(text: str, path: Path) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: chat_template has half a character; {_OTHERWISE}") from None


def _eos(folder: Path, config: dict[str, Any]) -> tuple[ChatSpec, str]:
    """What `eos_token` is in a template: text, unless the tokenizer has it as an id that has no bytes."""
    value = config.get("eos_token")
    text = value.get("content") if isinstance(value, dict) else value
    if text is None or text == "":
        return ChatSpec(), "no eos_token"
    if not isinstance(text, str) or not text.isprintable() or len(text) > LONGEST_EOS:
        told = f"eos_token is {shown(text)}; allowed is printable text of at most {LONGEST_EOS} characters"
        raise CheckpointError(f"{folder / _CONFIG}: {told}; correct it, or export with --chat-template none")
    if text in _special(folder, config):
        return (
            ChatSpec(),
            f"eos_token {shown(text)} is an id, empty in it",
        )
    return ChatSpec(text), f"eos_token {shown(text)} is text that ends an answer"


def _special(folder: Path, config: dict[str, Any]) -> set[str]:
    """Texts that the tokenizer has as one of the ids before the bytes'."""
    found: set[str] = set()
    decoder = config.get("added_tokens_decoder")
    tokenizer = _json(folder / _TOKENIZER)
    added, model = tokenizer.get("added_tokens"), tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(decoder, dict):
        pairs += [(number, one.get("content")) for number, one in decoder.items() if isinstance(one, dict)]
    if isinstance(added, list):
        pairs += [(one.get("id"), one.get("content")) for one in added if isinstance(one, dict)]
    if isinstance(vocabulary, dict):
        pairs += [(number, text) for text, number in vocabulary.items()]
    special = set(map(str, range(BYTE_OFFSET)))
    for number, text in pairs:
        if str(number) in special and isinstance(text, str):
            found.add(text)
    return found
