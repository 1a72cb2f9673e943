"""blt_edge.runtime: run a BLT bundle. Needs numpy and an inference engine, never torch or onnx.

Names are imported when they are first used, so that a program that only asks for words or errors stays quick.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .constraint import Constraint
    from .errors import (
        BackendError,
        BltError,
        BltWarning,
        BundleError,
        FailedValidationWarning,
        NotValidatedHereWarning,
        OptionError,
        OutOfMemoryError,
        PromptTooLongError,
        StateError,
    )
    from .generation import FinishReason, GenerationChunk, GenerationResult, GenerationStats
    from .model import BltModel
    from .names import DEVICES
    from .options import GenerationOptions
    from .prefix_store import PrefixStore
    from .scorer import Scorer
    from .scoring import ByteDetail, Score
    from .sequence import Sequence

# From 1.32 on ONNX Runtime's wheels write to the home directory and look up a host of Microsoft's, unless
# this is set before the import. Every way in passes here: library, commands, child processes, server.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "constraint": ("Constraint",),
    "errors": (
        "BackendError",
        "BltError",
        "BltWarning",
        "BundleError",
        "FailedValidationWarning",
        "NotValidatedHereWarning",
        "OptionError",
        "OutOfMemoryError",
        "PromptTooLongError",
        "StateError",
    ),
    "generation": ("FinishReason", "GenerationChunk", "GenerationResult", "GenerationStats"),
    "model": ("BltModel",),
    "names": ("DEVICES",),
    "options": ("GenerationOptions",),
    "prefix_store": ("PrefixStore",),
    "scorer": ("Scorer",),
    "scoring": ("ByteDetail", "Score"),
    "sequence": ("Sequence",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DEVICES",
    "BackendError",
    "BltError",
    "BltModel",
    "BltWarning",
    "BundleError",
    "ByteDetail",
    "Constraint",
    "FailedValidationWarning",
    "FinishReason",
    "GenerationChunk",
    "GenerationOptions",
    "GenerationResult",
    "GenerationStats",
    "NotValidatedHereWarning",
    "OptionError",
    "OutOfMemoryError",
    "PrefixStore",
    "PromptTooLongError",
    "Score",
    "Scorer",
    "Sequence",
    "StateError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
