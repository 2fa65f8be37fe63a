"""The server's counters for Prometheus, in one registry per server, so that two in a process do not mix."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The instruments; `text()` is the page /metrics."""

    def __init__(self):
        self._registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self._registry)
        gauge = functools.partial(Gauge, registry=self._registry)
        histogram = functools.partial(Histogram, registry=self._registry)
        seconds = functools.partial(histogram, buckets=_SECONDS)
        self.requests = counter("dalle_jax_requests", "HTTP requests answered", ["endpoint", "status"])
        self.request_seconds = seconds(
            "dalle_jax_request_seconds", "From the head of a request to the end of its answer", ["endpoint"]
        )
        self.rejected = counter("dalle_jax_rejected", "Requests refused or given up, by code", ["code"])
        self.cancelled = counter("dalle_jax_cancelled", "Requests whose client went away or whose deadline passed")
        self.queue_depth = gauge("dalle_jax_queue_depth", "Requests that wait to be drawn")
        self.queue_wait_seconds = seconds("dalle_jax_queue_wait_seconds", "From arrival to the start of drawing")
        self.batch_fill = histogram(
            "dalle_jax_batch_fill", "Images of a batch as a share of the maximum drawn together", buckets=_SHARES
        )
        self.batch_requests = histogram("dalle_jax_batch_requests", "Requests of a batch", buckets=_REQUESTS)
        self.draw_seconds = seconds("dalle_jax_draw_seconds", "Drawing of one batch")
        self.images = counter("dalle_jax_images", "Images returned")
        self.candidates = counter("dalle_jax_candidates", "Images drawn, with those that ranking dropped")
        self.failures = counter("dalle_jax_draw_failures", "Batches that raised an exception")

    def text(self) -> bytes:
        return generate_latest(self._registry)
