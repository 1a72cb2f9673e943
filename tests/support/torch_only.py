"""Tests that need torch or transformers themselves, and are skipped with this reason where they are not."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

__all__ = ["REASON", "torch_or_skip", "transformers_or_skip"]

REASON = "needs torch and transformers: pip install 'blt-edge[validate]'"


def torch_or_skip() -> Any:
    """The module torch; without it the test is skipped, or its whole module at import."""
    return pytest.importorskip("torch", reason=REASON)


def transformers_or_skip(module: str = "transformers") -> Any:
    """transformers or one of its modules, with torch; else skipped."""
    torch_or_skip()
    pytest.importorskip("transformers", reason=REASON)
    return importlib.import_module(module)
