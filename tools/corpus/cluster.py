"""The engine of many machines: Ray Data, whose actors each hold a `Scorer`.

Texts go to the cluster in parts of bounded size, each part in blocks of a few texts, a block to whichever
actor is free. An actor that dies is started again and its block scored again: that costs time, and no text.
Ray is imported when a cluster is asked for; it sends no usage statistics, starts no dashboard, and its log
lines stay in its own files. What it does not know: where texts are from, and what becomes of the figures.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.errors import BackendError, BltError, OptionError, first_line, requirement
from ...runtime.processors import usable_cores
from ...runtime.scorer import Scorer
from .texts import Engine, ScoredText, Text

__all__ = ["AUTO", "LOCAL", "cluster_engine"]

AUTO = "auto"
"""The cluster that is there, else one on this machine."""
LOCAL = "local"
"""A cluster on this machine, whatever else is there."""

_ADDRESS = "RAY_ADDRESS"
_PATIENCE = 5.0
"""Seconds in which a cluster has to take a connection."""
_ATTEMPTS = 2
"""Of starting one, which Ray gives up after 30 s of a busy machine."""

# Between two parts actors start anew, some 5 s in which nothing is scored; a part is held in memory.
_PART_BYTES = 16_000_000
_MOST_BYTES = 256_000_000
# What a dead actor costs, and what the last to finish keeps the others waiting: about a second of the demo.
_BLOCK_BYTES = 16_384
_BLOCK_TEXTS = 256

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # It writes to the terminal past Python's logging.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Of lines that it shows of others' processes, such as that an actor was started again: none.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    # Else it warns of what a coming version does to devices that nobody asked for.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def cluster_engine(where: str, scorer: Mapping[str, Any], processors: int | None = None) -> Iterator[Engine]:
    """An engine that runs on the Ray cluster at `where`: `AUTO`, `LOCAL` or HOST:PORT.

    scorer: arguments of `Scorer`, `bundle` among them, which every machine needs under the same path, with
    blt-edge installed. threads: of one actor, one by default; there are as many actors as the cluster has
    processors for. device auto means cpu; with another one than that, an actor takes a GPU, and there are as
    many as the cluster has. processors: of a cluster that is started here; None takes those that this process
    may use. The cluster is left, and one that was started here ended, with the context.

    Raises OptionError for what is no address, and for more threads than any machine has; BackendError where
    Ray is missing or no cluster answers. The engine raises BltError: what an actor raised, or that the
    cluster failed.
    """
    Scorer(**scorer)  # what is wrong with its arguments needs no cluster
    ray = _imported()
    _connect(ray, where, usable_cores() if processors is None else processors)
    try:
        pool = _pool(ray, {"device": AUTO, "threads": None, **scorer})
        yield lambda texts: _scored(ray, pool, texts)
    finally:
        ray.shutdown()


# 1. The cluster.


def _imported() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module("pyarrow")
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        wanted = f"pip install {requirement('corpus')}"
        raise BackendError(f"--ray needs Ray Data: {first_line(error)}", wanted) from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray


def _connect(ray: Any, where: str, processors: int) -> None:
    there = (os.environ.get(_ADDRESS) or AUTO) if where == AUTO else where
    if there not in (AUTO, LOCAL):
        _check_address(there, where)
    elif there == AUTO and _is_gone():
        there = LOCAL
    if there != LOCAL:
        try:
            _init(ray, there)
            return
        except ConnectionError as error:
            if there != AUTO:
                raise _unreachable(there, error) from None
        except Exception as error:  # of another version of Ray or Python, and of more kinds
            raise BackendError(f"the Ray cluster at {there} can't be used: {first_line(error)}") from None
    store = 128_000_000 + 3 * _part_bytes(processors)
    for attempt in range(_ATTEMPTS):
        try:
            _init(ray, LOCAL, num_cpus=processors, include_dashboard=False, object_store_memory=store)
            return
        except Exception as error:  # some are no more than that
            if attempt + 1 == _ATTEMPTS:
                told = f"Ray can't start on this machine: {first_line(error)}"
                raise BackendError(told, "try again when it is less busy") from None


def _init(ray: Any, where: str, **settings: Any) -> None:
    try:
        with _silent():
            ray.init(where, log_to_driver=False, logging_level=logging.CRITICAL, **settings)
    except BaseException:
        ray.shutdown()  # what was started before it failed
        raise


@contextmanager
def _silent() -> Iterator[None]:
    """Without stderr, on which Ray's libraries say that they were told to be quiet."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_address(there: str, where: str) -> None:
    """Whether something takes connections there: Ray itself would try for minutes."""
    host, colon, port = there.rpartition(":")
    if "://" in there or not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        origin = "" if there == where else f" (of {_ADDRESS})"
        raise OptionError(
            f"--ray: got {there!r}{origin}; allowed are {AUTO}, {LOCAL} and HOST:PORT of a cluster's head, "
            "on a machine of that cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except OSError as error:
        raise _unreachable(there, error) from None


def _is_gone() -> bool:
    """Whether the cluster that `ray start` left the address of on this machine does not answer any more: Ray
    itself would try for minutes."""
    left = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        host, _, port = left.read_text(encoding="utf-8").strip().rpartition(":")
        number = int(port)
    except (OSError, ValueError):
        return False
    return not _answers(host, number)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host.strip("[]"), port), _PATIENCE).close()
    except (OSError, OverflowError):
        return False
    return True


def _unreachable(there: str, error: Exception) -> BackendError:
    return BackendError(
        f"no Ray cluster answers at {there}: {first_line(error)}",
        f"start one there with ray start --head, set RAY_AUTH_MODE=token where it asks for a token, or give "
        f"--ray {LOCAL}",
    )


# 2. Its actors.


@dataclass(frozen=True)
class _Pool:
    """How many actors there are, and what each is."""

    actors: int
    scorer: Mapping[str, Any]
    takes: Mapping[str, Any]
    """Of the cluster, and of texts at a time: arguments of `map_batches`."""


def _pool(ray: Any, scorer: Mapping[str, Any]) -> _Pool:
    machines = [node.get("Resources", {}) for node in ray.nodes() if node.get("Alive")]
    if scorer["device"] not in (AUTO, "cpu"):
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        if not gpus:
            raise OptionError(f"--device is {scorer['device']}, and no machine of the cluster has a GPU")
        # Ray Data wants a number of texts where there are GPUs.
        return _Pool(gpus, scorer, {"num_gpus": 1, "batch_size": _BLOCK_TEXTS})
    threads = scorer["threads"] or 1
    actors = sum(int(machine.get("CPU", 0)) // threads for machine in machines)
    if not actors:
        most = max((int(machine.get("CPU", 0)) for machine in machines), default=0)
        raise OptionError(
            f"threads is {threads}; no machine of the cluster has so many processors, allowed are 1 to {most}"
        )
    own = {**scorer, "device": "cpu", "threads": threads}
    return _Pool(actors, own, {"num_cpus": threads, "batch_size": None})


# 3. Texts.


def _scored(ray: Any, pool: _Pool, texts: Iterator[Text]) -> Iterator[ScoredText]:
    for part in _parts(texts, _part_bytes(pool.actors)):
        waiting = {text.number for text in part}
        for found in _part_scored(ray, pool, part):
            waiting.remove(found.number)
            yield found
        if waiting:
            raise BackendError(f"the Ray cluster lost {len(waiting)} of {len(part)} texts; run it again")


def _part_bytes(actors: int) -> int:
    return min(_PART_BYTES * actors, _MOST_BYTES)


def _parts(texts: Iterable[Text], most_bytes: int, most_texts: int | None = None) -> Iterator[list[Text]]:
    """The texts, as many together as have no more bytes: one at least."""
    part: list[Text] = []
    held = 0
    for text in texts:
        if part and (held + len(text.data) > most_bytes or len(part) == most_texts):
            yield part
            part, held = [], 0
        part.append(text)
        held += len(text.data)
    if part:
        yield part


def _block_bytes(part: list[Text], actors: int) -> int:
    """As many that each actor gets some blocks, where there are few texts."""
    return min(_BLOCK_BYTES, sum(len(text.data) for text in part) // (4 * actors))


def _part_scored(ray: Any, pool: _Pool, part: list[Text]) -> Iterator[ScoredText]:
    arrow = importlib.import_module("pyarrow")
    blocks = [
        arrow.table(
            {
                "number": arrow.array([text.number for text in block], arrow.int64()),
                "text": arrow.array([text.data for text in block], arrow.binary()),
            }
        )
        for block in _parts(part, _block_bytes(part, pool.actors), _BLOCK_TEXTS)
    ]
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    settings.raise_original_map_exception = True  # else ours are but words in a traceback
    rows = ray.data.from_arrow(blocks).map_batches(
        Scorer,
        fn_constructor_kwargs=dict(pool.scorer),
        # Ray Data restarts actors that die, and repeats what they were at.
        compute=ray.data.ActorPoolStrategy(
            size=min(pool.actors, len(blocks)), max_tasks_in_flight_per_actor=2
        ),
        **pool.takes,
    )
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
            yield from _told(batch)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise _cause(error) from None


def _told(batch: Mapping[str, Any]) -> Iterator[ScoredText]:
    columns = (batch[name].tolist() for name in ("number", "bits", "patches", "windows", "error"))
    for number, bits, patches, windows, error in zip(*columns, strict=True):
        if error:
            raise BltError(error)
        yield ScoredText(number, bits, patches + windows, windows)


def _cause(error: BaseException) -> BltError:
    """What an actor raised on purpose, or that the cluster failed."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BltError):
        return type(inner)(str(inner).splitlines()[0])  # Ray adds lines of its own
    return BackendError(
        f"the Ray cluster failed: {first_line(inner or error)}",
        "blt-edge has to be installed on every machine of it; Ray's log files say more",
    )
