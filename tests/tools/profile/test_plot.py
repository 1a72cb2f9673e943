"""Pictures are drawn, in every format and for every kind of sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from blt_edge.tools.profile.plot import draw_profile
from support.profiles import make_case, make_profile, make_round

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'blt-edge[plot]'")


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_one_case(tmp_path: Path, kind: str, start: bytes) -> None:
    draw_profile(make_profile(), tmp_path / "picture", kind)
    assert (tmp_path / "picture").read_bytes().startswith(start)


def test_sweeps_say_what_is_what(tmp_path: Path) -> None:
    drafts = make_case(make_round(rounds=1, drafted=2, accepted=1), threads=None, draft="auto")
    draw_profile(make_profile(drafts), tmp_path / "drafts.svg", "svg")
    assert "every byte" in (tmp_path / "drafts.svg").read_text()
    short = [make_case(threads=threads) for threads in (1, 2)]
    longer = [make_case(make_round(prompt_bytes=400), threads=threads) for threads in (1, 2)]
    draw_profile(make_profile(*short), tmp_path / "bars.svg", "svg")
    draw_profile(make_profile(*short, *longer, prompt_bytes=(4, 400)), tmp_path / "lines.svg", "svg")
    bars, lines = ((tmp_path / f"{name}.svg").read_text() for name in ("bars", "lines"))
    assert "decoding speed after 4 bytes" in bars
    assert "positions read before the byte" in lines
    assert "1 thread, 400 B" in lines
