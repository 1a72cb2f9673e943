"""Jobs that wait for their turn, and a thread that has a few texts of theirs at work at a time.

A job is a request's: one text or several. Whenever there is room for a text, it goes to whoever has least at
work: the client first, then the job, then who has waited longest. So nobody waits for all texts of a job that
has many, and a client with many jobs has no more of the model than one with few.
What this does not know: what a text is, how passes are shared (`runtime.batch`), who clients are.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import count

from ...runtime.batch import Batch
from ...runtime.lanes import LANE

__all__ = ["Job", "JobQueue", "QueueFullError", "Text", "pause"]

Text = Callable[[], None]
"""The work on one text, in a lane of its own."""


class QueueFullError(Exception):
    """As many jobs wait as may."""


def pause(until: Callable[[], bool]) -> None:
    """In a text's work: let others go on until `until()` is true. It is asked again after every pass, and
    when the queue is told to `look`."""
    lane = LANE.get()
    assert lane is not None, "this is no text's work"
    lane.wait(until)


class Job:
    """Texts, and whom their end is told."""

    def __init__(
        self,
        texts: Callable[[threading.Event], Iterator[Text | None]],
        end: Callable[[Exception | None], None],
        client: Hashable = None,
    ) -> None:
        """texts(cancel): the work on each, or None as long as no other may begin; it ends soon after `cancel`
        is set, and where one fails, `cancel` is set for the others. end: told, in the queue's thread, when
        all have ended, of what one has raised; of a job withdrawn before its turn, nothing. client: whose.
        """
        self.cancel = threading.Event()
        self.client, self._made, self._end = client, texts, end
        self.arrived = time.monotonic()
        """On time.monotonic's clock, in seconds."""
        self.began: float | None = None
        """When its turn came, on the same clock."""
        self.at_work = 0
        """Of its texts."""
        self.since = 0
        """Place in the order of those that wait for room."""
        self._texts: Iterator[Text | None] | None = None
        self._next: Text | None = None
        self._error: Exception | None = None

    # In the queue's thread.

    @property
    def waits(self) -> bool:
        """Whether a text of it may begin."""
        if self.cancel.is_set() and self.began is not None:
            self._texts, self._next = iter(()), None
        if self._next is None:
            try:
                if self._texts is None:
                    self._texts = self._made(self.cancel)
                self._next = next(self._texts, None)
            except Exception as error:
                self._next = partial(_fail, error)
        return self._next is not None

    @property
    def over(self) -> bool:
        """Whether all that began has ended, and nothing else will begin."""
        return self.at_work == 0 and not self.waits

    def begin(self) -> Text:
        """The text whose turn has come."""
        self.began = self.began or time.monotonic()
        text, self._next = self._next, None
        assert text is not None
        self.at_work += 1
        return text

    def failed(self, error: Exception) -> None:
        """One of its texts has: the others are of no use."""
        self._error = self._error or error
        self.cancel.set()

    def end(self) -> None:
        self._end(self._error)


def _fail(error: Exception) -> None:
    raise error


class JobQueue:
    """Jobs that wait, and the thread in which their texts are made. What is in them it does not know."""

    def __init__(
        self,
        capacity: int,
        batch: Callable[[], Batch],
        parallel: int = 1,
        *,
        report: Callable[[Exception], None],
        waited: Callable[[float], None] = lambda seconds: None,
        name: str = "jobs",
    ) -> None:
        """capacity: jobs that may wait while there is no room for a text. batch: makes one, for texts to be
        made in. parallel: texts at work at a time; where there may be several and all are one client's
        or one job's, one more of somebody else. report: told of errors that nobody foresaw. waited: told of
        every job whose turn comes how many seconds it has waited.
        """
        self._capacity, self._parallel = capacity, parallel
        self._report, self._waited = report, waited
        self._made, self._batch = batch, self._new(batch)
        self._changed = threading.Condition()
        self._look = self._closed = False
        # The lists are changed under the lock, in the queue's thread but for new jobs and forgotten ones.
        self._waiting: list[Job] = []
        self._working: list[Job] = []
        self._order = count(1)
        self._ended = False  # whether a text has, since it was last looked for
        self._usual_seconds = 0.0  # that a job takes, as a moving mean; 0 before the first
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    # 1. From any thread.

    @property
    def waiting(self) -> int:
        """Jobs whose turn has not come."""
        return len(self._waiting)

    @property
    def at_work(self) -> int:
        """Texts that are being made."""
        return sum(job.at_work for job in [*self._working])

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._working and not self._waiting

    @property
    def expected_wait(self) -> float:
        """Seconds until the jobs of now are done, by what jobs have taken."""
        return (len(self._waiting) + len(self._working)) * self._usual_seconds / self._parallel

    def submit(self, job: Job) -> None:
        """Put a job at the queue's end. Raises QueueFullError."""
        with self._changed:
            room = self._capacity + max(0, self._parallel - self.at_work)
            if self._closed or len(self._waiting) >= room:
                raise QueueFullError
            job.since = next(self._order)
            self._waiting.append(job)
            self._wake()

    def withdraw(self, job: Job) -> None:
        """End a job: one that waits is forgotten, one that is at work told to stop."""
        job.cancel.set()
        if not self.forget(job):
            self.look()

    def forget(self, job: Job) -> bool:
        """Take a job out of the queue; whether it was still there."""
        with self._changed:
            there = job in self._waiting
            if there:
                self._waiting.remove(job)
            return there

    def look(self) -> None:
        """Something has happened that a text may wait for."""
        with self._changed:
            self._wake()

    def close(self, patience: float = 30.0) -> None:
        """Forget what waits, stop what is at work, and wait at most `patience` seconds for its end."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for job in self._working:
                job.cancel.set()
            self._wake()
        self._thread.join(patience)

    def _wake(self) -> None:
        self._look = True
        self._changed.notify()

    # 2. In the queue's thread.

    def _new(self, made: Callable[[], Batch]) -> Batch:
        batch = made()
        batch.wanted = lambda: self._look
        return batch

    def _work(self) -> None:
        while True:
            with self._changed:
                self._look = False
                if self._closed and not self._working:
                    break
            self._admit()
            going_on = self._step()
            self._settle()
            if not going_on and not self._ended:
                with self._changed:
                    self._changed.wait_for(lambda: self._look)
        self._batch.close()

    def _step(self) -> bool:
        self._ended = False
        try:
            return self._batch.step()
        except BaseException as raised:  # no text's, or what no text may raise: the batch is of no more use
            error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            self._report(error)
            for job in self._working:
                job.failed(error)
            self._batch.close()
            for job in self._working:
                job.at_work = 0
            self._batch, self._ended = self._new(self._made), True
            return False

    def _admit(self) -> None:
        """Begin texts for which there is room."""
        while (job := self._next()) is not None:
            with self._changed:
                if job.began is None:
                    if job not in self._waiting:  # it was forgotten just now
                        continue
                    self._waiting.remove(job)
                    self._working.append(job)
                    self._waited(time.monotonic() - job.arrived)
                text, job.since = job.begin(), next(self._order)
            self._batch.start(partial(self._make, job, text))

    def _next(self) -> Job | None:
        """Whose text begins next."""
        at_work = self.at_work
        with self._changed:
            jobs = [*self._working, *self._waiting]
        if at_work >= self._parallel:
            if at_work > self._parallel or self._parallel == 1:
                return None
            jobs = [job for job in jobs if self._is_left_out(job)]
        of_client = Counter[Hashable]()
        for job in self._working:
            of_client[job.client] += job.at_work
        return min(
            (job for job in jobs if job.waits),
            key=lambda job: (of_client[job.client], job.at_work, job.since),
            default=None,
        )

    def _is_left_out(self, job: Job) -> bool:
        """Whether all texts at work are another job's, or another client's jobs'."""
        others = [other for other in self._working if other.at_work]
        of_one = len(others) == 1 or len({other.client for other in others}) == 1
        foreign = len(others) == 1 or others[0].client != job.client
        return job.at_work == 0 and of_one and foreign

    def _make(self, job: Job, text: Text) -> None:
        try:
            text()
        except Exception as error:
            job.failed(error)
        finally:
            job.at_work -= 1
            job.since = next(self._order)  # who came meanwhile goes first
            self._ended = True

    def _settle(self) -> None:
        """Tell of jobs that are over."""
        for job in [job for job in self._working if job.over]:
            assert job.began is not None
            seconds = time.monotonic() - job.began
            share = 0.2 if self._usual_seconds else 1.0
            with self._changed:
                self._usual_seconds += share * (seconds - self._usual_seconds)
                self._working.remove(job)
            job.end()
