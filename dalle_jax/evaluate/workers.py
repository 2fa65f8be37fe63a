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

    def make_parts(
        self,
        name: str,
        sizes: Sequence[int],
        *,
        is_done: Callable[[int], bool],
        make: Callable[[int, tqdm.tqdm], None],
    ) -> None:
        """Make those parts of this worker that are not on disk yet.

        name: of the work, for people. sizes: pictures of each part. is_done, make: called with the number of a part;
        make also with the bar to update. Progress is a bar on a terminal, and a line for each part elsewhere.
        """
        terminal = self.show and sys.stderr.isatty()
        lines = {} if terminal else {"bar_format": LOG_FORMAT, "smoothing": 0, "file": io.StringIO()}
        mine = range(len(sizes))[self.share.slice]
        todo = [number for number in mine if not is_done(number)]
        total, left = (sum(sizes[number] for number in numbers) for numbers in (mine, todo))
        with tqdm.tqdm(total=total, initial=total - left, desc=name, unit=" pictures", **lines) as bar:
            for number in todo:
                make(number, bar)
                if self.show and not terminal:
                    errors.say(str(bar))
