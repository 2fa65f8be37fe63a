"""The training loop of every task: batches in, checkpoints, numbers and pictures out.

The loop waits for the numbers of an update only after it has dispatched the next one, so the device never idles for
the host. A checkpoint holds the state after update n and the data position after batch n; together with the seed
nothing else decides what update n + 1 computes, so a run that was stopped anywhere goes on bit for bit. What an update
is stands in `step.py`, what is measured in the task, how it is written in `metrics.py`.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh

from dalle_jax import sharding
from dalle_jax.checkpoint import Checkpoints
from dalle_jax.data.pipeline import Batches
from dalle_jax.errors import UserError
from dalle_jax.train import metrics as metrics_files
from dalle_jax.train import optimizer as optimizers
from dalle_jax.train import step as steps
from dalle_jax.train.task import Task

Hook = tuple[int, Callable[[int, steps.State], None]]  # (every, f): f(step, state) after each `every`-th update


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. step: updates made. seconds: of this call. metrics: the last written, 'train/...' and
    'validation/...'. signal: what interrupted the run, 0 if it came to its end. state: the last one."""

    step: int
    seconds: float
    metrics: dict[str, float]
    signal: int
    state: steps.State


def run(
    task: Task,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    mesh: Mesh,
    batches: Batches,
    validation: Callable[[], Iterable[dict[str, np.ndarray]]] | None = None,
    hooks: Sequence[Hook] = (),
    progress: bool = True,
) -> Result:
    """Train until `config.steps`, from the newest complete checkpoint in the workdir if there is one.

    batches: endless; gets the position of the checkpoint. validation: makes a fresh iterator over held-out batches.
    hooks: called between updates; they must not keep the state, which the next update overwrites. progress: show a
    bar on a terminal, lines elsewhere; False is silent but for warnings.

    On SIGTERM or Ctrl-C the update at work is finished and saved before this returns.

    Raises:
      UserError: an unwritable workdir, a damaged checkpoint, unusable data, or only non-finite updates.
    """
    optimizer = optimizers.build(config.optimizer, steps=config.steps, axes=task.model.axes)
    storage = steps.Storage(**config.storage)
    update = steps.make_update(
        task,
        optimizer,
        mesh=mesh,
        accumulate=config.accumulate,
        ema_decay=config.ema.decay,
        ema_every=config.ema.every,
        storage=storage,
    )
    init_key, update_key, look_key = jax.random.split(jax.random.key(config.seed), 3)
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    start = checkpoints.latest() or 0
    if start:
        abstract = steps.abstract_state(task, optimizer, mesh=mesh, storage=storage)
        state, position = checkpoints.restore(start, abstract)
        batches.set_state(position)
    else:
        state = steps.init_state(task, optimizer, key=init_key, mesh=mesh, storage=storage)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    look = _Look(task, workdir, frozen, mesh=mesh, key=look_key, validation=validation, most=config.validation_batches)
    rate = optimizers.schedule(config.optimizer, steps=config.steps)
    report = _Report(task, config, workdir, start=start, rate=rate, progress=progress)
    began, saved = time.monotonic(), start

    with _Signals() as interrupted:
        try:
            for n in range(start + 1, config.steps + 1):
                batch = sharding.shard_batch(next(batches), mesh)
                state, measured = update(state, frozen, batch, update_key)
                report.update(n, measured)  # waits for update n - 1
                last = n == config.steps
                if validation is not None and _due(n, config.validate_every, last=last):
                    with report.pause():
                        report.write(n, look.validate(state))
                if _due(n, config.picture_every, last=last):
                    with report.pause():
                        look.draw(n, state, batch)
                        if not last:
                            report.draw_curves()
                for every, hook in hooks:
                    if n % every == 0:
                        with report.pause():
                            hook(n, state)
                stop = bool(interrupted.signal)  # asked once: a later signal is for the next update
                if _due(n, config.checkpoint_every, last=last or stop):
                    with report.pause():
                        checkpoints.save(n, state, batches.get_state())
                    saved = n
                if stop:
                    break
            report.finish()
            report.draw_curves()
        finally:
            report.close()
            checkpoints.close()
    seconds = time.monotonic() - began
    report.summary(saved, seconds, start=start, workdir=workdir, interrupted=bool(interrupted.signal))
    return Result(saved, seconds, report.latest, interrupted.signal, state)


def _due(n: int, every: int, *, last: bool) -> bool:
    return last or (every > 0 and n % every == 0)


class _Signals:
    """Notes the first SIGTERM or SIGINT instead of dying of it; the second one acts as usual."""

    def __init__(self):
        self.signal = 0
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        self._restore()

    def _note(self, number, _frame):
        self.signal = int(number)
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Look:
    """Validation loss and pictures, with the moving average of the parameters."""

    def __init__(self, task: Task, workdir: pathlib.Path, frozen, *, mesh: Mesh, key, validation, most: int):
        self._task, self._frozen, self._mesh, self._key = task, frozen, mesh, key
        self._pictures, self._validation, self._most = workdir / "pictures", validation, most
        self._evaluate = steps.make_evaluate(task, mesh=mesh)
        self._first = None  # batch to look at

    def _batches(self) -> Iterable[tuple[int, dict[str, jax.Array]]]:
        """Number of examples and device batch; a partial batch is cut to what the mesh divides."""
        ways = sharding.batch_ways(self._mesh)
        for index, batch in enumerate(self._validation()):
            size = len(batch["image"]) // ways * ways
            if index == self._most or not size:
                return
            yield size, sharding.shard_batch({name: value[:size] for name, value in batch.items()}, self._mesh)

    def validate(self, state: steps.State) -> dict[str, float]:
        """Mean of every metric over the held-out examples; the same noise each time."""
        sizes, values = [], []
        for index, (size, batch) in enumerate(self._batches()):
            key = jax.random.fold_in(self._key, index)
            values.append(self._evaluate(state["ema"], self._frozen, batch, key, state["step"]))
            sizes.append(size)
        if not values:
            raise UserError(
                f"expected at least {sharding.batch_ways(self._mesh)} usable records in config.data.validation, "
                "got fewer: give a larger source or leave it empty"
            )
        values = jax.device_get(values)
        return {f"validation/{k}": float(np.average([v[k] for v in values], weights=sizes)) for k in values[0]}

    def draw(self, n: int, state: steps.State, batch) -> None:
        """pictures/STEP.png of the first held-out batch, or of this one where nothing is held out."""
        if self._first is None:
            self._first = next(iter(self._batches()), (0, batch))[1] if self._validation is not None else batch
        pictures = self._task.pictures(state["ema"], self._frozen, self._first, self._key)
        if pictures is not None and jax.process_index() == 0:
            self._pictures.mkdir(exist_ok=True)
            metrics_files.sheet(jax.device_get(pictures)).save(self._pictures / f"{n:07d}.png")


class _Report:
    """Progress bar, log lines, metrics of each interval and warnings."""

    def __init__(self, task: Task, config, workdir: pathlib.Path, *, start: int, rate, progress: bool):
        self._task, self._config, self._rate, self._workdir = task, config, rate, workdir
        self._log = metrics_files.MetricsLog(workdir, step=start)
        self._progress = progress and jax.process_index() == 0
        self._bar = tqdm.tqdm(
            total=config.steps,
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

    def update(self, n: int, measured: dict[str, jax.Array]) -> None:
        """Takes the numbers of an update that was just dispatched; waits for those of the one before."""
        self.finish()
        self._pending = (n, measured)

    def finish(self) -> None:
        """Waits for the numbers that are still out."""
        if self._pending is None:
            return
        (n, measured), self._pending = self._pending, None
        self._interval.append({name: float(value) for name, value in jax.device_get(measured).items()})
        if self._since:
            self._timed += 1
        else:
            self._since = time.monotonic()
        self._bar.update(n - self._bar.n)
        if self._config.log_every and n % self._config.log_every == 0:
            self._end_interval(n)

    @contextlib.contextmanager
    def pause(self):
        """For what is not training: waits for the update at work, and leaves the time inside out of images/s."""
        self.finish()
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def _images_per_second(self) -> float:
        now = time.monotonic()
        updates, seconds = (self._timed, now - self._since) if self._timed else (1, now - self._began)
        self._since, self._timed = now, 0
        return updates * self._config.batch_size / max(seconds, 1e-9)

    def _end_interval(self, n: int) -> None:
        """Writes the means of the interval, non-finite updates left out."""
        interval, self._interval = self._interval, []
        good = [values for values in interval if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])]
        if not good:
            raise UserError(
                f"expected finite losses, got none in the last {len(interval)} updates before {n}: lower "
                "config.optimizer.learning_rate or set config.optimizer.clip_norm, and start from an earlier checkpoint"
            )
        means = {f"train/{name}": sum(v[name] for v in good) / len(good) for name in good[0]}
        means["train/skipped"] = interval[-1]["skipped"]
        means["train/learning_rate"] = float(self._rate(n - 1)) * interval[-1].get("plateau_scale", 1.0)
        means["train/images_per_second"] = self._images_per_second()
        self.write(n, means)
        self._bar.set_postfix_str(
            f"loss {means['train/loss']:.4g}, {means['train/images_per_second']:.4g} images/s", refresh=False
        )
        if self._progress and self._bar.disable:
            left = (self._config.steps - n) * self._config.batch_size / means["train/images_per_second"]
            self.say(
                f"{self._task.name} step {n}/{self._config.steps}: loss {means['train/loss']:.4g}, "
                f"{means['train/images_per_second']:.4g} images/s, {_clock(left)} left"
            )
        if len(good) < len(interval):
            self.say(
                f"warning: {len(interval) - len(good)} of the last {len(interval)} updates were not finite, skipped"
            )
        if warning := self._task.warn({name.removeprefix("train/"): value for name, value in means.items()}):
            self.say(f"warning: step {n}: {warning}")

    def write(self, n: int, values: dict[str, float]) -> None:
        self.latest.update(values)
        self._log.write(n, values)

    def draw_curves(self) -> None:
        if jax.process_index() == 0:
            metrics_files.save_curves(self._log.path, self._workdir / "curves.png")

    def say(self, line: str) -> None:
        if jax.process_index() == 0:
            self._bar.write(line, file=sys.stderr)

    def summary(self, step: int, seconds: float, *, start: int, workdir: pathlib.Path, interrupted: bool) -> None:
        if not self._progress:
            return
        figures = [f"{k.replace('train/', '')} {self.latest[k]:.4g}" for k in _SUMMARY if k in self.latest]
        speed = (step - start) * self._config.batch_size / max(seconds, 1e-9)
        end = "; interrupted, the same command goes on" if interrupted else ""
        self.say(
            f"{self._task.name}: {step} of {self._config.steps} updates in {workdir}, {step - start} of them now in "
            f"{_clock(seconds)} ({speed:.4g} images/s){''.join(', ' + f for f in figures)}{end}"
        )

    def close(self) -> None:
        self._bar.close()
        self._log.close()


_SUMMARY = ("train/loss", "validation/loss")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
