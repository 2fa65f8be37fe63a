"""The loss on held-out records, and pictures, while a run trains."""

import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from dalle_jax import distributed, sharding
from dalle_jax.errors import UserError
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.train.monitor.report import surviving_a_full_disk
from dalle_jax.train.objectives.task import Batch
from dalle_jax.train.step import State, TrainStep, ema_params

COLUMNS = 8  # images in a row, where the task does not say


class Evaluator:
    """Validation loss and pictures, with the moving average of the parameters.

    validation: makes a new iterator over held-out batches, of which `max_batches` are used; None where nothing is held
    out.
    """

    def __init__(
        self,
        step: TrainStep,
        workdir: pathlib.Path,
        frozen,
        *,
        key: jax.Array,
        validation: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None,
        max_batches: int,
    ):
        self._step, self._frozen, self._key = step, frozen, key
        self._pictures, self._validation, self._max_batches = workdir / "pictures", validation, max_batches
        self._drawn: Batch | None = None  # the batch that is drawn, the same each time

    @property
    def validates(self) -> bool:
        return self._validation is not None

    def _batches(self) -> Iterable[tuple[int, dict[str, jax.Array]]]:
        """Number of examples and device batch; a partial batch is cut to what the mesh divides."""
        if self._validation is None:
            return
        mesh = self._step.mesh
        ways = sharding.batch_ways(mesh) // sharding.batch_reader(mesh)[1]
        for index, batch in enumerate(self._validation()):
            size = len(next(iter(batch.values()))) // ways * ways
            if index == self._max_batches or not size:
                return
            yield size, sharding.shard_batch({name: value[:size] for name, value in batch.items()}, mesh)

    def validate(self, state: State) -> dict[str, float]:
        """Mean of every metric over the held-out examples; the same noise each time."""
        sizes, values, params = [], [], ema_params(state)
        for index, (size, batch) in enumerate(self._batches()):
            key = jax.random.fold_in(self._key, index)
            values.append(self._step.evaluate(params, self._frozen, batch, key, state["step"]))
            sizes.append(size)
        if not values:
            raise UserError(
                f"expected at least {sharding.batch_ways(self._step.mesh)} usable records in config.data.validation, "
                "got fewer: give a larger source or leave it empty"
            )
        values = jax.device_get(values)
        return {f"validation/{k}": float(np.average([v[k] for v in values], weights=sizes)) for k in values[0]}

    def draw(self, n: int, state: State, batch) -> None:
        """pictures/STEP.png of the first held-out batch, or of this one where nothing is held out."""
        if self._drawn is None:
            self._drawn = next(iter(self._batches()), (0, batch))[1]
        pictures = self._step.task.pictures(ema_params(state), self._frozen, self._drawn, self._key)
        pictures = None if pictures is None else distributed.whole(pictures)
        if pictures is not None and jax.process_index() == 0:
            with surviving_a_full_disk(f"pictures/{n:07d}.png"):
                self._pictures.mkdir(exist_ok=True)
                columns = pictures.shape[1] if pictures.ndim == 5 else COLUMNS
                images = pictures.reshape(-1, *pictures.shape[-3:])
                contact_sheet(images, columns=columns).save(self._pictures / f"{n:07d}.png")
