"""The processes that share one evaluation: each does every n-th part of it, in a folder that all of them see.

They wait for files, which appear whole (`files.write`), so nobody stands in a collective for the hours that another
one draws.
"""

import dataclasses
import io
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import tqdm

from dalle_jax import errors
from dalle_jax.data.share import Share

POLL_SECONDS = 0.5
UNIT = " pictures"
LOG_FORMAT = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"


def _nothing(*_) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Worker:
    """This process.

    share: its part of the work. beat: called with what begins, see `distributed.Watchdog`. meet: returns when all have
    called it, which they must at about the same time. show: whether progress is shown on stderr.
    """

    share: Share = Share()
    beat: Callable[[str], None] = _nothing
    meet: Callable[[], object] = _nothing
    show: bool = False

    @property
    def first(self) -> bool:
        """True for the process that puts the parts together and writes the report."""
        return self.share.index == 0

    def wait(self, paths: Sequence[pathlib.Path]) -> None:
        """Until all of these files exist."""
        for path in paths:
            while not path.exists():
                self.beat("wait")
                time.sleep(POLL_SECONDS)

    def bar(self, name: str, *, total: int, done: int = 0) -> tqdm.tqdm:
        """Pictures done, their speed and the time left: a bar on a terminal, a line for each `log` elsewhere."""
        if self.show and sys.stderr.isatty():
            return tqdm.tqdm(total=total, initial=done, desc=name, unit=UNIT)
        lines = {"bar_format": LOG_FORMAT, "smoothing": 0, "file": io.StringIO()}
        return tqdm.tqdm(total=total, initial=done, desc=name, unit=UNIT, **lines)

    def log(self, bar: tqdm.tqdm) -> None:
        """Say how far a bar is, unless it is on a terminal."""
        if self.show and not sys.stderr.isatty():
            errors.say(str(bar))
