"""CLIP's objective: which caption belongs to which picture, of all in the batch (Radford et al. 2021, figure 3).

    logits[i, j] = scale * cos(image i, caption j)      loss = mean of the cross-entropies of rows and of columns

The batch is the global one, over all devices and processes: every picture is told from every caption. A loss over
microbatches would be another loss, with fewer captions to be told apart, so `build` refuses to accumulate; where
activations do not fit, `model.remat` and more devices make room and leave the loss as it is.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle_jax import models
from dalle_jax.errors import UserError
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import Model
from dalle_jax.models.clip import normalize
from dalle_jax.sharding import constrain
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.settings import TrainSettings

FROZEN = ()


def build(settings: TrainSettings, frozen: Mapping[str, ModelDir]) -> Task:
    """The task of `settings.model`. Batches: 'image' uint8 [B, H, W, 3], 'text' int32 [B, T].

    Raises:
      UserError: microbatches.
    """
    del frozen
    if settings.accumulate != 1:
        raise UserError(
            f"expected config.accumulate = 1 for CLIP, got {settings.accumulate}: its loss compares all pictures of a "
            "batch with all its captions, which microbatches cannot; to save memory, take config.model.remat or more "
            "devices"
        )
    model = models.build("clip", settings.model)
    return Task(name="clip", model=model, loss=functools.partial(_loss, model), mean_over_examples=False)


def contrastive_loss(image_BE, text_BE, scale):
    """Loss in nats and the two accuracies: pictures whose own caption is the nearest of all, and the reverse.

    image_BE, text_BE: unit vectors, float32; row i of one belongs to row i of the other.
    """
    text_BE = constrain(text_BE, (None, None))  # every device compares its own pictures with all captions
    logits_BB = scale * jnp.einsum("ie,te->it", image_BE, text_BE, preferred_element_type=jnp.float32)
    logits_BB = constrain(logits_BB, ("batch", None))
    own_B = jnp.diagonal(logits_BB)
    per_image = (jax.nn.logsumexp(logits_BB, axis=1) - own_B).mean()
    per_text = (jax.nn.logsumexp(logits_BB, axis=0) - own_B).mean()
    image_right = (logits_BB.max(axis=1) <= own_B).mean()
    text_right = (logits_BB.max(axis=0) <= own_B).mean()
    return (per_image + per_text) / 2, image_right, text_right


def _loss(model: Model, params, frozen, batch, *, key, step):
    del frozen, key, step  # nothing random, nothing scheduled
    image_BE, text_BE, scale = model.apply(params, normalize(batch["image"], model.config), batch["text"])
    loss, image_right, text_right = contrastive_loss(image_BE, text_BE, scale)
    return loss, {"image_to_text_accuracy": image_right, "text_to_image_accuracy": text_right, "scale": scale}
