"""A sweep of thresholds: each point is what scoring with that rule gives."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from blt_edge.runtime import BltModel, OptionError
from blt_edge.runtime.errors import BltError, requirement
from blt_edge.runtime.patching import PatchingRule
from blt_edge.tools.patch_view.sweep import draw_sweep, sweep
from support.random_models import PARITY_TEXT

TEXTS = [PARITY_TEXT[:120], PARITY_TEXT[120:180]]


def test_a_point_is_what_that_threshold_scores(model: BltModel) -> None:
    rule = model.manifest.patching
    points = list(sweep(model, TEXTS, [99.0, 0.0, rule.threshold], context=100))
    assert [point.threshold for point in points] == [rule.threshold, 0.0, 99.0]
    assert [point.bundles for point in points] == [True, False, False]
    for point in points:
        scores = [
            model.with_patching(replace(rule, threshold=point.threshold)).score(text, context=100)
            for text in TEXTS
        ]
        bits = sum(score.bits_per_byte * score.bytes for score in scores)
        assert point.bits_per_byte == pytest.approx(bits / 180)
    # Over nothing every byte is a patch; over everything a window is one.
    assert points[1].bytes_per_patch == 1
    assert points[2].bytes_per_patch == 60
    assert model.manifest.patching == rule


def test_another_rule_shares_the_model_and_leaves_it(model: BltModel) -> None:
    space = model.with_patching(PatchingRule("space"))
    every_byte = model.with_patching(PatchingRule("byte"))
    assert every_byte.patch_lengths(b"one two") == [1] * 8
    assert len(space.patch_lengths(b"one two")) < 8
    assert space.manifest.patching.mode == "space"
    assert model.manifest.patching.mode == "entropy"
    with pytest.raises(OptionError, match="mode space has no threshold"):
        sweep(space, TEXTS, [1.0])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture(model: BltModel, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'blt-edge[plot]'")
    draw_sweep(list(sweep(model, TEXTS, [1.0, 5.0])), tmp_path / "out", kind, "tiny $ on a_text")
    assert (tmp_path / "out").read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BltError, match=re.escape(f"pip install {requirement('plot')}")):
        draw_sweep([], tmp_path / "out", "png", "")
