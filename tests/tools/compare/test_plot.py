"""The picture of a comparison: points where the figures are, names beside them."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from blt_edge.export.quality import Tally
from blt_edge.runtime.errors import BltError
from blt_edge.tools.compare import CompareOptions
from blt_edge.tools.compare.bundles import BundleReport, Comparison
from blt_edge.tools.compare.plot import _places, draw_comparison

NEEDS_MATPLOTLIB = "needs matplotlib: pip install 'blt-edge[plot]'"


def comparison(*bits: float) -> Comparison:
    reports = [
        BundleReport(
            path=f"/some/where/bundle-{index}",
            precisions={"encoder": "fp32"},
            tables="fp16",
            graph_bytes=10_000_000 // (index + 1),
            table_bytes=5_000_000,
            texts={name: Tally(bytes=1000, bits=1000 * value) for name in ("a <b>.txt", "c$d$.txt")},
            greedy_leads=[(3, 4)],
            prefill_bytes_per_second=1000.0,
            decode_bytes_per_second=100.0 * (index + 1),
            load_seconds=1.0,
            peak_resident=None,
            peak_private=None,
            tables_resident=None,
        )
        for index, value in enumerate(bits)
    ]
    sizes = {"a <b>.txt": 1000, "c$d$.txt": 1000}
    return Comparison(reports, CompareOptions(), 128, sizes, {"processor": "Some Processor", "cpus": 2})


@pytest.mark.parametrize("bits", [(1.5, 1.51, 1.7), (1.5, 1.5), (1.5,)])
def test_a_picture(tmp_path: Path, bits: tuple[float, ...]) -> None:
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    draw_comparison(comparison(*bits), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw_comparison(comparison(*bits), tmp_path / "out.svg")
    assert "bundle-0" in (tmp_path / "out.svg").read_text()


def test_points_lie_where_the_figures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    scatter = Axes.scatter

    def watched(self: Axes, across: Any, up: Any, **options: Any) -> Any:
        drawn.append((list(across), list(up), list(options["c"])))
        return scatter(self, across, up, **options)

    monkeypatch.setattr(Axes, "scatter", watched)
    draw_comparison(comparison(1.5, 1.6), tmp_path / "out.png")
    assert drawn == [([15.0, 10.0], [1.5, 1.6], [100.0, 200.0])] * 2


@pytest.mark.parametrize(
    "bits", [(1.8759, 1.8759, 1.8770, 1.8760, 1.8789), (1.5,) * 5, (1.5, 1.5001, 1.5, 9, 9.0001)]
)
def test_names_do_not_cover_each_other(bits: tuple[float, ...]) -> None:
    sizes = [27.3, 16.6, 9.1, 9.6, 7.3]
    places = _places(sizes, list(bits))
    # 250 points for 1.4 of the range, or for 0.02 where that is more.
    point = max(1.4 * (max(bits) - min(bits)), 0.02) / 250
    for one, other in combinations(range(5), 2):
        if abs(sizes[one] - sizes[other]) < 5:
            heights = [bits[at] / point + places[at][1] for at in (one, other)]
            assert abs(heights[0] - heights[1]) >= 12


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BltError, match=r"pip install 'blt-edge\[plot\]'"):
        draw_comparison(comparison(1.5), tmp_path / "out.png")
