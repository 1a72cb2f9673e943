"""What /proc/stat says of others' work."""

from __future__ import annotations

import pytest
from blt_edge.runtime import host
from blt_edge.runtime.host import OtherLoad, busy_ticks

# user nice system idle iowait irq softirq steal guest guest_nice
STAT = "cpu  100 20 30 4000 500 6 7 8 90 1\ncpu0 1 1 1 1 1 1 1 1 1 1\n"


def test_work_is_all_but_waiting_and_guests_twice() -> None:
    assert busy_ticks(STAT) == 100 + 20 + 30 + 6 + 7 + 8


@pytest.mark.parametrize("text", ["", "\n", "cpu  1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n"])
def test_a_system_that_tells_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert busy_ticks(text) is None
    monkeypatch.setattr(host, "read_text", lambda path: text)
    with OtherLoad() as other:
        pass
    assert other.cores is None


def test_a_moment_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "read_text", lambda path: STAT)
    with OtherLoad() as other:
        pass
    assert other.cores is None


def test_our_own_work_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors busy for ten seconds, a half of one with us."""
    ticks = iter((STAT, STAT.replace("cpu  100", f"cpu  {100 + 20 * host.os.sysconf('SC_CLK_TCK')}")))
    own, clock = iter((1.0, 6.0)), iter((50.0, 60.0))
    monkeypatch.setattr(host, "read_text", lambda path: next(ticks))
    monkeypatch.setattr(host.time, "process_time", lambda: next(own))
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    with OtherLoad() as other:
        pass
    assert other.cores == pytest.approx(1.5)
