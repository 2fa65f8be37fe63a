"""The loss on held-out records, and pictures, while a run trains."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dalle_jax import distributed, sharding
from dalle_jax.errors import UserError
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.train.monitor.report import surviving_a_full_disk
from dalle_jax.train.objectives.task import CODE_COUNTS, Batch
from dalle_jax.train.step import State, TrainStep, ema_params


@dataclasses.dataclass
class Evaluator:
    """Validation loss and pictures, with the moving average of the parameters."""

    step: TrainStep
    workdir: pathlib.Path
    frozen: Any  # the task's, on the devices
    key: jax.Array
    validation: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None  # makes a new iterator over held-out batches,
    max_batches: int  # of which so many are used
    _drawn: Batch | None = None  # the batch that is drawn, the same each time

    def _batches(self) -> Iterable[tuple[int, dict[str, jax.Array]]]:
        """Number of examples and device batch; a partial batch is cut to what the mesh divides."""
        if self.validation is None:
            return
        mesh = self.step.mesh
        ways = sharding.batch_ways(mesh) // sharding.batch_share(mesh)[1]
        for index, batch in enumerate(self.validation()):
            size = len(next(iter(batch.values()))) // ways * ways
            if index == self.max_batches or not size:
                return
            yield size, sharding.shard_batch({name: value[:size] for name, value in batch.items()}, mesh)

    def validate(self, state: State) -> dict[str, float]:
        """Mean of every metric over the held-out examples, the same noise each time, and the health of the codes that
        all of them together have, which does not depend on the batch size."""
        sizes, values, params, memory = [], [], ema_params(state), state.get("memory", {})
        for index, (size, batch) in enumerate(self._batches()):
            key = jax.random.fold_in(self.key, index)
            values.append(self.step.evaluate(params, self.frozen, batch, key, state["step"], memory))
            sizes.append(size)
        if not values:
            raise UserError(
                f"expected at least {sharding.batch_ways(self.step.mesh)} usable records in "
                "config.run.data.validation, got fewer: give a larger source or none"
            )
        values = jax.device_get(values)
        counts = [v.pop(CODE_COUNTS).astype(np.int64) for v in values if CODE_COUNTS in v]
        means = {name: float(np.average([v[name] for v in values], weights=sizes)) for name in values[0]}
        if counts and self.step.task.health:
            means |= self.step.task.health(np.sum(counts, axis=0))
        return {f"validation/{name}": value for name, value in means.items()}

    def draw(self, n: int, state: State, batch) -> None:
        """pictures/STEP.png of the first held-out batch, or of this one where nothing is held out."""
        if (make := self.step.task.pictures) is None:
            return
        if self._drawn is None:
            self._drawn = next(iter(self._batches()), (0, batch))[1]
        pictures = distributed.whole(make(ema_params(state), self.frozen, self._drawn, self.key))
        if jax.process_index() == 0:
            with surviving_a_full_disk(f"pictures/{n:07d}.png"):
                folder = self.workdir / "pictures"
                folder.mkdir(exist_ok=True)
                images = pictures.reshape(-1, *pictures.shape[2:])
                contact_sheet(images, columns=pictures.shape[1]).save(folder / f"{n:07d}.png")
