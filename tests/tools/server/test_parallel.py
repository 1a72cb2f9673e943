"""How many texts are at work at a time, where nobody says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from blt_edge.runtime import BltModel
from blt_edge.tools.server import parallel
from blt_edge.tools.server.parallel import TAKING_TURNS, text_memory, usual_parallel


def like(model: BltModel, rows: tuple[int, ...], available: int | None) -> Any:
    fields = {name: getattr(model, name) for name in ("limits", "manifest", "engine")}
    return SimpleNamespace(**fields, rows=rows, available_memory=lambda: available)


def test_as_many_as_one_pass_takes_or_as_fit_beside_what_is_kept(model: BltModel) -> None:
    text = text_memory(model)
    assert 10_000 < text < 100_000_000
    assert usual_parallel(like(model, (2, 4, 8), None), 0) == 8
    assert usual_parallel(like(model, (), None), 0) == TAKING_TURNS
    assert usual_parallel(like(model, (2, 4, 8), 1 << 40), 0) == 8
    for texts in range(1, 8):  # and room for one more
        kept = 1 << 30
        assert usual_parallel(like(model, (2, 4, 8), kept + (texts + 1) * text), kept) == texts
        assert usual_parallel(like(model, (2,), kept + (texts + 1) * text), kept) == min(texts, 2)
    for available in (0, 1 << 30, (1 << 30) + text):
        assert usual_parallel(like(model, (8,), available), 1 << 30) == 1


@pytest.mark.parametrize("rows", [(), (2, 4, 8)])
def test_never_more_than_memory_holds(model: BltModel, rows: tuple[int, ...]) -> None:
    for available in range(0, 20 * text_memory(model), text_memory(model) // 3):
        texts = usual_parallel(like(model, rows, available), 0)
        assert texts == 1 or (texts + 1) * text_memory(model) <= available
    assert parallel.TAKING_TURNS > 1
