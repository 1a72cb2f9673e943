"""What a caller may ask of a generation, checked when it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from .constraint import Constraint
from .errors import OptionError
from .fields import checked_bytes, checked_flag, checked_int, checked_real, shown
from .names import DRAFTS, VOCAB_SIZE

__all__ = ["LONGEST_DRAFT", "MOST_LOGPROBS", "GenerationOptions", "asked_options"]

LONGEST_DRAFT = 32
"""Guesses in a round, at most."""

MOST_LOGPROBS = 20
"""Likely ids that are told of a byte, at most."""

_LARGEST_BIAS = 100


_above = partial(checked_real, above_minimum=True)
_RANGES: tuple[tuple[Any, ...], ...] = (
    # check, field, least, most where there is one, hint; None is allowed where it is the default
    (checked_int, "max_new_bytes", 0, "0 = only read the prompt"),
    (checked_real, "temperature", 0, "0 = greedy"),
    (checked_int, "top_k", 0, "0 = off"),
    (_above, "top_p", 0, 1, "1 = off"),
    (checked_real, "min_p", 0, 1, "0 = off"),
    (_above, "repetition_penalty", 0, "1 = off"),
    (checked_int, "seed", 0, "or none"),
    (checked_int, "draft_length", 1, LONGEST_DRAFT, "or none"),
    (checked_int, "logprobs", 0, MOST_LOGPROBS, "or none"),
)


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated. Raises OptionError, one line, when a field is out of range.

    The defaults are greedy decoding; every other filter is off at its default.
    """

    max_new_bytes: int = 256
    """Generate at most this many bytes; 0 only reads the prompt."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely id (greedy), whatever top_k, top_p, min_p are."""

    top_k: int = 0
    """Keep the k most likely ids, and those as likely as the k-th; 0 turns it off."""

    top_p: float = 1.0
    """Keep the fewest most likely ids whose probabilities sum to at least this; in (0, 1], 1 turns it off."""

    min_p: float = 0.0
    """Keep ids at least this fraction as likely as the most likely one; in [0, 1], 0 turns it off."""

    repetition_penalty: float = 1.0
    """Logits of ids already in the text (prompt too) are divided by it when positive, multiplied when
    negative; > 0, 1 turns it off."""

    seed: int | None = None
    """Seed of the random numbers, >= 0; None draws a fresh one, so that each run differs."""

    stop: tuple[bytes | str, ...] = ()
    """Strings that end the text when they appear, and are not part of it. str is taken as UTF-8; surrogate
    escapes, which a command line's invalid bytes become, as those bytes. After construction all are bytes."""

    draft: str = "auto"
    """One of `DRAFTS`. Drafts make decoding faster; the text, sampled or greedy, stays what it is. Only in
    quantized bundles may a near-tie fall the other way: passes over several positions round otherwise."""

    draft_length: int | None = None
    """Guesses in a round, 1 to `LONGEST_DRAFT`; None goes by what pays. Fewer where the model was loaded with
    a smaller `rollback`, or `prefill_chunk` less one. No effect when `draft` is none."""

    details: bool = False
    """Tell of each byte where patches start, how uncertain the patcher was, and whether it was guessed
    (`scoring.ByteDetail`). Changes no byte."""

    logprobs: int | None = None
    """Tell, too, how probable each byte was, and this many of the ids that were most likely there, 0 to
    `MOST_LOGPROBS`. None tells nothing of it. Anything else turns `details` on."""

    prompt_details: bool = False
    """Tell the same of the prompt's bytes, too, with the first chunk. Turns `details` on."""

    constraint: Constraint | None = None
    """What the new text has to be; None: anything. Ids are chosen among those that may come next, which all
    else here then acts on; the text ends where it fits, and by itself where nothing can be added. One that
    ends for another reason (length, stop, context, cancelled) may lack its end. Needs the extra `guide`, but
    for a choice."""

    utf8: bool = False
    """Choose among the bytes that keep the text valid UTF-8, and end it between characters only. A character
    that the prompt ends inside of is completed, unless there is a constraint, too."""

    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """What is added to the logits of some ids, -100 to 100, after the repetition penalty. After construction
    pairs of id and bias, sorted."""

    def __post_init__(self) -> None:
        if not isinstance(self.draft, str) or self.draft not in DRAFTS:
            raise OptionError(f"draft is {shown(self.draft)}; allowed are {', '.join(DRAFTS)}")
        for check, name, *arguments, hint in _RANGES:
            value, default = getattr(self, name), getattr(type(self), name)
            if value is not None or default is not None:
                object.__setattr__(self, name, check(name, value, *arguments, hint=hint))
        object.__setattr__(self, "stop", _stop_bytes(self.stop))
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise OptionError(
                f"constraint is {shown(self.constraint)}; allowed is a Constraint, such as "
                "Constraint.regex('[0-9]+'), or none"
            )
        checked_flag("utf8", self.utf8)
        asked = checked_flag("details", self.details), checked_flag("prompt_details", self.prompt_details)
        object.__setattr__(self, "details", any(asked) or self.logprobs is not None)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias`, typed as the pairs it is after construction."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def stop_bytes(self) -> tuple[bytes, ...]:
        """`stop`, typed as the bytes it is after construction."""
        return _stop_bytes(self.stop)


def _stop_bytes(stops: object) -> tuple[bytes, ...]:
    # What only looks like a list, such as an array of no dimension, raises when it is asked for its items.
    with suppress(TypeError):
        if not isinstance(stops, (str, bytes, bytearray)) and isinstance(stops, Iterable):
            return tuple(map(_one_stop, list(stops)))
    raise OptionError(f"stop is {shown(stops)}; allowed is a list or tuple of strings or bytes")


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    pairs: list[Any] | None = None
    with suppress(TypeError):
        if not isinstance(bias, (str, bytes, bytearray)):
            pairs = list(bias.items() if isinstance(bias, Mapping) else bias)  # type: ignore[call-overload]
    if pairs is None or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise OptionError(f"logit_bias is {shown(bias)}; allowed is a mapping from ids to numbers")
    found = {}
    for number, value in pairs:
        known = checked_int(
            "logit_bias: an id", number, 0, VOCAB_SIZE - 1, hint="a byte's id is the byte + 4"
        )
        found[known] = checked_real("logit_bias", value, -_LARGEST_BIAS, _LARGEST_BIAS)
    return tuple(sorted(found.items()))


def _one_stop(stop: object) -> bytes:
    found = checked_bytes("a stop string", stop)
    if not found:
        raise OptionError("a stop string is empty; allowed are strings of at least one byte")
    return found


def asked_options(
    options: object, named: Mapping[str, Any], defaults: GenerationOptions
) -> GenerationOptions:
    """Options given as an object or by the names of their fields, the rest from `defaults`.

    Raises OptionError for both at a time, for a name that is no field, and for what is no such object.
    """
    names = [field.name for field in fields(GenerationOptions)]
    for name in named:
        if name not in names:
            raise OptionError(f"there is no option {shown(name)}; allowed are {', '.join(names)}")
    if options is None:
        return replace(defaults, **named) if named else defaults
    if not isinstance(options, GenerationOptions):
        raise OptionError(f"options is {shown(options)}; allowed is GenerationOptions, or its fields by name")
    if named:
        raise OptionError(
            f"options and {', '.join(named)} are given; give one or the other (dataclasses.replace makes "
            "options of others)"
        )
    return options
