"""`Batcher`: a queue and the one thread that draws; requests wait up to `wait_seconds` to be drawn together.

The thread loads the pipeline and is the only one that calls `draw`. Everything else, the queue included, belongs to
the event loop. They share a lock that is never held while something is drawn.
"""

import asyncio
import collections
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

from PIL import Image

from dalle_jax.pictures.picture import Picture
from dalle_jax.sample.batches import Capacity
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Preview
from dalle_jax.serve.errors import ApiError
from dalle_jax.serve.metrics import Metrics
from dalle_jax.serve.schema import GUIDED, PLAIN, ImageRequest

LOADING, READY, FAILING = "loading", "ready", "failing"
MAX_UNSENT = 8  # previews kept for a client that reads slowly; older ones are dropped
_MAX_FAILURES = 3  # batches in a row after whose failure the server calls itself failing
_MAX_RETRY = 600  # seconds
_OLD_SHARE = 0.7  # of the estimated seconds per image that the latest batch leaves as it was

_log = logging.getLogger(__name__)


class Job:
    """A request in the queue.

    Attributes:
      done: will hold its images, or None if they could not be drawn. previews: those not yet sent, each with its
        images. news: set when either changes.

    Belongs to the event loop, except for `cancelled`, which the drawing thread reads.
    """

    def __init__(self, image_request: ImageRequest, key: Hashable, *, deadline: float):
        self.image_request, self.key, self.deadline = image_request, key, deadline
        self.arrived = time.monotonic()
        self.cancelled = False
        self.steps_shown = 0
        self.done: asyncio.Future[list[Picture] | None] = asyncio.get_running_loop().create_future()
        self.previews: collections.deque[tuple[Preview, list[Image.Image]]] = collections.deque(maxlen=MAX_UNSENT)
        self.news = asyncio.Event()

    def show(self, preview: Preview, images: list[Image.Image]) -> None:
        self.previews.append((preview, images))
        self.news.set()

    def finish(self, images: list[Picture] | None) -> None:
        if not self.done.done():
            self.done.set_result(images)
        self.news.set()


class Batcher:
    """Queue, batches and the drawing thread.

    load: makes the pipeline. max_batch: images drawn together, unless one request alone asks for more; None for the
      pipeline's capacity.
    wait_seconds: how long the first of a batch waits for others. queue: requests that may wait.
    on_ready: called with None, or with the exception that `load` raised, from the drawing thread.
    """

    def __init__(
        self,
        load: Callable[[], Pipeline],
        *,
        max_batch: int | None,
        wait_seconds: float,
        queue: int,
        deadline_seconds: float,
        on_ready: Callable[[Exception | None], None] = lambda error: None,
    ):
        self._load, self._on_ready, self.metrics = load, on_ready, Metrics()
        self._max_batch, self.deadline_seconds = max_batch, deadline_seconds
        self._wait_seconds, self._queue = wait_seconds, queue
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failures = 0
        self._seconds_per_image = 0.0  # a moving average
        self._pipe: Pipeline | None = None
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)

    def start(self) -> None:
        """Start the drawing thread; call it on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Return when everything that was submitted is drawn and the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def state(self) -> str:
        """LOADING, READY or FAILING."""
        if self._failures >= _MAX_FAILURES:
            return FAILING
        return LOADING if self._pipe is None else READY

    @property
    def pipe(self) -> Pipeline:
        """The pipeline, for checks that draw nothing.

        Raises:
          ApiError: it is not loaded.
        """
        if self._pipe is None:
            message = "the model could not be loaded" if self._failures else "the model is being loaded: try again soon"
            raise ApiError(503, message, code=f"model_{self.state}", headers={"Retry-After": "5"})
        return self._pipe

    def capacity(self, *, guided: bool) -> Capacity:
        """The maximum number of images drawn together, guided or not, and why."""
        if self._max_batch is not None:
            return Capacity(self._max_batch, "the value of --max-batch")
        return self.pipe.capacity(guided=guided)

    def summary(self) -> list[str]:
        """Sentences that say how many images are drawn together, and why."""
        lines: dict[int, str] = {}
        for request, words in ((PLAIN, ""), (GUIDED, " with guidance")):
            if self.pipe.can_draw(request):
                images, reason = self.capacity(guided=request is GUIDED)
                lines.setdefault(images, f"draws up to {images} images{words} together: {reason}")
        return list(lines.values())

    def submit(self, image_request: ImageRequest) -> Job:
        """Put a request into the queue.

        Raises:
          ApiError: the queue is full; 429 with a Retry-After of about the time that the waiting requests will take.
        """
        job = Job(
            image_request, self.pipe.batch_key(image_request.request), deadline=time.monotonic() + self.deadline_seconds
        )
        with self._changed:
            if len(self._waiting) >= self._queue:
                ahead = sum(waiting.image_request.request.candidates for waiting in self._waiting)
                seconds = min(max(1, math.ceil(ahead * self._seconds_per_image)), _MAX_RETRY)
                message = f"{len(self._waiting)} requests are waiting, as many as may: try again in {seconds} s"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
            self._waiting.append(job)
            self.metrics.queue_depth.set(len(self._waiting))
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Take a job that is not done out of the queue, or out of the batch at the end of the current step."""
        if job.done.done() or job.cancelled:
            return
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self.metrics.queue_depth.set(len(self._waiting))
            self._changed.notify_all()
        self.metrics.cancelled.inc()

    def _work(self) -> None:
        try:
            pipe = self._load()
            pipe.draw([PLAIN])  # compiles the usual programs, and shows that the model draws
            for request in (PLAIN, GUIDED):  # the capacity is measured at the first use
                if pipe.can_draw(request):
                    pipe.batch_key(request)
        except Exception as error:
            self._failures = _MAX_FAILURES
            self._on_ready(error)
            return
        self._pipe = pipe
        self._on_ready(None)
        while (batch := self._next_batch()) is not None:
            self._draw(pipe, batch)

    def _next_batch(self) -> list[Job] | None:
        """The jobs to draw next, removed from the queue; None when the server closes and none is left."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closing:
                        return None
                    self._changed.wait()
                batch, full = self._gather()
                left = self._waiting[0].arrived + self._wait_seconds - time.monotonic()
                if full or self._closing or left <= 0:
                    break
                self._changed.wait(left)
            self._waiting = [job for job in self._waiting if job not in batch]
            self.metrics.queue_depth.set(len(self._waiting))
        now = time.monotonic()
        for job in batch:
            self.metrics.queue_wait_seconds.observe(now - job.arrived)
        return batch

    def _gather(self) -> tuple[list[Job], bool]:
        """The oldest job with those behind it that may share its batch and fit; and whether the batch is full.

        The oldest always goes, so nobody starves; a smaller one may pass a larger one that does not fit.
        """
        batch, images, full = [], 0, False
        max_images = self._max_images(self._waiting[0])
        for job in self._waiting:
            if batch and job.key != batch[0].key:
                continue
            if batch and images + job.image_request.request.candidates > max_images:
                full = True
                continue
            batch.append(job)
            images += job.image_request.request.candidates
        return batch, full or images >= max_images

    def _max_images(self, job: Job) -> int:
        """The maximum number of images in a batch with this job."""
        return self.capacity(guided=job.image_request.request.guidance != 1).images

    def _draw(self, pipe: Pipeline, batch: list[Job]) -> None:
        start = time.monotonic()
        images = sum(job.image_request.request.candidates for job in batch)

        def on_progress(preview: Preview) -> bool:
            job = batch[preview.request]
            if not job.cancelled and preview.step in job.image_request.preview_steps and preview.step > job.steps_shown:
                job.steps_shown = preview.step
                self._call(job.show, preview, preview.images())
            return not job.cancelled

        self.metrics.batch_requests.observe(len(batch))
        self.metrics.batch_fill.observe(min(1.0, images / self._max_images(batch[0])))
        try:
            results = pipe.draw([job.image_request.request for job in batch], on_progress=on_progress)
            for job, drawn in zip(batch, results, strict=True):
                if len(drawn) != job.image_request.request.n and not job.cancelled:
                    raise RuntimeError(
                        f"expected {job.image_request.request.n} images of the pipeline, got {len(drawn)}"
                    )
        except Exception:
            _log.exception("a batch of %d requests could not be drawn", len(batch))
            self._failures += 1
            self.metrics.failures.inc()
            if len(batch) > 1:  # one request must not take its neighbors down
                for job in batch:
                    if not job.cancelled:
                        self._draw(pipe, [job])
            else:
                self._call(batch[0].finish, None)
            return
        self._failures = 0
        seconds = time.monotonic() - start
        average = self._seconds_per_image or seconds / images
        self._seconds_per_image = _OLD_SHARE * average + (1 - _OLD_SHARE) * seconds / images
        self.metrics.draw_seconds.observe(seconds)
        for job, drawn in zip(batch, results, strict=True):
            if not job.cancelled:
                self.metrics.images.inc(len(drawn))
                self.metrics.candidates.inc(job.image_request.request.candidates)
                self._call(job.finish, drawn)

    def _call(self, function: Callable, *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: the server was stopped twice
            self._loop.call_soon_threadsafe(function, *values)
