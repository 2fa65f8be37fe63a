"""The candidates of one request that are worth keeping, while more of them are drawn."""

import numpy as np


class Kept:
    """At most n candidates: the first ones, or the ones with the best scores.

    Attributes:
      drawn: candidates seen so far.
    """

    def __init__(self, n: int, *, ranked: bool):
        self._n, self._ranked, self.drawn = n, ranked, 0
        self._best: list[tuple[float | None, int, np.ndarray]] = []  # score, seed, codes

    def add(self, seeds, ids_MI, scores=None) -> None:
        """More candidates: their seeds, int32 codes [M, I] and, when ranking, their scores."""
        scores = [None] * len(seeds) if scores is None else map(float, scores)
        self._best += zip(scores, map(int, seeds), np.array(ids_MI), strict=True)
        self.drawn += len(seeds)
        if self._ranked:
            self._best.sort(key=lambda candidate: (-candidate[0], candidate[1]))  # of equals the smaller seed
        del self._best[self._n :]

    def scores(self) -> list[float | None]:
        return [score for score, _, _ in self._best]

    def seeds(self) -> list[int]:
        return [seed for _, seed, _ in self._best]

    def ids(self) -> np.ndarray:
        """int32 [n, I], in the order that they are given out."""
        return np.stack([ids for *_, ids in self._best])
