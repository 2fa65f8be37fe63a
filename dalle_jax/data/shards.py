"""The training batches of many processes, cut so that another number of processes can go on with them.

The global order of records (see `pipeline`) is dealt to `lanes` in turn, and every batch takes the same number of
examples from each lane. Each lane knows its own position and counts, so all lanes together are the exact state of the
data, whoever reads them: process p of n reads lanes p * lanes / n and the following. A run goes on with any number of
processes that divides the lanes. With one lane this is one `Batches`.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from dalle_jax.data.pipeline import Batches, DataConfig
from dalle_jax.data.record import Source
from dalle_jax.errors import UserError
from dalle_jax.layout import Layout
from dalle_jax.text.bpe import Tokenizer


class Lanes:
    """Iterator over this reader's part of each shuffled batch, without end; the arrays are those of `Batches`."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        layout: Layout | None,
        tokenizer: Tokenizer | None,
        lanes: int = 0,
        reader: int = 0,
        readers: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        """batch_size: of all readers together. lanes: 0 takes those of the state to go on from, or one a reader.

        reader, readers: which part of a batch this process reads; processes whose devices hold the same rows are the
        same reader. gather: the values of all processes, see `distributed.gather_json`.

        Raises:
          UserError: lanes that the readers or the batch cannot share, and what `Batches` raises.
        """
        self._source, self._config, self._batch_size = source, config, batch_size
        self._common = {"seed": seed, "layout": layout, "tokenizer": tokenizer, "shuffle": True, "epochs": None}
        self._wanted, self._reader, self._readers, self._gather = lanes, reader, readers, gather
        self._lanes: dict[int, Batches] = {}
        self._open(lanes or readers)

    def _open(self, lanes: int) -> None:
        if lanes % self._readers or self._batch_size % lanes:
            possible = [str(n) for n in range(1, lanes + 1) if lanes % n == 0]
            raise UserError(
                f"expected data.lanes = {lanes} to be a multiple of the processes that read data and to divide the "
                f"batch_size of {self._batch_size}, got {self._readers} processes: use {' or '.join(possible)}, or "
                "begin a new run with another data.lanes"
            )
        own = lanes // self._readers
        config = dataclasses.replace(self._config, threads=-(-self._config.threads // own))
        self.close()
        self._count = lanes
        self._lanes = {
            lane: Batches(
                self._source,
                config,
                batch_size=self._batch_size // lanes,
                process_index=lane,
                process_count=lanes,
                **self._common,
            )
            for lane in range(self._reader * own, (self._reader + 1) * own)
        }

    def __iter__(self) -> "Lanes":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch, the examples of one lane after those of the other.

        Raises:
          UserError: too many records are broken, or none can be used.
        """
        parts = [next(batches) for batches in self._lanes.values()]
        return (
            parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )

    @property
    def good(self) -> int:
        """Records used, in the lanes of this process."""
        return sum(batches.good for batches in self._lanes.values())

    @property
    def dropped(self) -> collections.Counter[str]:
        """Reason -> records, in the lanes of this process."""
        return sum((batches.dropped for batches in self._lanes.values()), collections.Counter())

    def get_state(self) -> dict[str, Any]:
        """Positions and counts of all lanes after the last batch given out; plain json, the same on every process.

        All processes must call this at the same point.
        """
        states = {}
        for of_process in self._gather({str(lane): batches.get_state() for lane, batches in self._lanes.items()}):
            states.update(of_process)
        return {"lanes": [states[str(lane)] for lane in range(self._count)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues every lane after the batch at which the state was taken, bit for bit.

        Raises:
          UserError: the state belongs to another source, seed or number of lanes, or its lanes cannot be shared by so
            many readers.
        """
        lanes = len(state["lanes"])
        if self._wanted not in (0, lanes):
            raise UserError(
                f"expected to resume data with data.lanes = {lanes}, got {self._wanted}: leave it at 0 to go on, or "
                "begin a new run"
            )
        if lanes != self._count:
            self._open(lanes)
        for lane, batches in self._lanes.items():
            batches.set_state(state["lanes"][lane])

    def close(self) -> None:
        """Stops the threads."""
        for batches in self._lanes.values():
            batches.close()
