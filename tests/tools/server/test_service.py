"""The queue and its one thread: order, limits, and what becomes of jobs that nobody wants."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from blt_edge.tools.server.service import Job, JobQueue, QueueFullError


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    queue = JobQueue(2)
    yield queue
    queue.close()


class Work:
    """A job of three steps that begins when it is let."""

    def __init__(self, name: str, arrived: list[Any], error: Exception | None = None) -> None:
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()
        self._name, self._arrived, self._error = name, arrived, error
        self.job = Job(self._steps, self._deliver)

    def _steps(self, cancel: threading.Event) -> Generator[str, None, None]:
        self.begun.set()
        assert self.go.wait(30)
        for step in range(3):
            if cancel.is_set():
                yield f"{self._name} cancelled"
                return
            yield f"{self._name}{step}"
        if self._error:
            raise self._error

    def _deliver(self, step: Any) -> None:
        self._arrived.append(step)
        if not isinstance(step, str):
            self.ended.set()


def test_one_after_the_other_and_an_error_is_a_jobs_last_word(queue: JobQueue) -> None:
    arrived: list[Any] = []
    error = RuntimeError("broken")
    works = [Work("a", arrived), Work("b", arrived, error), Work("c", arrived)]
    for work in works:
        queue.submit(work.job)
    for work in reversed(works):
        work.go.set()
    assert works[-1].ended.wait(30)
    assert arrived == ["a0", "a1", "a2", None, "b0", "b1", "b2", error, "c0", "c1", "c2", None]
    assert works[0].job.began < works[1].job.began  # type: ignore[operator]


def test_no_more_than_the_capacity_waits(queue: JobQueue) -> None:
    works = [Work(name, []) for name in "abcd"]
    queue.submit(works[0].job)
    assert works[0].begun.wait(30)
    queue.submit(works[1].job)
    queue.submit(works[2].job)
    assert queue.waiting == 2
    assert not queue.idle
    with pytest.raises(QueueFullError):
        queue.submit(works[3].job)
    assert queue.forget(works[1].job)
    queue.submit(works[3].job)
    for work in works:
        work.go.set()
    assert works[3].ended.wait(30)
    assert not works[1].begun.is_set()
    assert queue.expected_wait < 60


def test_nothing_may_wait_but_one_may_run() -> None:
    queue = JobQueue(0)
    first = Work("a", [])
    queue.submit(first.job)
    with pytest.raises(QueueFullError):
        queue.submit(Work("b", []).job)
    first.go.set()
    queue.close()


def test_closing_ends_what_runs_and_forgets_what_waits(queue: JobQueue) -> None:
    arrived: list[Any] = []
    running, waiting = Work("a", arrived), Work("b", arrived)
    queue.submit(running.job)
    assert running.begun.wait(30)
    queue.submit(waiting.job)
    closing = threading.Thread(target=queue.close)
    closing.start()
    assert running.job.cancel.wait(30)
    running.go.set()
    closing.join(30)
    assert not waiting.begun.is_set()
    assert arrived == ["a cancelled", None]
    with pytest.raises(QueueFullError):
        queue.submit(waiting.job)
