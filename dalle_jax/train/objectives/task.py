"""`Task`: the loss of a model, pictures for its log, and the helper parameters that stay fixed.

Everything that differs between the dVAE, the transformer and CLIP is behind these few fields: the step, the loop and
the metrics never ask which model they train.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from dalle_jax.models.layers import Model, Params

# As the data pipeline made it: 'image' uint8 [B, H, W, 3] or 'image_tokens' int32 [B, I], and 'text' int32 [B, T].
Batch = Mapping[str, jax.Array]
Frozen = Mapping[str, Params]  # role -> parameters
Metrics = dict[str, jax.Array]  # name -> float32 scalar


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to train.

    name: 'dvae', 'transformer' or 'clip', as `models.build` knows it.
    model: its definition; `model.init` makes the parameters, `model.axes` names their dimensions.
    loss: (params, frozen, batch, *, key, step) -> (loss, metrics). Pure and traced inside the update. The loss is a
      float32 scalar, the mean over the batch, so that equal microbatches average to the whole batch; the metrics are
      float32 scalars, averaged in the same way. `step` is an int32 scalar, the number of updates already made. A model
      of precision 'fp16-paper' also gets `scales=`, float32 [layers, 2], while it is differentiated.
    mean_over_examples: whether the loss of a batch is the mean of the losses of its examples, so that each replica can
      take it of its part of the batch. False for a loss that compares examples, such as CLIP's.
    frozen: role -> parameters of a model that gets no update. Passed as an argument, never baked in.
    pictures: (params, frozen, batch, key) -> uint8 [rows, columns, H, W, 3], or None for a model that draws nothing.
      Runs outside the update and may jit what it likes.
    warn: (metrics of the last interval as floats) -> one sentence for the person who watches, or None.
    """

    name: str
    model: Model
    loss: Callable[..., tuple[jax.Array, Metrics]]
    mean_over_examples: bool = True
    frozen: Frozen = dataclasses.field(default_factory=dict)
    pictures: Callable[[Params, Frozen, Batch, jax.Array], jax.Array] | None = None
    warn: Callable[[Mapping[str, float]], str | None] | None = None
