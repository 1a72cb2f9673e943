"""Whose turn it is: texts that only wait, so that everything that matters is their order."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

pytest.importorskip("greenlet", reason="needs greenlet: pip install 'blt-edge[serve]'")

from blt_edge.runtime.batch import Batch
from blt_edge.tools.server.jobs import Job, JobQueue, QueueFullError, pause
from hypothesis import given, settings
from hypothesis import strategies as st

TICK = 0.002


def until(reached: Callable[[], bool]) -> None:
    for _ in range(5000):
        if reached():
            return
        time.sleep(TICK)
    raise AssertionError("it did not happen within 10 s")


@dataclass
class Desk:
    """A queue, and what became of its jobs."""

    queue: JobQueue
    begun: list[str] = field(default_factory=list)
    """Names of texts, in the order in which they began."""
    most: int = 0
    """Texts that were at work at a time."""
    ended: dict[str, Exception | None] = field(default_factory=dict)
    """Jobs that have ended, and what of."""
    gates: dict[str, threading.Event] = field(default_factory=dict)
    """A text ends when its gate is open."""
    reported: list[Exception] = field(default_factory=list)

    def job(self, name: str, texts: int = 1, client: Hashable = None, *, read: bool = False) -> Job:
        """A job of texts NAME0, NAME1 ...; read: others than the first may begin once that has ended."""

        def made(cancel: threading.Event) -> Iterator[Callable[[], None] | None]:
            for number in range(texts):
                while read and number and f"{name}0" not in self.gates_passed:
                    yield None
                yield partial(self.text, f"{name}{number}", cancel)

        for number in range(texts):
            self.gates[f"{name}{number}"] = threading.Event()
        job = Job(made, partial(self.ended.__setitem__, name), client)
        self.queue.submit(job)
        return job

    gates_passed: set[str] = field(default_factory=set)

    def text(self, name: str, cancel: threading.Event) -> None:
        self.begun.append(name)
        self.most = max(self.most, self.queue.at_work)
        pause(lambda: self.gates[name].is_set() or cancel.is_set())
        self.gates_passed.add(name)

    def open(self, *names: str) -> None:
        for name in names:
            self.gates[name].set()
        self.queue.look()

    def wait(self, *begun: str) -> None:
        """Until exactly these have begun, in this order."""
        until(lambda: len(self.begun) >= len(begun))
        time.sleep(5 * TICK)  # and no other
        assert self.begun == [*begun]


@contextmanager
def desk(
    parallel: int, capacity: int = 100, batch: Callable[[], Batch] = lambda: Batch(8, 16)
) -> Iterator[Desk]:
    reported: list[Exception] = []
    one = Desk(JobQueue(capacity, batch, parallel, report=reported.append), reported=reported)
    try:
        yield one
    finally:
        one.queue.close(10)
        assert not one.queue._thread.is_alive()
        assert one.queue.idle


def test_one_at_a_time_in_the_order_they_came() -> None:
    with desk(1) as it:
        for name in "abc":
            it.job(name)
        it.wait("a0")
        it.open("b0", "c0")
        it.wait("a0")
        it.open("a0")
        it.wait("a0", "b0", "c0")
        until(lambda: it.ended == dict.fromkeys("abc"))
        assert it.most == 1


def test_as_many_as_may_begin_at_once_and_the_rest_when_there_is_room() -> None:
    with desk(3) as it:
        for name in "abcde":
            it.job(name)
        it.wait("a0", "b0", "c0")
        assert (it.queue.waiting, it.queue.at_work) == (2, 3)
        it.open("b0")
        it.wait("a0", "b0", "c0", "d0")
        it.open("a0", "d0")
        it.wait("a0", "b0", "c0", "d0", "e0")


def test_a_job_of_many_texts_leaves_room_for_others() -> None:
    with desk(2) as it:
        it.job("a", 6)
        it.wait("a0", "a1")
        it.job("b")  # one more than may be, since all others are one's
        it.job("c")
        it.wait("a0", "a1", "b0")
        it.open("a0")
        it.wait("a0", "a1", "b0")  # two are at work
        it.open("b0")
        it.wait("a0", "a1", "b0", "c0")  # before all of the first one's
        it.open("c0")
        it.wait("a0", "a1", "b0", "c0", "a2")
        assert it.most == 3


def test_with_one_at_a_time_jobs_of_many_texts_take_turns() -> None:
    with desk(1) as it:
        it.job("a", 3)
        it.wait("a0")
        it.job("b", 2)
        it.job("c")
        it.open(*it.gates)
        it.wait("a0", "b0", "c0", "a1", "b1", "a2")


def test_a_client_of_many_jobs_has_no_more_than_one_of_few() -> None:
    with desk(2) as it:
        for name in "abcd":
            it.job(name, client="much")
        it.wait("a0", "b0")
        it.job("x", client="little")
        it.wait("a0", "b0", "x0")
        it.job("y", client="little")
        it.open("a0", "x0")
        it.wait("a0", "b0", "x0", "y0")
        it.open("y0", "b0")
        it.wait("a0", "b0", "x0", "y0", "c0", "d0")


def test_texts_that_can_not_begin_yet_hold_no_room() -> None:
    with desk(2) as it:
        it.job("a", 3, read=True)
        it.job("b")
        it.wait("a0", "b0")
        it.open("b0")
        it.job("c")
        it.wait("a0", "b0", "c0")
        it.open("a0", "c0")
        it.wait("a0", "b0", "c0", "a1", "a2")


def test_what_is_full_says_so() -> None:
    with desk(2, capacity=1) as it:
        for name in "abc":
            it.job(name)
        it.wait("a0", "b0")
        with pytest.raises(QueueFullError):
            it.job("d")
        it.open("a0")
        it.wait("a0", "b0", "c0")
        it.job("d")
    with desk(2, capacity=0) as it:
        for name in "ab":
            it.job(name)
        with pytest.raises(QueueFullError):
            it.job("c")


def test_a_job_that_is_withdrawn() -> None:
    with desk(1) as it:
        first, second = it.job("a", 3), it.job("b")
        it.wait("a0")
        it.queue.withdraw(second)
        it.queue.withdraw(first)
        until(lambda: it.queue.idle)
        assert (it.begun, it.ended) == (["a0"], {"a": None})
        assert not it.queue.forget(first)


def test_an_error_ends_its_own_job_only() -> None:
    broken = ValueError("broken")

    def made(cancel: threading.Event) -> Iterator[Callable[[], None]]:
        yield partial(it.text, "x0", cancel)
        yield partial(fail)
        yield partial(it.text, "x2", cancel)

    def fail() -> None:
        raise broken

    def unmade(cancel: threading.Event) -> Iterator[Callable[[], None]]:
        raise broken
        yield

    with desk(3) as it:
        it.job("a")
        it.wait("a0")
        it.gates["x0"] = it.gates["x2"] = threading.Event()
        for name, texts in (("x", made), ("y", unmade)):
            it.queue.submit(Job(texts, partial(it.ended.__setitem__, name)))
        until(lambda: it.ended.keys() == {"x", "y"})
        assert it.ended == {"x": broken, "y": broken}
        assert "x2" not in it.begun
        it.open("a0")
        until(lambda: it.ended == {"x": broken, "y": broken, "a": None})


def test_a_batch_that_fails_is_replaced() -> None:
    class Failing(Batch):
        left = 3

        def step(self) -> bool:
            going_on = super().step()
            Failing.left -= 1
            if Failing.left == 0:
                raise RuntimeError("the batch is broken")
            return going_on

    with desk(2, batch=lambda: Failing(8, 16)) as it:
        it.job("a")
        it.job("b")
        until(lambda: len(it.begun) == 2)
        while len(it.ended) < 2:
            it.queue.look()
            time.sleep(TICK)
        assert [str(error) for error in it.ended.values()] == ["the batch is broken"] * 2
        assert len(it.reported) == 1
        it.job("c")
        it.open("c0")
        until(lambda: it.ended.get("c", 0) is None)


def test_closing_tells_everybody_at_work() -> None:
    with desk(2) as it:
        for name in "abc":
            it.job(name)
        it.wait("a0", "b0")
        it.queue.close(10)
        assert it.ended == {"a": None, "b": None}
        with pytest.raises(QueueFullError):
            it.job("d")


def test_what_no_text_may_raise_ends_the_jobs_at_work_and_not_the_thread() -> None:
    with desk(2) as it:

        def panic(cancel: threading.Event) -> Iterator[Callable[[], None]]:
            yield partial(sys.exit, "a library has had enough")

        told: list[Exception | None] = []
        it.queue.submit(Job(panic, told.append))
        until(lambda: bool(told))
        assert "a library has had enough" in repr(told[0])
        it.job("a")
        it.open("a0")
        until(lambda: it.ended == {"a": None})
        assert len(it.reported) == 1


def test_the_expected_wait_counts_how_many_go_side_by_side() -> None:
    for parallel in (1, 4):
        with desk(parallel) as it:
            assert it.queue.expected_wait == 0
            it.job("a")
            it.wait("a0")  # its turn has come
            time.sleep(0.1)
            it.open("a0")
            until(lambda: "a" in it.ended)
            for name in "bcdefghi":
                it.job(name)
            usual = it.queue._usual_seconds
            assert usual >= 0.1
            assert it.queue.expected_wait == pytest.approx(8 * usual / parallel)


_JOB = st.tuples(
    st.integers(1, 4),  # texts
    st.sampled_from("pqr"),  # client
    st.lists(st.integers(0, 3), min_size=4, max_size=4),  # pauses of each
    st.sampled_from(["ends", "ends", "fails", "is withdrawn"]),
)


@settings(max_examples=30)
@given(st.integers(1, 4), st.lists(_JOB, max_size=12))
def test_whatever_is_asked_every_job_ends_once_and_never_too_many_are_at_work(
    parallel: int, jobs: Any
) -> None:
    ended: list[int] = []
    errors: dict[int, Exception | None] = {}
    made: dict[int, int] = {}
    most = 0

    def text(number: int, pauses: int, what: str) -> None:
        nonlocal most
        most = max(most, it.queue.at_work)
        for _ in range(pauses):
            asked = iter([False])
            pause(lambda asked=asked: next(asked, True))
            it.queue.look()
        made[number] = made.get(number, 0) + 1
        if what == "fails":
            raise ValueError(number)

    def end(number: int, error: Exception | None) -> None:
        ended.append(number)
        errors[number] = error

    with desk(parallel) as it:
        submitted = []
        for number, (texts, client, pauses, what) in enumerate(jobs):

            def made_of(
                cancel: Any, number: int = number, texts: int = texts, pauses: Any = pauses, what: str = what
            ) -> Any:
                return (partial(text, number, pauses[each], what) for each in range(texts))

            job = Job(made_of, partial(end, number), client)
            it.queue.submit(job)
            submitted.append(job)
            if what == "is withdrawn":
                it.queue.withdraw(job)
        until(lambda: it.queue.idle)
        assert len(ended) == len(set(ended))
        for number, (texts, _, _, what) in enumerate(jobs):
            if what == "ends":
                assert (made[number], errors[number]) == (texts, None)
            elif what == "fails":
                assert errors[number].args == (number,)
            elif submitted[number].began is None:
                assert number not in errors
            else:
                assert errors[number] is None
        assert most <= parallel + (parallel > 1)
        assert it.reported == []
