"""The way back to the last good checkpoint, after too many updates in a row that were not finite.

A skipped update leaves the state as it was, so a single one costs nothing. Many in a row mean that the parameters have
gone somewhere from which no step is finite, or that the data have, or, with float16 and as long as losses are finite,
that a scale is on its way down (`loss_scale.py`), which is waited for. The loop then takes the parameters from the last
checkpoint, which is never written during such a run, and the data from where they stand, so the records that may have
caused it do not come again. A decision is a function of the counts alone, hence the same in every process and in a
run that was killed and repeats them.
"""

import dataclasses
from collections.abc import Callable

from dalle_jax.errors import UserError

PATIENCE = 50  # updates, where a run never logs
MAX_RETURNS = 3  # to one and the same checkpoint; after that the fault is not in a window of the data


@dataclasses.dataclass
class Rollback:
    """Counts skipped updates in a row, and returns to a checkpoint."""

    after: int | None  # skipped updates that end in a rollback; None: never
    patience: int | None  # how many end the run where there is nothing to go back to; None: PATIENCE
    forgiven: int = 0  # how many of them do not count as long as their losses are finite
    _returns: int = 0
    _to: int | None = None

    def due(self, streak: int, *, overflows: int, n: int, newest: Callable[[], int | None]) -> bool:
        """Whether to go back to the checkpoint of update `newest()`.

        streak: updates skipped in a row before n, of which `overflows` had a finite loss.

        Raises:
          UserError: it is time, but there is no checkpoint, or going back has not helped.
        """
        counted, patience = streak - min(overflows, self.forgiven), self.patience or PATIENCE
        after = self.after or patience
        if counted < min(after, patience):
            return False
        to = newest()
        possible = bool(self.after) and to is not None
        if counted < (after if possible else patience):
            return False
        if possible:
            self._returns, self._to = (self._returns + 1 if to == self._to else 1), to
        if not possible or self._returns > MAX_RETURNS:
            tried = f" after {MAX_RETURNS} returns to update {to}" if possible else ""
            raise UserError(
                f"expected finite losses and gradients, got none in the last {streak} updates before {n}{tried}: lower "
                "config.optimizer.learning_rate or set config.optimizer.clip_norm, and start from an earlier checkpoint"
            )
        return True
