"""Figures of a server for Prometheus. Safe from any thread."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .worker import Worker

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts since the server began, in a registry of their own."""

    def __init__(self, worker: Worker) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "blt_edge_http_requests",
            "Requests answered, by route and status; 499 is a client that left before.",
            ["route", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "blt_edge_http_requests_in_flight",
            "Requests not answered yet.",
            registry=registry,
        )
        self.prompt_bytes = Counter("blt_edge_prompt_bytes", "Bytes of prompts read.", registry=registry)
        self.new_bytes = Counter(
            "blt_edge_generated_bytes",
            "Bytes that were generated, for clients that left, too.",
            registry=registry,
        )
        self.first_byte = Histogram(
            "blt_edge_first_byte_seconds",
            "From a completion request's arrival to its first byte of text, the queue included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "blt_edge_completion_seconds",
            "From a completion request's arrival to its end, of those answered 200.",
            buckets=_SECONDS,
            registry=registry,
        )
        queue = Gauge("blt_edge_queue_length", "Requests whose turn has not come.", registry=registry)
        queue.set_function(lambda: worker.waiting)
        ProcessCollector(registry=registry)  # resident memory among it, on Linux

    def text(self) -> bytes:
        """The exposition, in `CONTENT_TYPE`."""
        return generate_latest(self._registry)
