"""Leases against plain lists: whoever appends to a shared log, nobody's log changes but its own."""

from __future__ import annotations

import threading

import pytest
from blt_edge.runtime.sharing import Lease
from hypothesis import given, settings
from hypothesis import strategies as st


class Log:
    """A list that forks share as caches do."""

    def __init__(self) -> None:
        self.buffer: list[int] = [-1] * 500
        self.length = 0
        self.lease = Lease()

    def fork(self) -> Log:
        other = Log.__new__(Log)
        other.buffer, other.length, other.lease = self.buffer, self.length, self.lease.fork(self.length)
        return other

    def append(self, values: list[int]) -> bool:
        """Whether it went in place."""
        end = self.length + len(values)
        mine = self.lease.claim(self.length, end)
        if not mine:
            self.buffer = self.buffer[: self.length] + [-1] * (500 - self.length)
            self.lease = Lease()
            assert self.lease.claim(self.length, end)
        self.buffer[self.length : end] = values
        self.length = end
        return mine


def furthest(log: Log, logs: list[Log]) -> int:
    """Up to where others that hold the same buffer have filled it."""
    return max((one.lease._end for one in logs if one is not log and one.buffer is log.buffer), default=0)


def check(logs: list[tuple[Log, list[int]]]) -> None:
    for one, wanted in logs:
        assert one.buffer[: one.length] == wanted
        assert one.lease.alone == (sum(other.buffer is one.buffer for other, _ in logs) == 1)


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "fork", "back", "drop"]), st.integers(0, 9), st.integers(1, 9)),
        max_size=40,
    )
)
def test_no_log_sees_another(steps: list[tuple[str, int, int]]) -> None:
    logs: list[tuple[Log, list[int]]] = [(Log(), [])]
    for number, (step, which, count) in enumerate(steps):
        log, truth = logs[which % len(logs)]
        if step == "append":
            values = [100 * number + place for place in range(count)]
            # In place wherever nobody else's part is in the way, and only there.
            reaches = furthest(log, [one for one, _ in logs])
            assert log.append(values) == (reaches <= len(truth))
            truth += values
        elif step == "fork":
            logs.append((log.fork(), list(truth)))
        elif step == "back":
            log.length = max(0, log.length - count)
            del truth[log.length :]
        elif len(logs) > 1:
            del logs[which % len(logs)]
        del log, truth
        check(logs)


def test_who_comes_first_writes_in_place_and_who_is_left_alone_again() -> None:
    log = Log()
    log.append([1, 2, 3])
    fork = log.fork()
    assert fork.append([4])
    assert not log.append([5])
    assert log.lease.alone
    assert fork.lease.alone
    last = fork.fork()
    del fork
    last.length = 0
    assert last.append([6])
    assert last.buffer[:4] == [6, 2, 3, 4]


@pytest.mark.parametrize("rounds", [50])
def test_only_one_of_several_threads_gets_the_same_slots(rounds: int) -> None:
    for _ in range(rounds):
        first = Lease()
        assert first.claim(0, 10)
        leases = [first, *(first.fork(10) for _ in range(3))]
        ready = threading.Barrier(len(leases))
        got: list[bool] = []

        def claim(lease: Lease, ready: threading.Barrier = ready, got: list[bool] = got) -> None:
            ready.wait()
            got.append(lease.claim(10, 11))

        threads = [threading.Thread(target=claim, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False, False, False, True]


def test_forks_that_are_gone_are_forgotten() -> None:
    lease = Lease()
    for _ in range(1000):
        lease.fork(1)
    assert len(lease._holders.leases) == 2
