"""The training loop of every task: batches in, checkpoints, numbers and pictures out.

The loop waits for the numbers of an update only after it has dispatched the next one, so the device never idles for
the host. A checkpoint holds the state after update n and the data position after batch n; together with the seed
nothing else decides what update n + 1 computes, so a run that was stopped anywhere goes on bit for bit. What an update
is stands in `step.py`, what is measured in the task, how it is written in `report.py` and `metrics.py`, when it goes
back in `rollback.py`, where the time goes in `goodput.py` and `tracing.py`.
"""

import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from dalle_jax import distributed, sharding
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.errors import UserError
from dalle_jax.train.ema import Ema
from dalle_jax.train.evaluator import Evaluator
from dalle_jax.train.monitor import goodput, replicas, tracing
from dalle_jax.train.monitor.report import Report, surviving_a_full_disk, to_terminal
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.optimizer.schedule import learning_rate
from dalle_jax.train.rollback import Rollback
from dalle_jax.train.step import State, Storage, TrainStep

# (every, f): f(step, state) after each `every`-th update; it may return numbers for the metrics.
Hook = tuple[int, Callable[[int, State], Mapping[str, float] | None]]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. step: updates made. seconds: of this call. metrics: the last written, 'train/...' and
    'validation/...'. signal: what interrupted the run, 0 if it came to its end; SIGTERM where another process got it.
    state: the last one."""

    step: int
    seconds: float
    metrics: dict[str, float]
    signal: int
    state: State


def run(
    task: Task,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    mesh: Mesh,
    batches: ShardedBatches,
    validation: Callable[[], Iterable[dict[str, np.ndarray]]] | None = None,
    hooks: Sequence[Hook] = (),
    progress: bool = True,
    profile: tracing.Window | None = None,
    beat: Callable[[int, str], None] = lambda step, phase: None,
) -> Result:
    """Train until `config.steps`, from the newest complete checkpoint in the workdir if there is one.

    batches: endless; gets the position of the checkpoint. validation: makes a fresh iterator over held-out batches.
    hooks: called between updates; they must not keep the state, which the next update overwrites. progress: show a
    bar on a terminal, lines elsewhere; False is silent but for warnings. profile: updates to trace into
    WORKDIR/profile. beat: told the step and what begins in it, see `distributed.Watchdog`.

    On SIGTERM or Ctrl-C in any process the update that all of them agree on is finished and saved before this returns.

    Raises:
      UserError: an unwritable workdir, checkpoints of another run, unusable data, updates that are not finite and
        stay so, or devices that should hold the same numbers and do not.
    """
    ledger = goodput.Ledger(workdir)
    optimizer = Optimizer(**config.optimizer)
    step = TrainStep(
        task,
        build_optimizer(optimizer, steps=config.steps, axes=task.model.axes),
        mesh,
        storage=Storage(**config.storage),
        compression=Compression(**config.compression),
        accumulate=config.accumulate,
        ema=Ema(**config.ema),
    )
    init_key, update_key, look_key = jax.random.split(jax.random.key(config.seed), 3)
    checkpoints = Checkpoints(
        workdir,
        keep=config.keep_checkpoints,
        keep_every_hours=config.keep_every_hours,
        folder=config.checkpoint_dir,
        warn=to_terminal,
    )
    beat(0, "restore")
    if (restored := checkpoints.restore_latest(step.saved)) is not None:
        start, state, position = restored
        state = step.from_saved(state)
        batches.set_state(position)
    else:
        start, state = 0, step.init(init_key)
    ledger.restored(start)
    frozen = jax.device_put(task.frozen, sharding.replicated(mesh))
    look = Evaluator(step, workdir, frozen, key=look_key, validation=validation, max_batches=config.validation_batches)
    rate = learning_rate(optimizer.schedule, optimizer.learning_rate, steps=config.steps)
    report = Report(task, config, workdir, start=start, rate=rate, progress=progress)
    rollback = Rollback(config.rollback_after, patience=config.log_every, forgiven=step.scale_patience)
    trace = tracing.Trace(workdir / tracing.FOLDER, profile, warn=to_terminal)
    check_replicas = replicas.make_check(step.abstract, mesh=mesh)
    began, saved, save_due = time.monotonic(), start, False
    n, turn, stop = start, 0, False

    with _Signals() as interrupted:
        try:
            while n < config.steps and not stop:
                n, turn = n + 1, turn + 1
                if trace.due(n):
                    beat(n, "profile")
                    with report.pause(), ledger.during("look"):
                        trace.turn()
                with tracing.annotation(n):
                    beat(n, "data")
                    waited = time.monotonic()
                    batch = sharding.shard_batch(next(batches), mesh)
                    if report.device_waits():
                        ledger.move("data", time.monotonic() - waited)
                    beat(n, "update")
                    ledger.enter("compile" if turn == 1 else "step")
                    state, measured = step.update(state, frozen, batch, update_key)
                    ledger.enter("step")
                report.update(n, measured)  # waits for update n - 1
                last = n == config.steps
                if last:
                    report.finish()

                if rollback.due(report.streak, overflows=report.overflows, n=n, newest=checkpoints.latest):
                    beat(n, "restore")
                    streak = report.streak
                    del state  # before another one takes its place
                    with ledger.during("lost"):
                        restored = checkpoints.restore_latest(step.saved)
                    if restored is None:
                        raise UserError("expected an undamaged checkpoint to go back to, got none: start a new run")
                    saved, state = restored[0], step.from_saved(restored[1])
                    ledger.restored(saved)
                    report.rewind(saved)
                    report.say(
                        f"warning: {streak} updates in a row were not finite, the last before update {n}: back to the "
                        f"parameters of update {saved}; the data go on, so the batches since then do not come again"
                    )
                    n, save_due = saved, False
                    continue

                if validation is not None and _due(n, config.validate_every, last=last):
                    beat(n, "validation")
                    with report.pause(), ledger.during("look"):
                        report.write(n, look.validate(state))
                if _due(n, config.picture_every, last=last):
                    beat(n, "pictures")
                    with report.pause(), ledger.during("look"):
                        look.draw(n, state, batch)
                        if not last:
                            report.draw_curves()
                for every, hook in hooks:
                    if n % every == 0:
                        beat(n, "hook")
                        with report.pause(), ledger.during("look"), surviving_a_full_disk("what a hook writes"):
                            if measured_by_hook := hook(n, state):
                                report.write(n, measured_by_hook)

                stop = distributed.stop_agreed(turn, bool(interrupted.signal))
                save_due |= _due(n, config.checkpoint_every, last=last or stop)
                check = config.check_replicas_every
                if check and (save_due or n % check == 0):  # what is saved was checked
                    beat(n, "replicas")
                    with report.pause():
                        check_replicas(state, n)
                if save_due:
                    beat(n, "checkpoint")
                    with report.pause(), ledger.during("checkpoint"):
                        if last or not report.streak:  # a checkpoint is something to go back to
                            state = step.to_saved(state)
                            checkpoints.save(n, state, batches.get_state())
                            state = step.from_saved(state)
                            ledger.saved(n)
                            saved, save_due = n, False
                ledger.tick()
            beat(saved, "end")
            report.finish()
            with ledger.during("look"):
                trace.close()
                report.draw_curves()
            with ledger.during("checkpoint"):
                newest = checkpoints.latest() or 0
            if newest != saved:
                raise UserError(
                    f"expected the last checkpoint, that of update {saved}, to be written, which failed: make room or "
                    f"mend the storage, and give the command again, which goes on from update {newest}"
                )
        finally:
            trace.close()
            report.close()
            with ledger.during("checkpoint"):
                checkpoints.close()
            ledger.write()
    seconds = time.monotonic() - began
    ledger.write(ended=True)
    report.draw_goodput(ledger, saved)
    stopped_by = interrupted.signal or (signal.SIGTERM if stop else 0)
    report.summary(saved, seconds, start=start, workdir=workdir, ledger=ledger, interrupted=bool(stopped_by))
    return Result(saved, seconds, report.latest, int(stopped_by), state)


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
