"""How a checkpoint's makers mean it to generate: which ids end a text, and defaults of sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from .errors import BundleError, OptionError
from .fields import AGAIN, Fields, by
from .names import MANIFEST_NAME
from .options import GenerationOptions
from .vocabulary import EOS, SUPPRESSED, VOCAB_SIZE

__all__ = ["DEFAULTS", "GenerationSpec"]

DEFAULTS = ("max_new_bytes", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
"""Fields of `GenerationOptions` that a checkpoint may have defaults for."""


def _options(fields: Fields, key: str) -> dict[str, Any]:
    values = fields.tree(key)
    try:
        unknown = sorted(values.keys() - set(DEFAULTS))
        if unknown:
            raise OptionError(f"{unknown[0][:60]!r} is none of {', '.join(DEFAULTS)}")
        options = GenerationOptions(**values)
    except OptionError as error:
        raise BundleError(f"{MANIFEST_NAME}: {fields.path(key)}: {error}; {AGAIN}") from None
    return {name: values[name] if name == "stop" else getattr(options, name) for name in values}


@dataclass(frozen=True)
class GenerationSpec:
    """What the model's own files say, in the bundle's words."""

    end_ids: Annotated[tuple[int, ...], by(Fields.wholes, 0, VOCAB_SIZE - 1, VOCAB_SIZE)] = (EOS,)
    """Ids that end a text and are no part of it, sorted. A byte's id may be one of them."""
    options: Annotated[dict[str, Any], _options] = field(default_factory=dict)
    """Fields of `GenerationOptions` by name, those of `DEFAULTS` that have a default of the model's own."""
    left_out: Annotated[tuple[str, ...], by(Fields.texts, 1000)] = ()
    """What would change a text in transformers and is not done here, as "name=value"."""

    def __post_init__(self) -> None:
        if EOS not in self.end_ids:
            told = f"generation.end_ids: id {EOS} is missing, which ends every text"
            raise BundleError(f"{MANIFEST_NAME}: {told}; {AGAIN}")

    @property
    def defaults(self) -> GenerationOptions:
        """Options of a caller who asks for nothing."""
        return GenerationOptions(**self.options)

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that are never chosen: special ones that end no text."""
        return tuple(number for number in SUPPRESSED if number not in self.end_ids)
