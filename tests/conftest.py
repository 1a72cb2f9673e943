"""Fixtures that several test modules share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# tests/support holds helper modules; pytest's importlib mode puts no test folder on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

from support.torch_only import REASON

# A slow moment of a shared machine is no failure.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

if TYPE_CHECKING:
    from support.model_store import RandomModels


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> RandomModels:
    """Random checkpoints, their references and greedy samples, each made once per session."""
    from support.model_store import RandomModels

    return RandomModels(tmp_path_factory.mktemp("random-models"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Without torch: say how much was judged by golden files and numpy alone."""
    skipped = [report for report in terminalreporter.getreports("skipped") if REASON in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"without torch: {len(skipped)} tests and modules of tests were skipped, which compare with "
            "transformers as it runs; parity was judged by tests/data/golden"
        )
