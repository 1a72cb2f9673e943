"""How many texts a server has at work at a time, where nobody says."""

from __future__ import annotations

from ...runtime import BltModel
from ..memory import state_memory

__all__ = ["text_memory", "usual_parallel"]

TAKING_TURNS = 4
"""Texts where the bundle has no graphs for several in one pass. They are made no faster then, but a short one
need not wait for a long one's end."""


def text_memory(model: BltModel) -> int:
    """Bytes that a text of all positions takes."""
    limits = model.limits
    return state_memory(
        model.manifest,
        prefill_chunk=limits.prefill_chunk,
        rollback=limits.rollback,
        positions=limits.max_positions,
        prepared=model.engine.directory is not None,
    ).at_full_length


def usual_parallel(model: BltModel, kept: int) -> int:
    """As many as the bundle's packed graphs take in one pass, or `TAKING_TURNS`; fewer where texts of all
    positions, and one more, do not fit into the memory that is free beside `kept` bytes of states.
    """
    most, available = max(model.rows, default=TAKING_TURNS), model.available_memory()
    if available is None:
        return most
    return max(1, min(most, (available - kept) // text_memory(model) - 1))
