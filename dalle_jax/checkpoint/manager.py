"""The checkpoints of a run while it trains: written in the background, kept by number and by age, checked before use.

Training survives checkpoints that cannot be written and checkpoints that were damaged since. `reader.py` knows when a
checkpoint is complete.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax import distributed
from dalle_jax.checkpoint import digest, reader
from dalle_jax.checkpoint.save_barrier import OtherProcessFailed, SaveBarrier
from dalle_jax.errors import UserError, first_line, say, writing_to

DAMAGED = "damaged"  # damaged-STEP-N beside the checkpoints
ORBAX_WRITER = "async_save"  # Orbax's thread that writes and renames


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
        keep_every_hours: float | None = None,
        also_keep: Callable[[Collection[int]], int | None] = lambda steps: None,
        folder: str | None = None,
        warn: Callable[[str], None] = say,
    ):
        """keep: how many of the newest stay. keep_every_hours: besides, one in so many hours stays forever; None: none.

        also_keep: steps of the checkpoints -> the one that stays too, None for none; the same answer in all processes.

        folder: where they lie, a local path or gs://...; None is below the workdir. warn: gets one line at a time, in
        the first process only.

        Raises:
          UserError: the place cannot be written, or Orbax would not find in it what it has written.
        """
        self._folder = reader.checkpoint_folder(workdir, folder)
        self._warn = warn
        policies = [ocp.checkpoint_managers.LatestN(n=keep), _Chosen(also_keep)]
        if keep_every_hours:
            policies.append(ocp.checkpoint_managers.EveryNSeconds(interval_secs=round(keep_every_hours * 3600)))
        self._policy = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
        self._writing: int | None = None  # step that is being saved
        self._copy: Any = None  # of the state, that is written; see `_copied`
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._started: concurrent.futures.Future | None = None  # Orbax's `save`, where it runs in the background
        with writing_to(self._folder, "workdir"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._probe()
            self._tidy()
        self._manager: ocp.CheckpointManager | None = None
        self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        """Orbax's manager, opened again after a failure."""
        if self._manager is not None:
            return self._manager
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_manifest, barrier_sync_fn=SaveBarrier(self._write_share)
            ),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none; waits for one that is being written.

        All processes must call this at the same point, as all methods here.
        """
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in their order; waits for one that is being written."""
        self._finish()
        return self._steps()

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Start writing; the arrays may be donated as soon as this returns. Does nothing if the step is saved.

        Waits for the save before, and warns if that one or the start of this one failed.
        """
        self._finish()
        # Asked first, as the others would wait long for a process 0 that cannot make a folder.
        problem = _agreed(self._obstacle())
        if problem is None and step in self._opened().all_steps():
            return
        self._writing = step
        if problem is not None:
            self._failed(step, problem)
        else:
            self._attempt(step, lambda: self._start(step, state, data))

    def _start(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        state = self._copied(state)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data)))
        start = functools.partial(self._opened().save, step, args=items, force=True)
        if self._copy is not None and jax.process_count() == 1:  # several agree in it, in their main threads
            self._started = self._background.submit(start)
        else:
            start()

    def _copied(self, state: Any) -> Any:
        """The state, or a copy of it, that may be written while the next step overwrites the state.

        Orbax copies from the device to the host before `save` returns. Where the device is the host it copies nothing
        and writes from the arrays themselves: the next step could not overwrite them and would allocate all of them
        anew, slowly while every core is busy writing. Hence a copy here, into the memory of the copy before, as new
        memory costs several times as much as the copy itself.
        """
        if jax.default_backend() != "cpu":
            return state
        memory, self._copy = self._copy, None
        self._copy = jax.block_until_ready(_copy_into(memory, state))
        return self._copy

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state, laid out as `abstract` (ShapeDtypeStruct with shardings) says, and the position in the data.

        Raises:
          UserError: the checkpoint is damaged or holds other arrays.
        """
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            restored = self._opened().restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise reader.unreadable(self._folder / str(step), error) from error
        return restored["state"], restored["data"]

    def restore_latest(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and data position of the newest undamaged checkpoint; None if there is none.

        Damaged ones are set aside under another name, with a warning.

        Raises:
          UserError: an undamaged checkpoint holds other arrays than `abstract`.
        """
        self._finish()
        self._copy = None  # its memory may be needed
        for step in reversed(self._steps()):
            problem = self._damage(step)
            if problem is None:
                return step, *self.restore(step, abstract)
            if jax.process_index() == 0:
                aside = self._set_aside(self._folder / str(step))
                self._warn(
                    f"warning: the checkpoint of step {step} is damaged ({problem}): it now lies in {aside}, and the "
                    "one before it is used"
                )
            distributed.gather_json(None)  # nobody looks before it is renamed
            if self._manager:
                self._manager.reload()
        return None

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._finish()
        self._background.shutdown()
        if self._manager:
            self._manager.close()

    def _finish(self) -> None:
        """Wait for the save that is being written."""
        if self._writing is not None:
            self._attempt(self._writing, self._wait)
            self._writing, self._started = None, None

    def _wait(self) -> None:
        if self._started is not None:
            self._started.result()
        self._opened().wait_until_finished()

    def _attempt(self, step: int, action: Callable[[], None]) -> None:
        """Run a part of the save of `step`. If it fails in any process, all of them give it up, with a warning."""
        failure = None
        try:
            action()
        except Exception as error:  # Orbax, TensorStore and file systems raise many kinds
            failure = error
        if (reason := _agreed(failure)) is not None:
            self._failed(step, reason)

    def _failed(self, step: int, reason: str) -> None:
        for thread in threading.enumerate():  # Orbax does not join it if writing the metadata fails, so we do:
            if thread.name == ORBAX_WRITER:
                thread.join()  # else it writes where `_tidy` and the next manager clear up
        self._writing, self._started = None, None
        self._copy = None  # whoever failed may still hold it
        self._manager = None  # it has forgotten which checkpoints it did not delete
        if jax.process_index() == 0:
            self._warn(f"WARNING: {self._outcome(step, reason)}; make room or mend the storage before the next one")
        with contextlib.suppress(OSError):
            self._tidy(step)

    def _outcome(self, step: int, reason: str) -> str:
        """The warning after a save that failed: what could not be written, and what there is."""
        failed = f"the checkpoint of step {step} could not be written ({reason}): training goes on"
        try:
            steps = reader.steps_in(self._folder)
        except OSError as error:  # of an object store that is away
            return f"{failed}, earlier ones cannot be seen now ({_reason(error)})"
        if step in steps:
            return f"the checkpoint of step {step} is complete, but its save did not end well ({reason})"
        left = f"the newest complete one is that of step {steps[-1]}" if steps else "there is no earlier one"
        return f"{failed}, {left}"

    def _obstacle(self) -> Exception | None:
        """Why this process cannot begin a save, None if it can."""
        try:
            if not reader.is_remote(self._folder):
                self._probe()
            self._opened()
        except Exception as error:  # of the many kinds that the libraries of object stores raise
            return error
        return None

    def _probe(self) -> None:
        """Write a file, and find it as Orbax looks for the parts of a checkpoint: in a path that it takes for a
        pattern, such as '[1] run', it finds none and joins none."""
        probe = self._folder / f".room-{jax.process_index()}"
        try:
            probe.write_bytes(b"?")
            found = any(self._folder.glob(probe.name))
        finally:
            probe.unlink(missing_ok=True)
        if not found:
            raise UserError(
                f"expected a folder for checkpoints whose path is no pattern of names, got {self._folder}: take one "
                "without [ and ]"
            )

    def _steps(self) -> list[int]:
        """Steps of the complete checkpoints that the first process sees; on shared disks the others may see fewer."""
        return distributed.gather_json(reader.steps_in(self._folder))[0]

    def _write_share(self) -> None:
        """The sha256 of the arrays that this process wrote. Called in the background where there are others."""
        for path in _named(self._folder, str(self._writing)):
            for state in _named(path, "state"):
                if (part := state / f"ocdbt.process_{jax.process_index()}").exists():
                    digest.write_manifest(part)

    def _write_manifest(self) -> None:
        """Called by Orbax in the background, when all files are written and the checkpoint is not yet complete."""
        for path in _named(self._folder, str(self._writing)):
            if not (path / reader.JOINED).exists():
                raise FileNotFoundError(f"{reader.JOINED} is missing, without which nothing can be read back")
            digest.write_manifest(path, leave_out=[reader.COMMITTED])

    def _damage(self, step: int) -> str | None:
        """The damage to a checkpoint's files. Each process reads a share of them, all get the same answer."""
        found = digest.damage(self._folder / str(step), share=slice(jax.process_index(), None, jax.process_count()))
        return next((problem for problem in distributed.gather_json(found) if problem), None)

    def _tidy(self, step: int | None = None) -> None:
        """Remove what a failed save of `step` left, and set aside incomplete folders that look like checkpoints.

        On gs:// a checkpoint that is being written has its final name, and Orbax tells them apart itself.
        """
        if jax.process_index() != 0 or reader.is_remote(self._folder):
            return
        for path in self._folder.iterdir():
            if path.name.isdigit() and not reader.is_complete(path):
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


@dataclasses.dataclass
class _Chosen:
    """Preserves the checkpoint that a function of the steps chooses; for Orbax."""

    choose: Callable[[Collection[int]], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        chosen = self.choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == chosen for checkpoint in checkpoints]


def _named(folder: epath.Path, name: str) -> list[epath.Path]:
    """The folders of this name, also those that Orbax has not renamed yet: NAME.orbax-checkpoint-tmp."""
    return [path for path in folder.iterdir() if path.name.partition(".")[0] == name]


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy_into(memory: Any, state: Any) -> Any:
    """A copy in the place of `memory`, a tree like `state` or None."""
    del memory
    return jax.tree.map(jnp.copy, state)


def _agreed(error: Exception | None) -> str | None:
    """Why a save failed in any process, the same on all; None if it failed in none. All must call this together."""
    second_hand = isinstance(error, OtherProcessFailed)
    found = distributed.gather_json(None if error is None else [second_hand, _reason(error)])
    failures = [(*failure, rank) for rank, failure in enumerate(found) if failure is not None]
    if not failures:
        return None
    _, reason, rank = min(failures, key=lambda failure: (failure[0], failure[2]))  # at first hand, if there is one
    return f"process {rank}: {reason}" if len(found) > 1 else reason


def _reason(error: Exception) -> str:
    """The system's words in an error, which libraries bury in paths."""
    known = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
    return next((text for text in known if text in str(error)), None) or first_line(error)
