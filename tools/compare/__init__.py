"""Bundles side by side: what may be asked of a comparison; nothing slow is imported to ask it."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.fields import checked_int

_MOST = 1_000_000_000


@dataclass(frozen=True)
class CompareOptions:
    """What to measure on each text. Raises OptionError for a value out of range."""

    context: int | None = None
    """Ids in a window, BOS included; None = the trained context of the first bundle."""
    max_bytes: int | None = None
    """Bytes of each text at most, in windows spread evenly over it; None = all."""
    prompts: int = 20
    """Greedy texts whose identical lead is measured."""
    lead_bytes: int = 64
    """Bytes of each greedy text."""
    prompt_bytes: int = 512
    """Bytes read at once to time prefill."""
    new_bytes: int = 128
    """Bytes read one by one to time decoding."""
    repeat: int = 3
    """Timings; the median counts."""
    device: str = "auto"
    """Where to run, as in `BltModel.load`."""
    threads: int | None = None
    """CPU threads; None: as many as are free, the same for all bundles."""

    def __post_init__(self) -> None:
        for name in ("lead_bytes", "prompt_bytes", "new_bytes", "repeat"):
            checked_int(name, getattr(self, name), 1, _MOST)
        checked_int("prompts", self.prompts, 0, _MOST)
        for name, least in {"context": 2, "max_bytes": 1, "threads": 1}.items():
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name), least, _MOST)
