"""The queue and its one thread: order, limits, and what becomes of jobs that nobody wants."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from blt_edge.tools.server.worker import Began, Ended, Job, QueueFullError, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(2)
    yield worker
    worker.close()


class Work:
    """A job of three steps that begins when it is let."""

    def __init__(self, name: str, letters: list[Any], error: Exception | None = None) -> None:
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()
        self._name, self._letters, self._error = name, letters, error
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

    def _deliver(self, letter: Any) -> None:
        self._letters.append(letter)
        if isinstance(letter, Ended):
            self.ended.set()


def test_one_after_the_other(worker: Worker) -> None:
    letters: list[Any] = []
    works = [Work(name, letters) for name in "abc"]
    for work in works:
        worker.submit(work.job)
    for work in reversed(works):
        work.go.set()
    assert works[-1].ended.wait(30)
    steps = [letter for letter in letters if isinstance(letter, str)]
    assert steps == [f"{name}{step}" for name in "abc" for step in range(3)]
    assert letters[0] == Began()
    assert letters.count(Ended()) == 3


def test_no_more_than_the_capacity_waits(worker: Worker) -> None:
    works = [Work(name, []) for name in "abcd"]
    worker.submit(works[0].job)
    assert works[0].begun.wait(30)
    worker.submit(works[1].job)
    worker.submit(works[2].job)
    assert worker.waiting == 2
    assert not worker.idle
    with pytest.raises(QueueFullError):
        worker.submit(works[3].job)
    assert worker.forget(works[1].job)
    worker.submit(works[3].job)
    for work in works:
        work.go.set()
    assert works[3].ended.wait(30)
    assert not works[1].begun.is_set()
    assert worker.expected_wait < 60


def test_a_job_that_waits_is_forgotten_and_one_that_runs_is_told(worker: Worker) -> None:
    letters: list[Any] = []
    running, waiting = Work("a", letters), Work("b", letters)
    worker.submit(running.job)
    assert running.begun.wait(30)
    worker.submit(waiting.job)
    worker.withdraw(waiting.job)
    worker.withdraw(running.job)
    assert not worker.forget(running.job)
    running.go.set()
    assert running.ended.wait(30)
    assert letters == [Began(), "a cancelled", Ended()]
    assert worker.waiting == 0


def test_an_error_is_a_jobs_last_word_and_the_next_one_runs(worker: Worker) -> None:
    letters: list[Any] = []
    error = RuntimeError("broken")
    works = [Work("a", letters, error), Work("b", letters)]
    for work in works:
        work.go.set()
        worker.submit(work.job)
    assert works[1].ended.wait(30)
    assert letters[4] == Ended(error)
    assert letters[-1] == Ended()


def test_nothing_may_wait_but_one_may_run() -> None:
    worker = Worker(0)
    first, second = Work("a", []), Work("b", [])
    worker.submit(first.job)
    with pytest.raises(QueueFullError):
        worker.submit(second.job)
    first.go.set()
    worker.close()


def test_closing_ends_what_runs_and_forgets_what_waits(worker: Worker) -> None:
    letters: list[Any] = []
    running, waiting = Work("a", letters), Work("b", letters)
    worker.submit(running.job)
    assert running.begun.wait(30)
    worker.submit(waiting.job)
    running.go.set()
    running.job.cancel.set()
    worker.close()
    assert not waiting.begun.is_set()
    assert isinstance(letters[-1], Ended)
    with pytest.raises(QueueFullError):
        worker.submit(waiting.job)
