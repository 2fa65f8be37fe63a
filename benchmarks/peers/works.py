"""Timing of works that are built once, for both sides of a comparison: a peer's environment has this file, but neither
JAX nor this package.
"""

import time
from collections.abc import Callable


class Works:
    """Works, each built by its name at its first use, run a few times so that it is compiled, and kept."""

    def __init__(self, build: Callable[[str], Callable[[], None]], *, first_runs: int = 2):
        self._build, self._first_runs, self._works = build, first_runs, {}

    def measure(self, work: str, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        if work not in self._works:
            self._works[work] = self._build(work)
            for _ in range(self._first_runs):
                self._works[work]()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._works[work]()
            seconds.append(time.perf_counter() - start)
        return seconds
