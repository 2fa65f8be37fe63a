"""The progress of a run for people: a bar or lines, the means of each interval, warnings, the last line.

The numbers of an update are read one update late, so that the device never waits for the host.
"""

import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import tqdm

from dalle_jax.train.monitor import goodput, metrics
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer.schedule import learning_rate
from dalle_jax.train.settings import TrainSettings

WARM_UP = 0.1  # share of the steps in which a task's warning is no news


def to_terminal(line: str) -> None:
    """One line on stderr, in the first process, above a progress bar if there is one."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
            tqdm.tqdm.write(line, file=sys.stderr)


class Report:
    """Progress bar, log lines, metrics of each interval and warnings.

    Attributes:
      streak: updates in a row that were not finite, the newest that was waited for included.
      overflows: how many of them had a finite loss.
      latest: the last value of every metric.
    """

    def __init__(self, task: Task, settings: TrainSettings, workdir: pathlib.Path, *, start: int, progress: bool):
        self._task, self._workdir = task, workdir
        self._run, self._batch_size = settings.run, settings.batch_size
        optimizer = settings.optimizer
        self._rate = learning_rate(optimizer.schedule, optimizer.learning_rate, steps=settings.run.steps)
        self._log = metrics.MetricsLog(workdir, step=start)
        self._progress = progress and jax.process_index() == 0
        self._bar = tqdm.tqdm(
            total=settings.run.steps,
            initial=start,
            desc=task.name,
            unit="step",
            disable=not (self._progress and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._interval: list[dict[str, float]] = []
        self._began, self._since, self._timed = time.monotonic(), 0.0, 0  # the first update compiles: not timed
        self.latest: dict[str, float] = {}
        self.streak = self.overflows = 0
        self._warned: set[str] = set()  # what showed the last warning, of 'train' and 'validation'

    @property
    def log(self) -> pathlib.Path:
        """The file with the metrics of every interval and validation."""
        return self._log.path

    def update(self, n: int, measured: dict[str, jax.Array]) -> None:
        """Take the numbers of an update that was just dispatched; wait for those of the one before."""
        self.finish()
        self._pending = (n, measured)

    def finish(self) -> None:
        """Wait for the numbers that are still out."""
        if self._pending is None:
            return
        (n, measured), self._pending = self._pending, None
        values = metrics.scalars(jax.device_get(measured))
        if self._run.log_every:
            self._interval.append(values)
        if values["finite"]:
            self.streak = self.overflows = 0
        else:
            self.streak, self.overflows = self.streak + 1, self.overflows + math.isfinite(values["loss"])
        if self._since:
            self._timed += 1
        else:
            self._since = time.monotonic()
        self._bar.update(n - self._bar.n)
        if self._run.log_every and n % self._run.log_every == 0:
            self._end_interval(n)

    def device_waits(self) -> bool:
        """Whether every update that was dispatched is done, so that the device has nothing to do."""
        return self._pending is None or self._pending[1]["loss"].is_ready()  # type: ignore[attr-defined]  # not in stubs

    def rewind(self, step: int) -> None:
        """Go on from an earlier update: forget what was measured after it."""
        self._pending, self._interval, self.streak, self.overflows = None, [], 0, 0
        self._log.rewind(step)
        self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def pause(self):
        """Wait for the update at work, and leave the time inside, which is not training, out of images/s."""
        self.finish()
        began = time.monotonic()
        yield
        if self._since:
            self._since += time.monotonic() - began

    def _images_per_second(self) -> float:
        now = time.monotonic()
        updates, seconds = (self._timed, now - self._since) if self._timed else (1, now - self._began)
        self._since, self._timed = now, 0
        return updates * self._batch_size / max(seconds, 1e-9)

    def _end_interval(self, n: int) -> None:
        """Write the means of the interval, non-finite updates left out."""
        interval, self._interval = self._interval, []
        good = [values for values in interval if values.pop("finite")]
        if len(good) < len(interval):
            to_terminal(
                f"warning: {len(interval) - len(good)} of the last {len(interval)} updates were not finite, skipped"
            )
        if not good:
            return
        means = {f"train/{name}": sum(v[name] for v in good) / len(good) for name in good[0]}
        means["train/skipped"] = interval[-1]["skipped"]
        means["train/learning_rate"] = float(self._rate(n - 1)) * interval[-1].get("plateau_scale", 1.0)
        means["train/images_per_second"] = self._images_per_second()
        self.write(n, means)
        self._bar.set_postfix_str(
            f"loss {means['train/loss']:.4g}, {means['train/images_per_second']:.4g} images/s", refresh=False
        )
        if self._progress and self._bar.disable:
            left = (self._run.steps - n) * self._batch_size / means["train/images_per_second"]
            to_terminal(
                f"{self._task.name} step {n}/{self._run.steps}: loss {means['train/loss']:.4g}, "
                f"{means['train/images_per_second']:.4g} images/s, {tqdm.tqdm.format_interval(left)} left"
            )
        self._warn(n, "train", means)

    def validated(self, n: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a validation, 'validation/...', and warn of what they show."""
        self.write(n, values)
        self._warn(n, "validation", values)

    def _warn(self, n: int, kind: str, values: Mapping[str, float]) -> None:
        """The task's warning, said again only after it was gone."""
        if self._task.warn and n > WARM_UP * self._run.steps:
            warning = self._task.warn({name.removeprefix(f"{kind}/"): value for name, value in values.items()})
            if warning and kind not in self._warned:
                where = f"step {n}, validation" if kind == "validation" else f"step {n}"
                to_terminal(f"warning: {where}: {warning}")
            (self._warned.add if warning else self._warned.discard)(kind)

    def write(self, n: int, values: Mapping[str, float]) -> None:
        if not values:
            return
        self.latest.update(values)
        with surviving_a_full_disk("metrics.jsonl"):
            self._log.write(n, values)

    def draw_curves(self) -> None:
        if jax.process_index() == 0:
            with surviving_a_full_disk("curves.png"):
                metrics.save_curves(self._log.path, self._workdir / "curves.png")

    def draw_goodput(self, ledger: goodput.Ledger, step: int) -> None:
        if jax.process_index() == 0:
            with surviving_a_full_disk(goodput.PICTURE):
                goodput.draw(ledger, updates=step, path=self._workdir / goodput.PICTURE)

    def summary(
        self,
        step: int,
        seconds: float,
        *,
        start: int,
        ledger: goodput.Ledger,
        interrupted: bool,
    ) -> None:
        if not self._progress:
            return
        shown = [name for name in ("train/loss", "validation/loss") if name in self.latest]
        figures = [f"{name.removeprefix('train/')} {self.latest[name]:.4g}" for name in shown]
        speed = (step - start) * self._batch_size / max(seconds, 1e-9)
        end = "; interrupted, the same command goes on" if interrupted else ""
        took = tqdm.tqdm.format_interval(seconds)
        to_terminal(
            f"{self._task.name}: {step} of {self._run.steps} updates in {self._workdir}, {step - start} of them "
            f"now in {took} ({speed:.4g} images/s){''.join(', ' + f for f in figures)}, goodput "
            f"{goodput.share(ledger.seconds):.1%} over {ledger.starts} start{'s' * (ledger.starts > 1)}{end}"
        )

    def close(self) -> None:
        self._bar.close()
        self._log.close()


@contextlib.contextmanager
def surviving_a_full_disk(what: str):
    """Warn of what cannot be written inside, and go on: something written for people is not worth a run."""
    try:
        yield
    except OSError as error:
        to_terminal(f"warning: {what} could not be written ({error.strerror or error}), training goes on")
