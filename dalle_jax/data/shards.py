"""The training batches of several processes, cut so that another number of processes can resume them.

The global order of records (see `pipeline`) is dealt to the shards in turn, and every batch takes the same number of
examples from each shard. A shard knows its position and its counts, so all shards together are the exact state of the
data, whoever reads them: process p of n reads the p-th of n equal runs of shards. A run can resume with any number of
processes that divides the number of shards. With one shard this is one `Batches`.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dalle_jax.data.pipeline import Batches, Prepare, Reading
from dalle_jax.data.record import Source
from dalle_jax.data.share import Share
from dalle_jax.errors import UserError

KEYS = 16  # records by whose keys a source is known again


@dataclasses.dataclass(eq=False)
class ShardedBatches:
    """Iterator over this reader's part of each shuffled batch, without end; the arrays are those of `Batches`.

    Raises:
      UserError: shards that the readers or the batch cannot share, and what `Batches` raises.
    """

    source: Source
    prepare: Prepare
    _: dataclasses.KW_ONLY
    batch_size: int  # of all readers together
    seed: int
    shards: int | None  # None takes those of the state to resume, or one a reader
    share: Share  # the part of a batch that this process reads, and all whose devices hold the same rows
    reading: Reading
    gather: Callable[[Any], list[Any]]  # the values of all processes, see `distributed.gather_json`

    def __post_init__(self):
        self._shards: dict[int, Batches] = {}
        self._open(self.shards or self.share.count)

    def _open(self, count: int) -> None:
        if count % self.share.count or self.batch_size % count:
            possible = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise UserError(
                f"expected config.run.data.shards = {count} to be a multiple of the processes that read data and to "
                f"divide the batch_size of {self.batch_size}, got {self.share.count} processes: use "
                f"{' or '.join(possible)}, or begin a new run with other shards"
            )
        each = count // self.share.count
        reading = dataclasses.replace(self.reading, threads=-(-self.reading.threads // each))
        open_shard = functools.partial(
            Batches,
            self.source,
            self.prepare,
            batch_size=self.batch_size // count,
            seed=self.seed,
            shuffle=True,
            epochs=None,
            reading=reading,
        )
        self.close()
        self._count = count
        mine = range(self.share.index * each, (self.share.index + 1) * each)
        self._shards = {shard: open_shard(share=Share(shard, count)) for shard in mine}

    def __iter__(self) -> "ShardedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch, the examples of one shard after those of the other.

        Raises:
          UserError: too many records are broken, or none can be used.
        """
        parts = [next(batches) for batches in self._shards.values()]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @property
    def good(self) -> int:
        """Records used, in the shards of this process."""
        return sum(batches.good for batches in self._shards.values())

    @property
    def cut(self) -> int:
        """Captions among them that were longer than the text positions."""
        return sum(batches.cut for batches in self._shards.values())

    @property
    def dropped(self) -> collections.Counter[str]:
        """Reason -> records, in the shards of this process."""
        return sum((batches.dropped for batches in self._shards.values()), collections.Counter())

    def get_state(self) -> dict[str, Any]:
        """Positions and counts of all shards after the last batch given out; plain json, the same on every process.

        All processes must call this at the same point.
        """
        states = {}
        for of_process in self.gather({str(shard): batches.get_state() for shard, batches in self._shards.items()}):
            states.update(of_process)
        # "lanes" is the key that `inspect --json` prints.
        return {"lanes": [states[str(shard)] for shard in range(self._count)], "keys": self._keys}

    @functools.cached_property
    def _keys(self) -> list[str]:
        """Keys of a few records, which tell a source from another one with as many records, whatever its name."""
        rows = np.linspace(0, len(self.source) - 1, KEYS).astype(int).tolist()
        return [self.source[row].key for row in rows]

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues every shard after the batch at which the state was taken, bit for bit.

        Raises:
          UserError: the state belongs to another source, seed or number of shards, or its shards cannot be divided
            among so many readers.
        """
        count = len(state["lanes"])
        if self.shards not in (None, count):
            raise UserError(
                f"expected to resume data with config.run.data.shards = {count}, got {self.shards}: leave it out, or "
                "begin a new run"
            )
        if (before := state.get("keys", self._keys)) != self._keys:
            was, found = next((a, b) for a, b in zip(before, self._keys, strict=True) if a != b)
            raise UserError(
                f"expected to resume data with the records of the first run, got record {found!r} of "
                f"{self.source.name} in the place of {was!r}: name the same data, or begin a new run"
            )
        if count != self._count:
            self._open(count)
        for shard, batches in self._shards.items():
            batches.set_state(state["lanes"][shard])

    def close(self) -> None:
        """Stops the threads."""
        for batches in self._shards.values():
            batches.close()
