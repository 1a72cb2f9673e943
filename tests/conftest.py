"""Fixtures that several test modules share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# A slow moment of a shared machine is no failure.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

# tests/support holds helper modules; pytest's importlib mode puts no test folder on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from support.random_models import RandomModels


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> RandomModels:
    """Random checkpoints, their references and greedy samples, each made once per session."""
    pytest.importorskip("transformers")
    from support.random_models import RandomModels

    return RandomModels(tmp_path_factory.mktemp("random-models"))
