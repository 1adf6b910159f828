"""What the service counts, for Prometheus. Nothing of a request's content is among it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one service, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "cdt_requests", "Requests, by path and status", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "cdt_request_seconds",
            "Time of a request",
            ("path",),
            buckets=BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("cdt_in_flight", "Requests being answered", registry=registry)
        self.batches = Histogram(
            "cdt_batch_tiles", "Tiles that shared an engine call", buckets=SIZES, registry=registry
        )
        self.answers = Counter(
            "cdt_answers", "Answers, by what came out", ("outcome",), registry=registry
        )

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return bytes(generate_latest(self._registry))
