"""Mean and covariance of feature vectors: streamed, in float64, the same bits however the vectors arrive.

Vectors are summed in blocks of fixed size, and blocks are joined two by two in a tree that depends on their numbers
alone (Chan et al. 1979). So batch size does not change a bit of the result, nor does the number of processes as long
as each takes whole blocks. Knows nothing of what a feature is, nor of distances.

Dimensions: N vectors, F features.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from dalle_jax.errors import UserError

BLOCK = 8_192  # vectors that are summed at once: 0.13 GB of 2,048 features


@dataclasses.dataclass(frozen=True)
class Node:
    """count vectors: their mean float64 [F] and scatter float64 [F, F], the sum of outer products about the mean."""

    count: int
    mean_F: np.ndarray
    scatter_FF: np.ndarray

    def __add__(self, other: "Node") -> "Node":
        count = self.count + other.count
        apart_F = other.mean_F - self.mean_F
        mean_F = self.mean_F + apart_F * (other.count / count)
        scatter_FF = np.outer(apart_F, apart_F)
        scatter_FF *= self.count * other.count / count
        scatter_FF += self.scatter_FF
        scatter_FF += other.scatter_FF
        return Node(count, mean_F, scatter_FF)


class Moments:
    """Collects vectors; `result` gives their mean and covariance.

    first_block: number of the first block that this collector gets, where several collect parts of one set.
    """

    def __init__(self, features: int, *, first_block: int = 0):
        self.features = features
        self._next = first_block
        self._nodes: dict[tuple[int, int], Node] = {}  # (height, number at that height)
        self._block_NF = np.empty((BLOCK, features))  # the next block; its first `_waiting` rows are there
        self._waiting = 0

    def add(self, features_NF: np.ndarray) -> None:
        """Take the next vectors [N, F], N of any size.

        Raises:
          UserError: another number of features, or one that is not finite.
        """
        features_NF = check_features(features_NF, features=self.features)
        while len(features_NF):
            start, self._waiting = self._waiting, min(self._waiting + len(features_NF), BLOCK)
            taken = self._waiting - start
            self._block_NF[start : self._waiting] = features_NF[:taken]
            features_NF = features_NF[taken:]
            if self._waiting == BLOCK:
                self._insert(0, self._next, _summed(self._block_NF))
                self._next, self._waiting = self._next + 1, 0

    def merge(self, others: Iterable["Moments"]) -> "Moments":
        """This collection and those of other parts of the set as one, in any order.

        Only the last part may end with a block that is not full.

        Raises:
          ValueError: the parts do not join to one run of blocks.
        """
        parts = sorted([self, *others], key=lambda part: part._start)
        whole = Moments(self.features, first_block=parts[0]._start)
        for part in parts:
            if part._start != whole._next or whole._waiting or part.features != self.features:
                raise ValueError(f"block {part._start} does not follow block {whole._next} of whole blocks")
            for (height, number), node in sorted(part._nodes.items(), key=lambda item: item[0][1] << item[0][0]):
                whole._insert(height, number, node)
            whole._next, whole._waiting = part._next, part._waiting
            whole._block_NF[: part._waiting] = part._block_NF[: part._waiting]
        return whole

    def result(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Count, mean float64 [F], and covariance float64 [F, F] with N - 1 in the denominator.

        Raises:
          UserError: fewer than two vectors.
        """
        nodes = [node for _, node in sorted(self._nodes.items(), key=lambda item: item[0][1] << item[0][0])]
        if self._waiting:
            nodes.append(_summed(self._block_NF[: self._waiting].copy()))
        count = sum(node.count for node in nodes)
        if count < 2:
            raise UserError(f"expected at least 2 pictures to take a covariance of, got {count}: give more")
        total = nodes[0]
        for node in nodes[1:]:
            total = total + node
        return count, total.mean_F, total.scatter_FF / (count - 1)

    @property
    def _start(self) -> int:
        """Number of the first block."""
        return min((number << height for height, number in self._nodes), default=self._next)

    def _insert(self, height: int, number: int, node: Node) -> None:
        """Put a node into the tree and join it with its neighbour, as far up as both are there."""
        while (height, number ^ 1) in self._nodes:
            neighbour = self._nodes.pop((height, number ^ 1))
            node = node + neighbour if number % 2 == 0 else neighbour + node
            height, number = height + 1, number // 2
        self._nodes[height, number] = node


def of(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean float64 [F] and covariance float64 [F, F] of a whole set of vectors.

    Raises:
      UserError: fewer than two, or a feature that is not finite.
    """
    features_NF = check_features(features_NF)
    moments = Moments(features_NF.shape[1])
    moments.add(features_NF)
    return moments.result()[1:]


def check_features(features_NF: np.ndarray, *, features: int | None = None) -> np.ndarray:
    """The vectors as an array [N, F].

    Raises:
      UserError: not [N, F], another F than `features`, or a value that is not finite.
    """
    features_NF = np.asarray(features_NF)
    if features_NF.ndim != 2 or (features is not None and features_NF.shape[1] != features):
        wanted = "F" if features is None else features
        raise UserError(
            f"expected features [N, {wanted}], got {list(features_NF.shape)}: both sets must come from one network"
        )
    bad = ~np.isfinite(features_NF).all(1)
    if bad.any():
        raise UserError(
            f"expected finite features, got NaN or infinity in {bad.sum()} of {len(bad)}, first in number "
            f"{bad.argmax()}: check the weights of the network"
        )
    return features_NF


def _summed(block_NF: np.ndarray) -> Node:
    """Of vectors float64 [N, F], which are moved to their mean in place."""
    mean_F = block_NF.mean(0)
    block_NF -= mean_F
    # numpy hands a product with the own transpose to syrk: half the work, and exactly symmetric.
    return Node(len(block_NF), mean_F, block_NF.T @ block_NF)
