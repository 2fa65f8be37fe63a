"""The processes that share one evaluation: each does every n-th part, and what is done lies in a folder that all see.

They wait for files, which appear whole (`files.write`), so nobody stands in a collective for the hours that
another one draws.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Crew:
    """Which of how many processes this is. beat: told what begins, see `distributed.Watchdog`. meet: returns when all
    have called it; only where they come at about the same time."""

    index: int = 0
    count: int = 1
    beat: Callable[[str], None] = lambda phase: None
    meet: Callable[[], object] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this process puts the parts together and writes the report."""
        return self.index == 0

    def own(self, parts: int) -> range:
        """Numbers of this process's parts."""
        return range(self.index, parts, self.count)

    def wait(self, paths: Sequence[pathlib.Path]) -> None:
        """Until all of these files are there."""
        for path in paths:
            while not path.exists():
                self.beat("wait")
                time.sleep(POLL_SECONDS)
