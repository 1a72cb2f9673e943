"""What a request asks its texts to fit, in the words of OpenAI, llama-server and vLLM, and `logit_bias`.

The rules of each kind are those of `runtime.constraint`; only the names are others'. What is wrong is told by
the name of the request's parameter. What this does not know: how a constraint is compiled (`compiling`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime import Constraint, OptionError
from ...runtime.fields import shown
from ...runtime.vocabulary import BYTE_OFFSET, EOS
from .refusals import ApiError, invalid
from .values import flag, option

__all__ = ["NAMES", "TextRules", "refused_constraint", "text_rules"]

END_ID = 256
"""What ends a text, by its number in `logit_bias`: the first that is no byte."""

_ID = re.compile(r"0|[1-9][0-9]{0,2}")
_FORMATS = {"text": (), "json_object": ("schema",), "json_schema": ("json_schema",)}
"""Types of `response_format`, and what goes with each; with json_object, a schema as llama-server has it."""


@dataclass(frozen=True)
class TextRules:
    """What may come in a request's texts."""

    options: dict[str, Any]
    """Fields of `GenerationOptions`: those of constraint, utf8 and logit_bias that were asked for."""
    constraint_field: str | None
    """The parameter that the constraint is from."""


def text_rules(given: Mapping[str, Any]) -> TextRules:
    """What the parameters of `NAMES` ask for.

    given: a request's parameters, without those that are null. Raises ApiError, also for two constraints.
    """
    options: dict[str, Any] = {}
    field, constraint = _constraint(given)
    if constraint is not None:
        options["constraint"] = constraint
    if flag("utf8", given):
        options["utf8"] = True
    if "logit_bias" in given:
        options["logit_bias"] = option("logit_bias", _biases(given["logit_bias"]), dict)
    return TextRules(options, field)


def refused_constraint(error: OptionError, field: str | None) -> ApiError:
    """A 400 that says what the runtime does of a constraint that `field` asked for."""
    told = str(error)
    if field is None or not told.startswith("constraint: "):
        return invalid(told)
    return invalid(f"{field}: {told.removeprefix('constraint: ')}", field)


# 1. Constraints.


def _constraint(given: Mapping[str, Any]) -> tuple[str | None, Constraint | None]:
    """The parameter that asks for one, and what for."""
    found: list[tuple[str, Constraint]] = []
    for field, read in _READERS.items():
        if field not in given:
            continue
        try:
            constraint = read(given[field])
        except OptionError as error:
            raise refused_constraint(error, field) from None
        if constraint is not None:
            found.append((field, constraint))
    if len(found) > 1:
        names = [field for field, _ in found]
        raise invalid(f"{' and '.join(names)} are given; a text can fit one of them only", names[1])
    return found[0] if found else (None, None)


def _response_format(value: Any) -> Constraint | None:
    name = "response_format"
    told = _members(name, value, ("type", "json_schema", "schema"))
    kind = told.pop("type", None)
    if not isinstance(kind, str) or kind not in _FORMATS:
        what = "has no type" if kind is None else f"has the type {shown(kind)}"
        raise invalid(f"{name} {what}; allowed are {', '.join(_FORMATS)}", name)
    for key in told:
        if key not in _FORMATS[kind]:
            raise invalid(f"{name} has {key}, which does not go with the type {kind}; leave it out", name)
    if kind == "json_schema":
        return _openai_schema(told.get("json_schema"))
    if kind == "json_object":
        return _schema(told["schema"]) if told else Constraint.json_object()
    return None


def _openai_schema(value: Any) -> Constraint:
    field, where = "response_format", "response_format.json_schema"
    told = _members(where, {} if value is None else value, ("name", "description", "schema", "strict"))
    for name, kind, words in (
        ("name", str, "a string"),
        ("description", str, "a string"),
        ("strict", bool, "true or false; a text fits in either case"),
    ):
        if name in told and not isinstance(told[name], kind):
            message = f"{where}.{name} is {shown(told[name])}; allowed is {words}"
            raise invalid(message, field, "invalid_type")
    if "schema" not in told:
        message = f"{where}.schema is missing; give a JSON schema, or the type json_object for any object"
        raise invalid(message, field, "missing_required_parameter")
    return _schema(told["schema"])


def _schema(value: Any) -> Constraint:
    return Constraint.json_schema(value)


def _regex(value: Any) -> Constraint:
    return Constraint("regex", value)


def _grammar(value: Any) -> Constraint | None:
    return (
        None if value == "" else Constraint("grammar", value)
    )  # what llama-server's clients say nothing with


def _choice(value: Any) -> Constraint:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise OptionError(f"constraint: the choice is {shown(value)}; allowed is a list of strings")
    return Constraint.choice(value)


def _structured_outputs(value: Any) -> Constraint | None:
    name = "structured_outputs"
    told = _members(name, value, tuple(_STRUCTURED))
    if told.get("json_object") is False:
        del told["json_object"]
    if len(told) != 1:
        what = f"has {' and '.join(told)}" if told else "has nothing that a text can fit"
        raise invalid(f"{name} {what}; allowed is one of {', '.join(_STRUCTURED)}", name)
    ((kind, asked),) = told.items()
    return _STRUCTURED[kind](asked)


def _any_object(value: Any) -> Constraint:
    if value is not True:
        raise OptionError(f"constraint: json_object is {shown(value)}; allowed is true or false")
    return Constraint.json_object()


_STRUCTURED: dict[str, Callable[[Any], Constraint | None]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}

_READERS: dict[str, Callable[[Any], Constraint | None]] = {
    "response_format": _response_format,
    "json_schema": _schema,
    "grammar": _grammar,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "structured_outputs": _structured_outputs,
}

NAMES = (*_READERS, "utf8", "logit_bias")
"""Parameters that say what may come."""


def _members(name: str, value: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
    """An object's members that are not null. Raises ApiError for others than those allowed."""
    field = name.partition(".")[0]
    if not isinstance(value, dict):
        raise invalid(f"{name} is {shown(value)}; allowed is an object", field, "invalid_type")
    told = {key: member for key, member in value.items() if member is not None}
    for key in told:
        if key not in allowed:
            raise invalid(
                f"{name} has {shown(key)}; allowed are {', '.join(allowed)}", field, "unknown_parameter"
            )
    return told


# 2. Biases.


def _biases(value: Any) -> dict[int, Any]:
    """`logit_bias` by the runtime's ids."""
    if not isinstance(value, dict):
        message = f"logit_bias is {shown(value)}; allowed is an object of token ids and what is added to each"
        raise invalid(message, "logit_bias", "invalid_type")
    biases = {}
    for key, bias in value.items():
        number = int(key) if _ID.fullmatch(key) else END_ID + 1
        if number > END_ID:
            raise invalid(
                f"logit_bias has the id {shown(key)}; allowed are byte values, 0 to 255, and {END_ID}, the "
                "end of the text: the model has no other tokens",
                "logit_bias",
            )
        biases[EOS if number == END_ID else number + BYTE_OFFSET] = bias
    return biases
