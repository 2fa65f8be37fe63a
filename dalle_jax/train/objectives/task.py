"""What the loop knows about a model: a `Task` is a loss, some pictures and the helper parameters that stay fixed.

Everything that differs between the dVAE, the transformer and CLIP is behind these few fields; the step, the loop and
the metrics never ask which model they train.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from dalle_jax.models.layers import Model, Params

# As the data pipeline made it: 'image' uint8 [B, H, W, 3] or 'codes' int32 [B, I], and 'text' int32 [B, T].
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]  # name -> float32 scalar


def _no_pictures(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> None:
    return None


def _no_warning(metrics: Mapping[str, float]) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to train.

    name: 'dvae', 'transformer' or 'clip', as `models.build` knows it.
    model: its definition; `model.init` makes the parameters, `model.axes` names their dimensions.
    loss: (params, frozen, batch, *, key, step) -> (loss, metrics). Pure and traced inside the update. The loss is a
      float32 scalar, the mean over the batch, so that equal microbatches average to the whole batch; the metrics are
      float32 scalars, averaged in the same way. `step` is an int32 scalar, the number of updates already made. A model
      of precision 'fp16-paper' also gets `scales=`, float32 [layers, 2], while it is differentiated.
    frozen: parameters of a helper model that get no update, {} if none. Passed as an argument, never baked in.
    frozen_sha256: `digest.of_model` of the helper, '' if none.
    pictures: (params, frozen, batch, key) -> uint8 [N, H, W, 3], which the loop lays out in rows of eight, or uint8
      [rows, columns, H, W, 3], or None. Runs outside the update and may jit what it likes.
    warn: (metrics of the last interval as floats) -> one sentence for the person who watches, or None.
    """

    name: str
    model: Model
    loss: Callable[..., tuple[jax.Array, Metrics]]
    frozen: Params = dataclasses.field(default_factory=dict)
    frozen_sha256: str = ""
    pictures: Callable[[Params, Params, Batch, jax.Array], np.ndarray | None] = _no_pictures
    warn: Callable[[Mapping[str, float]], str | None] = _no_warning
