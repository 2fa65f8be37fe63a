"""The queue and the one thread that draws: requests wait a bounded time for company and then share a batch.

The thread loads the pipeline and is the only one that calls `draw`. Everything else, the queue included, belongs to
the event loop's side; the two meet under one lock that is never held while something is drawn.
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

from dalle_jax.errors import UserError
from dalle_jax.sample.request import Preview, Request
from dalle_jax.serve.metrics import Metrics
from dalle_jax.serve.refusal import Refusal
from dalle_jax.serve.schema import Order

LOADING, READY, FAILING = "loading", "ready", "failing"
MAX_UNSENT = 8  # previews kept for a client that reads slowly; older ones are dropped
_FAILURES = 3  # batches in a row that must fail until the server calls itself failing
_MAX_RETRY = 600  # seconds

_log = logging.getLogger(__name__)


class Job:
    """An order in the queue. `done` is its pictures; `previews` holds those not yet sent with
    their finished rows, `news` says that there are.

    Belongs to the event loop, except for `cancelled`, which the drawing thread reads.
    """

    def __init__(self, order: Order, key: Hashable, *, deadline: float):
        self.order, self.key, self.deadline = order, key, deadline
        self.arrived = time.monotonic()
        self.cancelled = False
        self.rows_shown = 0
        self.done: asyncio.Future[list[Image.Image]] = asyncio.get_running_loop().create_future()
        self.previews: collections.deque[tuple[int, list[Image.Image]]] = collections.deque(maxlen=MAX_UNSENT)
        self.news = asyncio.Event()

    def show(self, rows: int, pictures: list[Image.Image]) -> None:
        self.previews.append((rows, pictures))
        self.news.set()

    def finish(self, outcome: list[Image.Image] | Exception) -> None:
        if not self.done.done():
            if isinstance(outcome, Exception):
                self.done.set_exception(outcome)
                self.done.exception()  # counts as seen, also where the client has gone
            else:
                self.done.set_result(outcome)
        self.news.set()


class Batcher:
    """Queue, batches and the drawing thread.

    load: makes the pipeline. max_batch: pictures drawn together, unless one request alone asks for more; None for as
      many as the pipeline draws at a time (`room`).
    wait_seconds: how long the first of a batch waits for others. queue: requests that may wait.
    on_ready: called with None, or with the exception that `load` raised, from the drawing thread.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        max_batch: int | None,
        wait_seconds: float,
        queue: int,
        deadline_seconds: float,
        metrics: Metrics,
        on_ready: Callable[[Exception | None], None] = lambda error: None,
    ):
        self._load, self._on_ready, self.metrics = load, on_ready, metrics
        self._max_batch, self.deadline_seconds = max_batch, deadline_seconds
        self._wait_seconds, self._queue = wait_seconds, queue
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failures = 0
        self._seconds_per_picture = 0.0  # of late
        self._pipe: Any = None
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)

    def start(self) -> None:
        """Starts the drawing thread; call it on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Returns when everything that was submitted is drawn and the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def state(self) -> str:
        """LOADING, READY or FAILING."""
        if self._broken or self._failures >= _FAILURES:
            return FAILING
        return LOADING if self._pipe is None else READY

    @property
    def pipe(self) -> Any:
        """The pipeline, for checks that draw nothing.

        Raises:
          Refusal: it is not there yet.
        """
        if self._pipe is None:
            message = "the model could not be loaded" if self._broken else "the model is being loaded: try again soon"
            raise Refusal(503, message, code=f"model_{self.state}", headers={"Retry-After": "5"})
        return self._pipe

    def room(self, *, guided: bool) -> tuple[int, str]:
        """Pictures that are drawn together, guided ones or others, and why so many."""
        return self.pipe.wave(guided=guided) if self._max_batch is None else (self._max_batch, "as --max-batch says")

    def told(self) -> list[str]:
        """Sentences that say how many pictures are drawn together, and why."""
        lines: dict[int, str] = {}
        for guidance, words in ((1.0, ""), (2.0, " with guidance")):
            with contextlib.suppress(UserError):
                self.pipe.check(Request("", guidance=guidance))
                most, why = self.room(guided=guidance != 1)
                lines.setdefault(most, f"draws up to {most} pictures{words} together: {why}")
        return list(lines.values())

    def submit(self, order: Order) -> Job:
        """Puts an order into the queue.

        Raises:
          Refusal: the queue is full; 429 with a Retry-After of about the time that what waits will take.
        """
        job = Job(order, self.pipe.wave_key(order.request), deadline=time.monotonic() + self.deadline_seconds)
        with self._changed:
            if len(self._waiting) >= self._queue:
                ahead = sum(waiting.order.candidates for waiting in self._waiting)
                seconds = min(max(1, math.ceil(ahead * self._seconds_per_picture)), _MAX_RETRY)
                message = f"{len(self._waiting)} requests are waiting, as many as may: try again in {seconds} s"
                raise Refusal(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
            self._waiting.append(job)
            self.metrics.queue_depth.set(len(self._waiting))
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Takes a job that isn't done out of the queue, or out of the batch at the end of the row being drawn."""
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
            pipe.draw([Request("")])  # compiles the usual programs, and shows that the model draws
            for guidance in (1.0, 2.0):  # what fits a wave may be measured at the first question, so that is here
                with contextlib.suppress(UserError):
                    pipe.check(usual := Request("", guidance=guidance))
                    pipe.wave_key(usual)
        except Exception as error:
            self._broken = True
            self._on_ready(error)
            return
        self._pipe = pipe
        self._on_ready(None)
        while (batch := self._next_batch()) is not None:
            self._draw(batch)

    def _next_batch(self) -> list[Job] | None:
        """The jobs to draw next, removed from the queue; None when the server closes and none is left."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._closing:
                        return None
                    self._changed.wait()
                batch, full = self._company()
                patience = self._waiting[0].arrived + self._wait_seconds - time.monotonic()
                if full or self._closing or patience <= 0:
                    break
                self._changed.wait(patience)
            self._waiting = [job for job in self._waiting if job not in batch]
            self.metrics.queue_depth.set(len(self._waiting))
        now = time.monotonic()
        for job in batch:
            self.metrics.queue_wait_seconds.observe(now - job.arrived)
        return batch

    def _company(self) -> tuple[list[Job], bool]:
        """The oldest job with those behind it that may share its waves and fit; whether there is no more room.

        The oldest always goes, so nobody starves; a smaller one may pass a larger one that does not fit.
        """
        batch, pictures, full = [], 0, False
        most = self._most(self._waiting[0])
        for job in self._waiting:
            if batch and job.key != batch[0].key:
                continue
            if batch and pictures + job.order.candidates > most:
                full = True
                continue
            batch.append(job)
            pictures += job.order.candidates
        return batch, full or pictures >= most

    def _most(self, job: Job) -> int:
        """Pictures of a batch with this job."""
        return self.room(guided=job.order.request.guidance != 1)[0]

    def _draw(self, batch: list[Job]) -> None:
        start = time.monotonic()
        pictures = sum(job.order.candidates for job in batch)

        def on_rows(preview: Preview) -> bool:
            job = batch[preview.request]
            if not job.cancelled and preview.rows in job.order.preview_rows and preview.rows > job.rows_shown:
                job.rows_shown = preview.rows
                self._tell(job.show, preview.rows, preview.pictures())
            return not job.cancelled

        self.metrics.batch_requests.observe(len(batch))
        self.metrics.batch_fill.observe(min(1.0, pictures / self._most(batch[0])))
        try:
            results = self._pipe.draw([job.order.request for job in batch], on_rows=on_rows)
            for job, drawn in zip(batch, results, strict=True):
                if len(drawn) != job.order.request.n and not job.cancelled:
                    raise RuntimeError(f"expected {job.order.request.n} pictures of the pipeline, got {len(drawn)}")
        except Exception as error:
            _log.exception("a batch of %d requests could not be drawn", len(batch))
            self._failures += 1
            self.metrics.failures.inc()
            if len(batch) > 1:  # one request must not take its neighbours down
                for job in batch:
                    if not job.cancelled:
                        self._draw([job])
            else:
                self._tell(batch[0].finish, error)
            return
        self._failures = 0
        seconds = time.monotonic() - start
        of_late = self._seconds_per_picture or seconds / pictures
        self._seconds_per_picture = 0.7 * of_late + 0.3 * seconds / pictures
        self.metrics.draw_seconds.observe(seconds)
        for job, drawn in zip(batch, results, strict=True):
            if not job.cancelled:
                self.metrics.images.inc(len(drawn))
                self.metrics.candidates.inc(job.order.candidates)
                self._tell(job.finish, drawn)

    def _tell(self, function: Callable, *values: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone: the server was told twice to stop
            self._loop.call_soon_threadsafe(function, *values)
