"""The account of every request: an id, a line on stderr, and figures for Prometheus.

What it does not know: what is asked for, and what is answered.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...runtime.names import STAGES
from ..output import printable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TEXTS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
_GONE = 499
_KEY = "blt_edge.request_record"


class Metrics:
    """Counts since the server began, in a registry of their own. Safe from any thread."""

    def __init__(self, waiting: Callable[[], int], at_work: Callable[[], int], stores: Collector) -> None:
        """waiting: the length of the queue now. at_work: texts being made now. stores: tells of what is
        remembered."""
        registry = self._registry = CollectorRegistry()
        seconds_of = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.requests = Counter(
            "blt_edge_http_requests",
            "Requests answered, by route and status; 499 is a client that left before.",
            ["route", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "blt_edge_http_requests_in_flight", "Requests not answered yet.", registry=registry
        )
        self.prompt_bytes = Counter(
            "blt_edge_prompt_bytes",
            "Bytes of prompts read, those left out that had been read before.",
            registry=registry,
        )
        self.new_bytes = Counter(
            "blt_edge_generated_bytes",
            "Bytes that were generated, for clients that left, too.",
            registry=registry,
        )
        self.constrained = Counter(
            "blt_edge_constrained_requests",
            "Requests whose texts must fit something, by its kind; those that were refused left out.",
            ["kind"],
            registry=registry,
        )
        self.first_byte = seconds_of(
            "blt_edge_first_byte_seconds",
            "From a completion request's arrival to its first byte of text, the queue included.",
        )
        self.whole = seconds_of(
            "blt_edge_completion_seconds",
            "From a completion request's arrival to its end, of those answered 200.",
        )
        queue = Gauge("blt_edge_queue_length", "Requests whose turn has not come.", registry=registry)
        queue.set_function(waiting)
        texts = Gauge("blt_edge_texts_at_work", "Texts that are being made.", registry=registry)
        texts.set_function(at_work)
        self.waited = seconds_of(
            "blt_edge_queue_seconds",
            "From a completion request's place in the queue to its turn.",
        )
        passes = Histogram(
            "blt_edge_pass_texts",
            "Texts in each pass over a stage.",
            ["stage"],
            buckets=_TEXTS,
            registry=registry,
        )
        seconds = Counter(
            "blt_edge_pass_seconds", "Seconds that passes over a stage took.", ["stage"], registry=registry
        )
        self._passes = {stage: (passes.labels(stage), seconds.labels(stage)) for stage in STAGES}
        registry.register(stores)
        ProcessCollector(registry=registry)  # resident memory among it, on Linux

    def observe_pass(self, stage: str, texts: int, seconds: float) -> None:
        """A `Batch.observer`."""
        passes, spent = self._passes[stage]
        passes.observe(texts)
        spent.inc(seconds)

    def text(self) -> bytes:
        """The exposition, in `CONTENT_TYPE`."""
        return generate_latest(self._registry)


@dataclass
class RequestRecord:
    """What became of one request."""

    status: int = _GONE
    """That was sent; 499 as long as none was."""
    bytes: int = 0
    """Of the body that was sent."""
    gone: bool = False
    """The client left before its answer was complete."""
    error: int | None = None
    """The status of an error that came after the answer had begun."""

    @property
    def final(self) -> int:
        """The status that counts."""
        return _GONE if self.gone else self.error or self.status


def request_record(scope: Scope) -> RequestRecord:
    record: RequestRecord = scope[_KEY]
    return record


def accounted(
    app: ASGIApp,
    metrics: Metrics,
    say: Callable[[str], None],
    report: Callable[[Exception], None],
    route: Callable[[str], str],
) -> ASGIApp:
    """The outermost application: lets `app` answer, and keeps account.

    say: gets a line for each request. report: gets errors that nobody foresaw. route: names a path for the
    figures, so that their number is bounded.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        record = scope[_KEY] = RequestRecord()
        request_id = f"req-{secrets.token_hex(8)}"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            else:
                record.bytes += len(message.get("body", b""))
            await send(message)

        metrics.in_flight.inc()
        try:
            await app(scope, receive, counted)
        except Exception as error:
            record.error = 500
            report(error)
        finally:
            metrics.in_flight.dec()
            metrics.requests.labels(route(scope["path"]), str(record.final)).inc()
            path, seconds = printable(scope["path"])[:100], time.monotonic() - started
            say(f"{scope['method']} {path} {record.final} {record.bytes} bytes {1000 * seconds:.0f} ms")

    return answer
