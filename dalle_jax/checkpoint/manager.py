"""The checkpoints of a run while it trains: written in the background, kept by number and by age, checked before use.

What a checkpoint is made of stands in `checkpoint.py`. Here is when one is complete, which stay, and what happens to
those that could not be written or were damaged since: training survives both.
"""

import concurrent.futures
import contextlib
import errno
import functools
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax import distributed
from dalle_jax.checkpoint import digest, format
from dalle_jax.checkpoint.save_barrier import OtherProcessFailed, SaveBarrier
from dalle_jax.errors import UserError, say

DAMAGED = "damaged"  # damaged-STEP-N beside the checkpoints
ORBAX_WRITER = "async_save"  # Orbax's thread that writes and renames; where its metadata fail, Orbax waits not for it


class Checkpoints:
    """The checkpoints of one run, for its training loop. Saving happens in the background.

    A save that fails (a full disk, a network file system that is away) is a warning and no more: nothing but complete
    checkpoints is ever deleted to make room, and only after a newer one is complete.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep: int,
        keep_every_hours: float = 0.0,
        folder: str = "",
        warn: Callable[[str], None] = say,
    ):
        """keep: how many of the newest stay. keep_every_hours: besides, one in so many hours stays for ever; 0 none.

        folder: where they lie, a local path or gs://...; '' is below the workdir. warn: gets one line at a time, in
        the first process only.

        Raises:
          UserError: the place cannot be written.
        """
        self._folder = format.checkpoint_folder(workdir, folder)
        self._warn = warn if jax.process_index() == 0 else (lambda line: None)
        policies = [ocp.checkpoint_managers.LatestN(n=keep)]
        if keep_every_hours:
            policies.append(ocp.checkpoint_managers.EveryNSeconds(interval_secs=round(keep_every_hours * 3600)))
        self._policy = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
        self._writing: int | None = None  # step that is being saved
        self._apart: Any = None  # the copy of the state that is written, see `_set_apart`
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._started: concurrent.futures.Future | None = None  # Orbax's `save`, where it runs in the background
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
        except OSError as error:
            raise UserError(
                f"expected a workdir to write to, got {self._folder} ({error.strerror}): choose another"
            ) from error
        self._manager: ocp.CheckpointManager | None = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_manifest, barrier_sync_fn=SaveBarrier()
            ),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none; waits for one that is being written.

        All processes must call this at the same point, as all methods here.
        """
        self._finish()
        return max(self._steps(), default=None)

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Starts writing; the arrays may be donated as soon as this returns. Does nothing if the step is saved.

        Waits for the save before, and warns if that one or the start of this one failed.
        """
        self._finish()
        # Where process 0 cannot make a folder the others wait for it long.
        problem = _anywhere(self._unwritable() or self._unopened())
        if problem is None and step in self._manager.all_steps():
            return
        self._writing = step
        if problem:
            return self._failed(problem)
        failure = None
        try:
            state = self._set_apart(state)
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data)))
            start = functools.partial(self._manager.save, step, args=items, force=True)
            if self._apart is not None and jax.process_count() == 1:  # several agree in it, in their main threads
                self._started = self._starter.submit(start)
            else:
                start()
        except Exception as error:  # Orbax, TensorStore and file systems raise many kinds
            failure = error
        if (reason := _agreed(failure)) is not None:
            self._failed(reason)

    def _set_apart(self, state: Any) -> Any:
        """What may be written while the next update overwrites the state.

        Orbax copies from the device to the host before `save` returns. Where the device is the host it copies nothing
        and writes out of the arrays themselves, so that the next update could not overwrite them and would take new
        memory for all of them, in the worst case slowly: while every core is busy writing. Hence a copy here, into the
        memory of the copy before, as new memory costs several times as much as the copy itself.
        """
        if jax.default_backend() != "cpu":
            return state
        before, self._apart = self._apart, None
        self._apart = jax.block_until_ready(_copy(state) if before is None else _copy_into(before, state))
        return self._apart

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract` (ShapeDtypeStruct with shardings) says, and the position in the data.

        Raises:
          UserError: the checkpoint is damaged or holds other arrays.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            self._manager = self._manager or self._open()
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"expected a checkpoint of this run in {self._folder / str(step)}, but it cannot be read "
                f"({format.first_line(error)}): delete that folder to go on from the checkpoint before it"
            ) from error
        return restored["state"], restored["data"]

    def restore_latest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and data position of the newest checkpoint whose files are what was written; None without one.

        Damaged ones are set aside under another name, with a warning, and the one before is taken.

        Raises:
          UserError: an undamaged checkpoint holds other arrays than `abstract`.
        """
        self._finish()
        self._apart = None  # its memory may be needed
        for step in reversed(self._steps()):
            problem = self._damage(step)
            if problem is None:
                return step, *self.restore(step, abstract)
            if jax.process_index() == 0:
                aside = self._set_aside(self._folder / str(step))
                self._warn(
                    f"warning: the checkpoint of update {step} is damaged ({problem}): it now lies in {aside}, and "
                    "the one before it is used"
                )
            distributed.gather_json(None)  # nobody looks before it is done
            if self._manager:
                self._manager.reload()
        return None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._finish()
        self._starter.shutdown()
        if self._manager:
            self._manager.close()

    def _finish(self) -> None:
        if self._writing is None:
            return
        failure = None
        try:
            if self._started is not None:
                self._started.result()
            self._manager.wait_until_finished()
        except Exception as error:  # of the background threads
            failure = error
        if (reason := _agreed(failure)) is not None:
            self._failed(reason)
        self._writing, self._started = None, None

    def _failed(self, reason: str) -> None:
        for thread in threading.enumerate():  # else it writes where `_tidy` and the next manager clear up
            if thread.name == ORBAX_WRITER:
                thread.join()
        step, self._writing, self._started = self._writing, None, None
        self._apart = None  # whoever failed may still hold it
        self._manager = None  # it has forgotten which checkpoints it did not delete
        self._warn(f"WARNING: {self._outcome(step, reason)}; make room or mend the storage before the next one")
        with contextlib.suppress(OSError):
            self._tidy(step)

    def _outcome(self, step: int, reason: str) -> str:
        """What there is after a save that failed, in a few words."""
        failed = f"the checkpoint of update {step} could not be written ({reason}): training goes on"
        try:
            steps = format.steps_in(self._folder)
        except OSError as error:  # of an object store that is away
            return f"{failed}, earlier ones cannot be seen now ({_reason(error)})"
        if step in steps:
            return f"the checkpoint of update {step} is complete, but its save did not end well ({reason})"
        left = f"the newest complete one is that of update {steps[-1]}" if steps else "there is no earlier one"
        return f"{failed}, {left}"

    def _unopened(self) -> str | None:
        """Opens Orbax's manager again after a failure; why that does not work, None if it does."""
        try:
            self._manager = self._manager or self._open()
        except Exception as error:  # of the many kinds that the libraries of object stores raise
            return _reason(error)
        return None

    def _unwritable(self) -> str | None:
        """Why this process can write nothing, None if it can."""
        if format.is_remote(self._folder):
            return None
        probe = self._folder / f".room-{jax.process_index()}"
        try:
            probe.write_bytes(b"?")
        except OSError as error:
            return _reason(error)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
        return None

    def _steps(self) -> list[int]:
        """Complete checkpoints as the first process sees them: shared disks may show each something else."""
        return distributed.gather_json(format.steps_in(self._folder))[0]

    def _write_manifest(self) -> None:
        """Called by Orbax in the background: all files are written, and the checkpoint does not count yet."""
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] == str(self._writing):
                digest.write_manifest(path, leave_out=[format.COMMITTED])

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files; every process reads a share of them and gets the same answer."""
        found = digest.damage(self._folder / str(step), part=jax.process_index(), parts=jax.process_count())
        return next((problem for problem in distributed.gather_json(found) if problem), None)

    def _tidy(self, step: int | None = None) -> None:
        """Removes what a failed save left, and sets aside folders that look like checkpoints but are none.

        On gs:// a checkpoint that is being written has its final name, and Orbax tells them apart itself.
        """
        if jax.process_index() != 0 or format.is_remote(self._folder):
            return
        for path in self._folder.iterdir():
            if path.name.isdigit() and not format.is_complete(path):
                if any(path.iterdir()):
                    self._warn(f"warning: {path} is no complete checkpoint: it now lies in {self._set_aside(path)}")
                else:
                    path.rmdir()
            elif step is not None and path.name.startswith(f"{step}."):
                shutil.rmtree(path)

    def _set_aside(self, path: epath.Path) -> epath.Path:
        taken = {other.name for other in self._folder.iterdir()}
        number = next(i for i in range(1, len(taken) + 2) if f"{DAMAGED}-{path.name}-{i}" not in taken)
        return path.rename(self._folder / f"{DAMAGED}-{path.name}-{number}")


@jax.jit
def _copy(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy_into(memory: Any, state: Any) -> Any:
    """The copy takes the place of `memory`, a tree like `state`."""
    del memory
    return jax.tree.map(jnp.copy, state)


def _anywhere(problem: str | None) -> str | None:
    """The first process's problem of all that have one, with its number; all must call this at the same point."""
    return _first(distributed.gather_json(problem))


def _agreed(error: Exception | None) -> str | None:
    """Why a save failed, the same in all processes; None if it did in none. All must call this at the same point."""
    second_hand = isinstance(error, OtherProcessFailed)
    found = distributed.gather_json(None if error is None else [_reason(error), second_hand])
    own = [None if it is None or it[1] else it[0] for it in found]
    return _first(own) or _first([it and it[0] for it in found])


def _first(problems: list[str | None]) -> str | None:
    """Of the processes' problems the first, with the process's number where there are several."""
    named = (f"process {rank}: {text}" if len(problems) > 1 else text for rank, text in enumerate(problems) if text)
    return next(named, None)


def _reason(error: Exception) -> str:
    """What the system said, which libraries bury in paths."""
    known = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    return next((text for text in known if text in str(error)), None) or format.first_line(error)
