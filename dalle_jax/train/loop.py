"""The training loop of every task: batches in, checkpoints, numbers and pictures out.

The loop waits for the numbers of an update only after it has dispatched the next one, so the device never idles for
the host. A checkpoint holds the state after update n and the data position after batch n; together with the seed
nothing else decides what update n + 1 computes, so a run that was stopped anywhere goes on bit for bit. What an update
is stands in `step.py`, what is measured in the task, how it is written in `report.py` and `metrics.py`, when it goes
back in `rollback.py`, where the time goes in `goodput.py` and `tracing.py`.
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax import distributed, sharding
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.errors import UserError
from dalle_jax.signals import Noted
from dalle_jax.train.aside import Hook, Hooks, due
from dalle_jax.train.evaluator import Evaluator
from dalle_jax.train.monitor import goodput, metrics, tracing
from dalle_jax.train.monitor.replicas import make_check
from dalle_jax.train.monitor.report import Report, to_terminal
from dalle_jax.train.monitor.rise import Rise
from dalle_jax.train.rollback import Rollback
from dalle_jax.train.settings import TrainSettings
from dalle_jax.train.step import State, TrainStep

Beat = Callable[[int, str], None]
# What the ledger of goodput books a phase on.
BOOKED = dict.fromkeys(("profile", "validation", "pictures"), "look") | {
    "replicas": "step",
    "checkpoint": "checkpoint",
    "hook": "sample",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run."""

    step: int  # updates made
    seconds: float  # of this call
    metrics: dict[str, float]  # the last written, 'train/...' and 'validation/...'
    signal: int  # that interrupted the run, 0 if it came to its end; SIGTERM where another process got it
    state: State  # the last one


def run(
    step: TrainStep,
    settings: TrainSettings,
    workdir: pathlib.Path,
    *,
    batches: ShardedBatches,
    validation: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None = None,
    hooks: Sequence[Hook] = (),
    progress: bool = True,
    profile: range | None = None,
    beat: Beat = lambda step, phase: None,
) -> Result:
    """Train until `settings.run.steps`, from the newest complete checkpoint in the workdir if there is one.

    batches: endless; gets the position of the checkpoint. validation: makes a new iterator over held-out batches.
    hooks: called between updates, see `aside.py`. progress: show a bar on a terminal, lines elsewhere; False is silent
    but for warnings. profile: updates to trace into WORKDIR/profile. beat: gets the step and what begins in it, see
    `distributed.Watchdog`.

    On SIGTERM or Ctrl-C in any process the update that all of them agree on is finished and saved before this returns.

    Raises:
      UserError: an unwritable workdir, checkpoints of another run, unusable data, updates that are not finite and
        stay so, or devices that should hold the same numbers and do not.
    """
    loop = _Loop(
        step,
        settings,
        workdir,
        batches=batches,
        validation=validation,
        hooks=hooks,
        progress=progress,
        profile=profile,
        beat=beat,
    )
    start, report, began = loop.saved, loop.report, time.monotonic()
    with Noted("the running step is finished and saved") as interrupted:
        try:
            stopped = loop.train(interrupted)
            loop.finish()
        finally:
            loop.close()
    seconds = time.monotonic() - began
    loop.ledger.write(ended=True)
    report.draw_goodput(loop.ledger, loop.saved)
    stopped_by = interrupted.signal or (signal.SIGTERM if stopped else 0)
    report.summary(loop.saved, seconds, start=start, ledger=loop.ledger, interrupted=bool(stopped_by))
    return Result(loop.saved, seconds, report.latest, int(stopped_by), loop.state)


class _Loop:
    """The parts of a run, and where it stands: at `state`, with a checkpoint of update `saved`."""

    def __init__(self, step: TrainStep, settings: TrainSettings, workdir: pathlib.Path, **given: Any):
        """given: the arguments of `run`."""
        self.step, self.run, self.beat = step, settings.run, given["beat"]
        self.batches: ShardedBatches = given["batches"]
        self.ledger = goodput.Ledger(workdir)
        init_key, self.key, look_key = jax.random.split(jax.random.key(settings.seed), 3)
        self.rise = Rise(step.task.onset)
        self.checkpoints = Checkpoints(
            workdir,
            keep=self.run.keep_checkpoints,
            keep_every_hours=self.run.keep_every_hours,
            also_keep=self.rise.best,
            folder=self.run.checkpoint_dir,
            warn=to_terminal,
        )
        self.hooks = Hooks(workdir, given["hooks"])
        self.beat(0, "restore")
        if (position := self.restore()) is None:
            self.saved, self.state = 0, step.init(init_key)
        else:
            self.batches.set_state(position)
        self.ledger.restored(self.saved)
        self.frozen = jax.device_put(step.task.frozen, sharding.replicated(step.mesh))
        self.report = Report(step.task, settings, workdir, start=self.saved, progress=given["progress"])
        self.recall()
        self.evaluator = Evaluator(
            step, workdir, self.frozen, look_key, given["validation"], max_batches=self.run.validation_batches
        )
        self.rollback = Rollback(self.run.rollback_after, patience=self.run.log_every, forgiven=step.scale_patience)
        self.trace = tracing.Trace(workdir / tracing.FOLDER, given["profile"], warn=to_terminal)
        self.check_replicas = make_check(step.abstract, mesh=step.mesh)

    def recall(self) -> None:
        """Learn of the validations until now from the log, which the first process has."""
        if self.step.task.onset:
            self.rise.recall(distributed.gather_json(metrics.read(self.report.log))[0])

    def restore(self) -> dict[str, Any] | None:
        """Take the state of the newest undamaged checkpoint; the position in the data then, None without one."""
        if (restored := self.checkpoints.restore_latest(self.step.saved)) is None:
            return None
        self.saved, state, position = restored
        self.state = self.step.from_saved(state)
        return position

    def train(self, interrupted: Noted) -> bool:
        """Make updates until the last or until a signal; True for a signal."""
        n, turn, stop, save_due = self.saved, 0, False, False
        while n < self.run.steps and not stop:
            n, turn = n + 1, turn + 1
            last = n == self.run.steps
            if self.trace.due(n):
                with self.phase("profile", n):
                    self.trace.toggle()
            batch, measured = self.update(n, booked="compile" if turn == 1 else "step")
            self.report.update(n, measured)  # waits for update n - 1
            if last:
                self.report.finish()

            overflows = self.report.overflows
            if self.rollback.due(self.report.streak, overflows=overflows, n=n, newest=self.checkpoints.latest):
                n, save_due = self.roll_back(n), False
                continue

            self.look(n, batch, last=last)
            stop = distributed.stop_agreed(turn, bool(interrupted.signal))
            save_due |= last or stop or due(n, self.run.checkpoint_every)
            if due(n, self.run.check_replicas_every, last=save_due):
                with self.phase("replicas", n):
                    self.check_replicas(self.state, n)
            if save_due:
                save_due = not self.save(n, last=last)
            if self.hooks.due(n) and (last or not stop):  # whoever wants the run to stop does not wait for them
                with self.phase("hook", n):
                    self.report.write(n, self.hooks.call(n, self.state))
            self.ledger.tick()
        return stop

    @contextlib.contextmanager
    def phase(self, name: str, n: int) -> Iterator[None]:
        """Something between updates: the watchdog hears of it, the progress waits for it, the ledger books it."""
        self.beat(n, name)
        with self.report.pause(), self.ledger.during(BOOKED[name]):
            yield

    def update(self, n: int, *, booked: str) -> tuple[Any, Any]:
        """Dispatch update n; its batch, and what it measures once it is done."""
        with tracing.annotation(n):
            self.beat(n, "data")
            waited = time.monotonic()
            batch = sharding.shard_batch(next(self.batches), self.step.mesh)
            if self.report.device_waits():
                self.ledger.move("data", time.monotonic() - waited)
            self.beat(n, "update")
            self.ledger.enter(booked)
            self.state, measured = self.step.update(self.state, self.frozen, batch, self.key)
            self.ledger.enter("step")
        return batch, measured

    def roll_back(self, n: int) -> int:
        """Take the state of the newest checkpoint, and return its number; the data go on."""
        self.beat(n, "restore")
        streak = self.report.streak
        del self.state  # before another one takes its place
        with self.ledger.during("lost"):
            if self.restore() is None:
                raise UserError("expected an undamaged checkpoint to go back to, got none: start a new run")
        self.ledger.restored(self.saved)
        self.report.rewind(self.saved)
        self.recall()
        to_terminal(
            f"warning: {streak} updates in a row were not finite, the last before update {n}: back to the parameters "
            f"of update {self.saved}; the data go on, so the batches since then do not come again"
        )
        return self.saved

    def look(self, n: int, batch: Any, *, last: bool) -> None:
        """Validation and pictures, if they are due."""
        if self.evaluator.validation and due(n, self.run.validate_every, last=last):
            with self.phase("validation", n):
                values = self.evaluator.validate(self.state)
                self.report.validated(n, values)
                if warning := self.rise.see(n, values, self.checkpoints.steps):
                    to_terminal(f"warning: {warning}")
        if due(n, self.run.picture_every, last=last):
            with self.phase("pictures", n):
                self.evaluator.draw(n, self.state, batch)
                if not last:
                    self.report.draw_curves()

    def save(self, n: int, *, last: bool) -> bool:
        """Begin to write a checkpoint; False while updates are skipped, as a checkpoint is something to go back to."""
        with self.phase("checkpoint", n):
            if self.report.streak and not last:
                return False
            self.state = self.step.to_saved(self.state)
            self.checkpoints.save(n, self.state, self.batches.get_state())
            self.state = self.step.from_saved(self.state)
            self.ledger.saved(n)
            self.saved = n
            return True

    def finish(self) -> None:
        """Wait for what is still being written."""
        self.beat(self.saved, "end")
        self.report.finish()
        with self.ledger.during("look"):
            self.trace.close()
            self.report.draw_curves()
        with self.ledger.during("checkpoint"):
            newest = self.checkpoints.latest() or 0
        if newest != self.saved:
            raise UserError(
                f"expected the last checkpoint, that of step {self.saved}, to be written, which failed: make room or "
                f"mend the storage, and give the command again, which goes on from step {newest}"
            )

    def close(self) -> None:
        """Leave nothing open, however the run ends."""
        self.trace.close()
        self.report.close()
        with self.ledger.during("checkpoint"):
            self.checkpoints.close()
        self.ledger.write()
