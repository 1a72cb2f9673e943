"""Several texts in one thread, whose passes are run together: weights are read once for all of them.

Each text's work is what it would be alone: reading, decoding, guessing, rolling back, in plain calls. It runs
in a lane, a thread of execution of its own (`greenlet`) that stops where a stage has to run. When all lanes
have stopped, the batch chooses a stage and the texts that wait for it (`passes`), runs one pass over the new
positions of all of them, and lets those go on. A text that comes late joins at its first pass; one that ends
or fails leaves, and the others never notice. Where there is one text only, its stages run where it asks for
them, as if there were no batch.
What this does not know: bundles, what the work is.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .backends.base import Done, PackedPart, PackedStage, StageBackend, StageCall
from .costs import CostTable
from .errors import BltWarning, OptionError, ran_out_of_memory, requirement
from .lanes import LANE, StageRun
from .passes import Chooser, graph_rows

with suppress(ImportError):  # which `check_batches` tells of
    import greenlet

__all__ = ["Batch", "Task", "can_batch", "check_batches"]


def can_batch() -> bool:
    """Whether what batches need is installed."""
    return "greenlet" in globals()


def check_batches() -> None:
    """Raise OptionError where what batches need is not installed."""
    if not can_batch():
        raise OptionError(f"several texts at a time need greenlet; pip install {requirement('batch')}")


@dataclass
class _Request:
    """A pass that a text waits for."""

    stage: str
    kind: StageBackend
    count: int
    since: int
    rows: tuple[int, ...]
    part: PackedPart
    done: Done
    error: Exception | None = None


class Task:
    """One text's work in a batch: a `Lane`."""

    def __init__(self, batch: Batch, work: Callable[[], None]) -> None:
        self._batch, self._work = batch, work
        self._greenlet: Any = greenlet.greenlet(self._begin)
        self.request: _Request | None = None
        """The pass that it waits for."""
        self._until: Callable[[], bool] | None = None
        self._closing = False
        self._seconds = 0.0
        self._entered = 0.0
        self.error: BaseException | None = None
        """What the work raised; None when it ended well, or has not ended."""

    @property
    def ended(self) -> bool:
        return bool(self._greenlet.dead)

    # 1. What the work calls.

    @property
    def costs(self) -> CostTable:
        return self._batch.costs

    @property
    def seconds(self) -> float:
        return self._seconds + time.perf_counter() - self._entered

    def run(self, stage: StageRun, call: StageCall, count: int, done: Done) -> None:
        batch = self._batch
        if self._closing or batch.alone:
            batch.run_here(stage.name, call, done)
            return
        kind = stage.backend
        part = PackedPart(call, stage.cache, stage.shared, count)
        request = _Request(stage.name, kind, count, batch.passes, batch.rows_of(kind, count), part, done)
        self.request = request
        self._stop()
        if request.error is not None:
            raise request.error

    def wait(self, until: Callable[[], bool]) -> None:
        """Let the others go on until `until()` is true; asked whenever a pass has run."""
        if self._closing or until():
            return
        self._until = until
        self._stop()
        self._until = None

    def _stop(self) -> None:
        self._seconds += time.perf_counter() - self._entered
        owner = self._greenlet.parent
        assert owner is not None
        owner.switch()

    def _begin(self) -> None:
        LANE.set(self)
        try:
            self._work()
        except greenlet.GreenletExit:
            pass
        except Exception as error:
            self.error = error

    # 2. What the batch calls.

    def go_on(self) -> None:
        """Run until the next stop, or the end. A BaseException that is no Exception comes out here."""
        self._greenlet.parent = greenlet.getcurrent()
        self._entered = time.perf_counter()
        self._greenlet.switch()

    @property
    def ready(self) -> bool:
        """Whether it can go on without a pass."""
        if self.request is not None:
            return False
        return self._until is None or self._until()

    def took(self, seconds: float) -> None:
        """Its share of a pass."""
        self._seconds += seconds

    def close(self) -> None:
        """End it where it is: what it has open is closed."""
        if self.ended:
            return
        self._closing = True
        self._entered = time.perf_counter()
        try:
            self._greenlet.parent = greenlet.getcurrent()
        except ValueError:  # another thread's, where it ends when nobody holds it and something is next run
            self._greenlet = _ENDED
            return
        self._greenlet.throw(greenlet.GreenletExit)


class _Ended:
    """In the place of a greenlet that was let go of."""

    dead = True


_ENDED: Any = _Ended()


class _SharedCosts(CostTable):
    """What runs cost a text, by how many others share them: its own share of a pass."""

    def __init__(self, texts: Callable[[], int]) -> None:
        self._texts = texts
        self._tables: dict[int, CostTable] = {}

    def _table(self) -> CostTable:
        kind = min(self._texts(), 9).bit_length()  # 1, 2 to 3, 4 to 7, 8 and more
        if kind not in self._tables:
            self._tables[kind] = CostTable()
        return self._tables[kind]

    def observe(self, stage: str, started: float, seconds: float, rows: int) -> None:
        self._table().observe(stage, started, seconds, rows)

    def known(self, stage: str) -> bool:
        return any(table.known(stage) for table in self._tables.values())

    def seconds(self, stage: str, rows: int) -> float:
        # What was never run among so many is believed to cost what it did among others.
        found = self._table().seconds(stage, rows)
        others = (table.seconds(stage, rows) for table in self._tables.values())
        return found or next(filter(None, others), 0.0)

    @property
    def pace(self) -> float:  # type: ignore[override]
        return self._table().pace


class Batch:
    """Tasks of one thread. All of its methods belong to that thread."""

    def __init__(self, rows: int, chunk: int, costs: CostTable | None = None) -> None:
        """rows: texts in one pass at most. chunk: positions in one, as `SequenceLimits.prefill_chunk`.
        costs: what passes of this model have cost in other batches; None knows nothing yet.

        Raises OptionError where greenlet is not installed.
        """
        check_batches()
        self._rows, self._tasks = rows, deque[Task]()
        self._chooser = Chooser(chunk, CostTable() if costs is None else costs)
        self._used: set[PackedStage] = set()
        self._refused: set[StageBackend] = set()  # whose passes over several texts have failed
        self.attention = False
        """Whether the thread wants to do something else before the next pass; `step` takes it back."""
        self.wanted: Callable[[], bool] = lambda: False
        """Asked for the same of a text that is alone, where it is another thread that wants it."""
        self.costs: CostTable = _SharedCosts(lambda: len(self._tasks))
        self.observer: Callable[[str, int, float], None] | None = None
        """Told of every pass, those of a text that is alone among them: stage, texts, seconds."""

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def passes(self) -> int:
        """Passes so far, without those of texts that were alone."""
        return self._chooser.passes

    @property
    def alone(self) -> bool:
        """Whether the text that runs now may as well run its stages itself."""
        return len(self._tasks) == 1 and not self.attention and not self.wanted()

    def run_here(self, stage: str, call: StageCall, done: Done) -> None:
        """A pass of the text that runs now, for itself."""
        started = time.perf_counter()
        call.run(done)
        if self.observer is not None:
            self.observer(stage, 1, time.perf_counter() - started)

    def rows_of(self, kind: StageBackend, count: int) -> tuple[int, ...]:
        """Numbers of texts that a stage has graphs for, from 1 on, as far as passes here may be for so many,
        and one of the texts may have `count` new positions.

        Of a graph for more texts than one pass may have, the rest of the rows stays idle.
        """
        longest = kind.packed_positions
        if kind in self._refused or self._rows == 1 or not kind.rows:
            return (1,)
        if longest is not None and count > longest:
            return (1,)
        most = min(self._rows, kind.rows[-1])
        return (1, *(rows for rows in kind.rows if rows < most), most)

    def start(self, work: Callable[[], None]) -> Task:
        """Add a text, whose work begins in the next `step`; its errors are the task's."""
        task = Task(self, work)
        self._tasks.append(task)
        self.attention = True
        return task

    def step(self) -> bool:
        """Let all that can go on go on, then run one pass; whether there is more to do just now.

        False where no task is left, or all wait for something other than a pass. Where one that went on asks
        for `attention`, the pass is left to the next step.
        """
        self.attention = False
        self._go_on()
        waiting = {id(request): task for task in self._tasks if (request := task.request) is not None}
        requests = [request for task in waiting.values() if (request := task.request) is not None]
        if not requests:
            return False
        if self.attention:
            return True
        requests.sort(key=lambda one: one.since)
        group = self._chooser.choose(requests, len(self._tasks))
        self._run([waiting[id(request)] for request in group])
        return True

    def close(self) -> None:
        """End all tasks where they are; what they hold is free only then.

        In another thread it leaves their end to the batch's, for when that next runs one.
        """
        while self._tasks:
            self._tasks.popleft().close()
        self._release()

    def _go_on(self) -> None:
        ended, running = False, True
        while running:  # those who went on may have started others, or let them go on
            running = False
            for task in [*self._tasks]:
                if not task.ready:
                    continue
                task.go_on()
                running = True
                if task.ended:
                    self._tasks.remove(task)
                    ended = True
        if ended:
            self._release()

    def _release(self) -> None:
        for packed in self._used:
            packed.release()

    def _run(self, group: list[Task]) -> None:
        # A text waits for its pass until that has run: an interruption before leaves it waiting.
        requests = [request for task in group if (request := task.request) is not None]
        packed = len(group) > 1 and requests[0].kind not in self._refused
        seconds = self._run_packed(requests) if packed else None
        if seconds is None:
            for task, request in zip(group, requests, strict=True):
                self._run_alone(task, request)
                task.request = None
            return
        for task, request, share in zip(group, requests, self._shares(requests, seconds), strict=True):
            task.took(share)
            try:
                request.done(share)
            except Exception as error:
                request.error = error
            task.request = None
        idle = graph_rows(requests[0].kind.rows, len(group)) - len(group)
        self._observe(requests[0].stage, len(group), idle + sum(one.count for one in requests), seconds)

    def _observe(self, stage: str, texts: int, positions: int, seconds: float) -> None:
        self._chooser.costs.observe(stage, 0.0, seconds, positions)
        if self.observer is not None:
            self.observer(stage, texts, seconds)

    def _run_packed(self, requests: list[_Request]) -> float | None:
        """One pass for several texts; its seconds, or None where it could not be run."""
        kind = requests[0].kind
        try:
            packed = kind.packed(len(requests))
        except Exception as error:  # which would be no other in the next pass
            self._refuse(requests[0], error)
            return None
        self._used.add(packed)
        try:
            return packed.run([request.part for request in requests])
        except Exception as error:
            if not ran_out_of_memory(error):
                self._refuse(requests[0], error)
            return None

    def _refuse(self, request: _Request, error: Exception) -> None:
        self._refused.add(request.kind)
        told = f"{request.stage}: a pass over several texts failed, they go on one by one ({error})"
        warnings.warn(told, BltWarning, stacklevel=3)

    def _shares(self, requests: list[_Request], seconds: float) -> list[float]:
        """What each text is charged for a pass: what one position of each would have cost in equal parts,
        the rest by the positions beyond."""
        texts, count = len(requests), sum(request.count for request in requests)
        beyond = count - texts
        costs = self._chooser.costs
        least = min(seconds, costs.seconds(requests[0].stage, texts) * costs.pace) if beyond else seconds
        return [
            least / texts + (seconds - least) * (request.count - 1) / max(1, beyond) for request in requests
        ]

    def _run_alone(self, task: Task, request: _Request) -> None:
        began = time.perf_counter()

        def done(seconds: float) -> None:
            # On a GPU that is known when the host waits next: what it took to queue it says nothing.
            self._observe(request.stage, 1, request.count, seconds)
            request.done(seconds)

        try:
            request.part.call.run(done)
        except Exception as error:
            request.error = error
        task.took(time.perf_counter() - began)
