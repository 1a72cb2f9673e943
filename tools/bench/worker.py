"""An engine in a process of its own, so that engines share no library, no thread pool and no memory.

Two builds of llama.cpp in one process may bind to each other's symbols. Between its rounds an engine's
process sleeps on a pipe, and these engines' thread pools stop spinning milliseconds after their last work.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.connection import Connection

from .engine import BenchError, Card, EngineSpec, Reading, Round

__all__ = ["Worker"]

_PATIENCE = 10.0


class Worker:
    """A loaded engine elsewhere. Close it, or use it as a context manager."""

    card: Card
    """What the engine runs."""

    def __init__(self, spec: EngineSpec, warm_up: Round) -> None:
        """Start a process, load the engine there and run one round that nobody counts.

        Raises BenchError when the engine can't be loaded or its process dies.
        """
        context = multiprocessing.get_context("spawn")
        self._name = spec.name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, warm_up, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            card = self._answer()
        except BenchError:
            self.close()
            raise
        assert isinstance(card, Card)
        self.card = card

    def read(self, task: Round) -> Reading:
        """Run one round. Raises BenchError when the engine fails or its process dies."""
        self._pipe.send(task)
        reading = self._answer()
        assert isinstance(reading, Reading)
        return reading

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Card | Reading:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(_PATIENCE)
            code = self._process.exitcode
            raise BenchError(
                f"{self._name}: its process ended with code {code} (-9: out of memory?)"
            ) from None
        if isinstance(answer, BenchError):
            raise answer
        assert isinstance(answer, (Card, Reading))
        return answer


def _serve(spec: EngineSpec, warm_up: Round, pipe: Connection) -> None:
    try:
        engine = spec.open()
        engine.read(warm_up)
        pipe.send(engine.card)
        while (task := pipe.recv()) is not None:
            pipe.send(engine.read(task))
    except BenchError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt):
        pass
