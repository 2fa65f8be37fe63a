"""`Task`: the loss of a model, pictures for its log, and the helper parameters that stay fixed.

Everything that differs between the dVAE, the transformer and CLIP is behind these few fields: the step, the loop and
the metrics never ask which model they train.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dalle_jax.models.layers import Model, Params
from dalle_jax.train.monitor.rise import Onset

# As the data pipeline made it: 'image' uint8 [B, H, W, 3] or 'image_tokens' int32 [B, I], and 'text' int32 [B, T].
Batch = Mapping[str, jax.Array]
Frozen = Mapping[str, Params]  # role -> parameters
Metrics = dict[str, Any]  # name -> float32 scalar, and under OBSERVED maybe a nested dict of arrays
Memory = dict[str, Any]  # nested dict of arrays
OBSERVED, CODE_COUNTS = "observed", "code_counts"


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to train.

    name: 'dvae', 'transformer' or 'clip', as `models.build` knows it.
    model: its definition; `model.init` makes the parameters, `model.axes` names their dimensions.
    loss: (params, frozen, batch, *, key, step) -> (loss, metrics). Pure and traced inside the update. The loss is a
      float32 scalar, the mean over the batch, so that equal microbatches average to the whole batch; the metrics are
      float32 scalars, averaged in the same way. `step` is an int32 scalar, the number of updates already made. A model
      of precision 'fp16-paper' also gets `scales=`, float32 [layers, 2], while it is differentiated, and a task with a
      memory `memory=`. Under OBSERVED the metrics may hold arrays that are not to be averaged: what was seen in this
      microbatch, for `remember`, and for `health` under CODE_COUNTS.
    mean_over_examples: whether the loss of a batch is the mean of the losses of its examples, so that each replica can
      take it of its part of the batch. False for a loss that compares examples, such as CLIP's, and for a task that
      observes.
    frozen: role -> parameters of a model that gets no update. Passed as an argument, never baked in.
    pictures: (params, frozen, batch, key) -> uint8 [rows, columns, H, W, 3], or None for a model that draws nothing.
      Runs outside the update and may jit what it likes.
    warn: (metrics of the last interval, or of a validation, as floats) -> one sentence for the person who watches, or
      None.
    memory: (key) -> what the task remembers between updates beside the parameters, such as the running counts of a
      codebook. It lies whole on every device, and is saved, restored and rolled back with the parameters. None for
      nothing.
    remember: (params, memory, observed, *, key, step) -> (params, memory), after the optimizer's update and inside the
      same program. Leaves of `observed` are those of the loss with a leading axis, the microbatches, of which number i
      has every accumulate-th example beginning with i. Its results are dropped where the update is skipped.
    followed: paths of parameters that the moving average copies, as `remember` makes averages of them itself.
    health: (observed CODE_COUNTS, summed over all held-out batches, int64 [V]) -> metrics of the whole validation.
    onset: something that begins during the training and may spoil it; a lasting rise after it is said.
    """

    name: str
    model: Model
    loss: Callable[..., tuple[jax.Array, Metrics]]
    mean_over_examples: bool = True
    frozen: Frozen = dataclasses.field(default_factory=dict)
    pictures: Callable[[Params, Frozen, Batch, jax.Array], jax.Array] | None = None
    warn: Callable[[Mapping[str, float]], str | None] | None = None
    memory: Callable[[jax.Array], Memory] | None = None
    remember: Callable[..., tuple[Params, Memory]] | None = None
    followed: tuple[tuple[str, ...], ...] = ()
    health: Callable[[np.ndarray], Mapping[str, float]] | None = None
    onset: Onset | None = None

    def measure(
        self, params: Params, frozen: Frozen, batch: Batch, *, memory: Memory, **options: Any
    ) -> tuple[jax.Array, Metrics, Memory]:
        """The loss, its metrics with the loss among them, and apart from them what was observed, {} for nothing.

        memory: {} of a task without one. options: the loss's other keyword arguments.
        """
        if self.memory:
            options["memory"] = memory
        value, metrics = self.loss(params, frozen, batch, **options)
        scalars = {name: metric for name, metric in metrics.items() if name != OBSERVED}
        return value, {**scalars, "loss": value}, metrics.get(OBSERVED, {})
