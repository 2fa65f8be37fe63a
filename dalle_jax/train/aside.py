"""Hooks make something of the state beside training, such as samples and their scores, and never affect the run.

A hook is called after the checkpoint of its step. If it raises, only what it makes is lost. If its process dies in it,
as when the host has no memory left, it is not called at that step again: WORKDIR/.hook holds the step while a hook
runs.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from dalle_jax import distributed, files
from dalle_jax.errors import first_line
from dalle_jax.train.monitor.report import to_terminal
from dalle_jax.train.step import State

FILE = ".hook"  # inside the workdir
# (every, f): f(step, state) after each `every`-th step, None: never; it may return numbers for the metrics. All
# processes call it, and it must not keep the state, which the next update overwrites.
Hook = tuple[int | None, Callable[[int, State], Mapping[str, float] | None]]


class Hooks:
    """The hooks of a run."""

    def __init__(self, workdir: pathlib.Path, hooks: Sequence[Hook]):
        self._path, self._hooks, self._ended_at = workdir / FILE, hooks, None
        if hooks:
            with contextlib.suppress(OSError, ValueError):
                self._ended_at = int(self._path.read_text())
            self._ended_at = distributed.gather_json(self._ended_at)[0]

    def due(self, step: int) -> bool:
        return any(due(step, every) for every, _ in self._hooks)

    def call(self, step: int, state: State) -> dict[str, float]:
        """Call those that are due; the numbers that they return together."""
        measured: dict[str, float] = {}
        if step == self._ended_at:
            to_terminal(
                f"warning: no samples or scores of step {step}: the run ended while they were made, once before"
            )
            return measured
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # a full disk
                files.write(self._path, str(step))
        for every, hook in self._hooks:
            if due(step, every):
                try:
                    measured |= hook(step, state) or {}
                except Exception as error:  # of devices, libraries, disks
                    to_terminal(f"warning: no samples or scores of step {step}, training goes on ({first_line(error)})")
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        return measured


def due(step: int, every: int | None, *, last: bool = False) -> bool:
    """Whether something is to be done that is done every so many steps, and after the last; None is never."""
    return every is not None and (last or step % every == 0)
