"""The server's counters for Prometheus, in one registry per server, so that two in a process do not mix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Metrics:
    """The instruments; `text()` is the page /metrics."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dalle_jax_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "dalle_jax_request_seconds",
            "From the head of a request to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "dalle_jax_rejected", "Requests refused or given up, by code", ["code"], registry=registry
        )
        self.cancelled = Counter(
            "dalle_jax_cancelled", "Requests whose client went away or whose deadline passed", registry=registry
        )
        self.queue_depth = Gauge("dalle_jax_queue_depth", "Requests that wait to be drawn", registry=registry)
        self.queue_wait_seconds = Histogram(
            "dalle_jax_queue_wait_seconds", "From arrival to the start of drawing", buckets=_SECONDS, registry=registry
        )
        self.batch_fill = Histogram(
            "dalle_jax_batch_fill",
            "Pictures of a batch as a share of those that are drawn together",
            buckets=_SHARES,
            registry=registry,
        )
        self.batch_requests = Histogram(
            "dalle_jax_batch_requests", "Requests of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.draw_seconds = Histogram(
            "dalle_jax_draw_seconds", "Drawing of one batch", buckets=_SECONDS, registry=registry
        )
        self.images = Counter("dalle_jax_images", "Pictures returned", registry=registry)
        self.candidates = Counter("dalle_jax_candidates", "Pictures drawn, those ranked away too", registry=registry)
        self.failures = Counter("dalle_jax_draw_failures", "Batches that raised an exception", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)
