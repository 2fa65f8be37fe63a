"""The candidates of one request that are worth keeping while more of them are drawn."""

from typing import Any

import numpy as np


class Candidates:
    """At most n drafts of a request: the first ones, or the ones with the best scores.

    Attributes:
      seen: candidates added so far.
    """

    def __init__(self, n: int, *, ranked: bool):
        self._n, self._ranked, self.seen = n, ranked, 0
        self._best: list[tuple[Any, int, np.ndarray]] = []  # score or None, seed, draft

    def add(self, seeds, drafts, scores=None) -> None:
        """More candidates: their seeds, their drafts [M, ...] and, when ranking, their scores."""
        scores = [None] * len(seeds) if scores is None else map(float, scores)
        self._best += zip(scores, map(int, seeds), np.array(drafts), strict=True)
        self.seen += len(seeds)
        if self._ranked:
            self._best.sort(key=lambda candidate: (-candidate[0], candidate[1]))  # equal scores: the smaller seed first
        del self._best[self._n :]

    def scores(self) -> list[float | None]:
        return [score for score, _, _ in self._best]

    def seeds(self) -> list[int]:
        return [seed for _, seed, _ in self._best]

    def drafts(self) -> np.ndarray:
        """[n, ...], in the order in which they are returned."""
        return np.stack([draft for *_, draft in self._best])
