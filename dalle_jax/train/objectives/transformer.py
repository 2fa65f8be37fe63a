"""The transformer's objective: captions and pictures in, weighted cross-entropy of text and image tokens out.

Pictures become tokens inside the step, by the frozen dVAE's most likely code at each position (section 2.2, footnote
6), because augmentation comes before encoding; a batch of codes, which `dalle-jax encode` made, is used as it is.
The loss is 1/8 text and 7/8 image, each averaged over its tokens.
"""

import functools

import jax
import jax.numpy as jnp

from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT
from dalle_jax.models import Model, Params, build
from dalle_jax.models.dvae import encode_images
from dalle_jax.train.objectives.task import Task


def transformer_task(config, dvae_model: Model, dvae_params: Params) -> Task:
    """The task of `config.model` on tokens of this dVAE.

    Batches: 'image' uint8 [B, H, W, 3] or 'codes' int32 [B, I], and 'text' int32 [B, T].
    """
    model = build("transformer", config.model)
    return Task(
        name="transformer",
        model=model,
        frozen=dvae_params,
        loss=functools.partial(_loss, model, dvae_model),
    )


def token_losses(text_logits, image_logits, text_BT, image_BI):
    """Mean cross-entropy in nats per predicted text token (padding included) and per image token.

    Whether padding counts is not stated in the paper; it does here, as padding is neither masked nor special there.
    """
    text = _cross_entropy(text_logits[:, :-1], text_BT[:, 1:])
    return text.mean(), _cross_entropy(image_logits, image_BI).mean()


def _cross_entropy(logits, targets):
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _loss(model, dvae_model, params, frozen, batch, *, key, step, scales=None):
    del key, step  # nothing random, nothing scheduled
    if "image_tokens" in batch:
        image_BI = batch["image_tokens"]
    else:
        image_BI = jax.lax.stop_gradient(encode_images(dvae_model, frozen, batch["image"]))
    text, image = token_losses(*model.apply(params, batch["text"], image_BI, scales), batch["text"], image_BI)
    loss = TEXT_LOSS_WEIGHT * text + IMAGE_LOSS_WEIGHT * image
    return loss, {"text_loss": text, "image_loss": image, "bits_per_image_token": image / jnp.log(2.0)}
