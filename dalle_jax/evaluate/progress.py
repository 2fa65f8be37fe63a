"""What an evaluation tells of its progress: a bar with the time that is left on a terminal, lines in a log."""

import datetime
import sys
import time

import tqdm

from dalle_jax import errors


def bar(total: int, tell: str, *, done: int = 0):
    """A bar with the time that is left, on a terminal; none where `tell` is ''."""
    return tqdm.tqdm(
        total=total, initial=done, unit=" pictures", desc=tell, disable=None if tell else True, file=sys.stderr
    )


def say(line: str) -> None:
    """A line for a log; nothing on a terminal, which has a bar."""
    if not sys.stderr.isatty():
        errors.say(line)


class Clock:
    """How many pictures are done, how fast, and when the rest will be. str() says it."""

    def __init__(self, todo: int):
        self._todo, self._done, self._began = todo, 0, time.monotonic()

    def skip(self, count: int) -> None:
        """So many need not be done."""
        self._todo -= count

    def done(self, count: int) -> None:
        """So many more are done."""
        self._done += count

    def __str__(self) -> str:
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        left = datetime.timedelta(seconds=round((self._todo - self._done) / rate)) if rate else "unknown time"
        return f"{self._done} of {self._todo} pictures, {rate:.3g} a second, {left} left"
