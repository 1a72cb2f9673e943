"""That a bundle has a chat template, and what the template's special strings are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .fields import Fields, by
from .names import CHAT_TEMPLATE_NAME

__all__ = ["CHAT_TEMPLATE_NAME", "LONGEST_EOS", "ChatSpec"]

LONGEST_EOS = 100
"""Characters that the text of `eos_token` may have."""


@dataclass(frozen=True)
class ChatSpec:
    """Of a bundle that has the file `CHAT_TEMPLATE_NAME`."""

    eos: Annotated[str | None, by(Fields.text_or_none, LONGEST_EOS)] = None
    """What `eos_token` is in the template, and what ends an answer of the model, too. None where it is no
    text: the id that ends texts has no bytes, so it is empty in the template. `bos_token` always is: the
    runtime begins every text with `BOS` itself."""
