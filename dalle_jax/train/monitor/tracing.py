"""`--profile START:STOP`: a trace of what device and host do in some updates, for XProf and TensorBoard.

Only the first process traces. A trace is for people: one that cannot be taken or written is a warning, and no way of
ending a run leaves one open.
"""

import argparse
import contextlib
import pathlib
import re
from collections.abc import Callable

import jax

FOLDER = "profile"  # inside the workdir


def window(text: str) -> range:
    """The updates START to STOP - 1 that 'START:STOP' names, as a type of argparse; the first of a run is number 1.

    Raises:
      argparse.ArgumentTypeError: another form, no update in it, or a START below 1.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(
            f"expected START:STOP with 1 <= START < STOP, such as 100:105 for updates 100 to 104, got {text!r}"
        )
    return range(int(match[1]), int(match[2]))


class Trace:
    """A trace that is open while the updates of a window are made."""

    def __init__(self, folder: pathlib.Path, updates: range | None, *, warn: Callable[[str], None]):
        self._folder, self._warn = folder, warn
        self._updates = updates if jax.process_index() == 0 else None
        self._open = False

    def due(self, n: int) -> bool:
        """Whether the trace begins or ends before update n."""
        return self._open != (self._updates is not None and n in self._updates)

    def toggle(self) -> None:
        """Begin the trace, or end and write it. The device should have nothing to do."""
        if self._open:
            self.close()
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python: slows the host down, and is most of the file
        with self._survived():
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._open = True

    def close(self) -> None:
        """End and write the trace if it is open."""
        if self._open:
            self._open = False
            with self._survived():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _survived(self):
        try:
            yield
        except (OSError, RuntimeError) as error:
            self._updates = None
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"warning: {self._folder} could not be written ({first}), training goes on without a profile")


def annotation(n: int):
    """Everything in this block belongs to update n in a trace; costs nothing while there is none."""
    return jax.profiler.StepTraceAnnotation("update", step_num=n)
