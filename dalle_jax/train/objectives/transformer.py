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


def feature_losses(model: Model, params: Params, features, text_BT, image_BI):
    """`token_losses` of what the heads make of these features, in `config.loss_parts` parts of the vocabulary.

    features: [B, T, D] and [B, I, D] of `Transformer.features`.
    """
    heads, parts = model.apply(params, method="heads"), model.config.loss_parts
    logits_of = functools.partial(model.apply, params, method="logits")
    if parts == 1:
        return token_losses(*map(logits_of, features, heads), text_BT, image_BI)
    in_parts = functools.partial(_cross_entropy_in_parts, logits_of=logits_of, parts=parts)
    (text_BTD, image_BID), (text_DV, image_DV) = features, heads
    return in_parts(text_BTD[:, :-1], text_DV, text_BT[:, 1:]).mean(), in_parts(image_BID, image_DV, image_BI).mean()


def _cross_entropy_in_parts(x_BSD, head_DV, targets_BS, *, logits_of, parts: int):
    """`_cross_entropy(logits_of(x, head), targets)`, one part of the logits after another, forward and backward.

    Part p is the ids p, p + parts, p + 2 parts ...: a mesh that cuts the vocabulary cuts every part. Each part's
    gradient of its columns is complete, so sharded heads exchange as much as they do whole.
    """
    wide_BSD = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))  # sums the parts' gradients of x
    heads_PDV = jnp.moveaxis(head_DV.reshape(len(head_DV), -1, parts), -1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the logits again: not kept
    def with_part(found, part):
        (total_BS, picked_BS), (index, head_DV) = found, part
        logits_BSV = logits_of(wide_BSD.astype(x_BSD.dtype), head_DV)
        total_BS = jnp.logaddexp(total_BS, jax.nn.logsumexp(logits_BSV, axis=-1))
        here_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None] // parts, axis=-1)[..., 0]
        return (total_BS, jnp.where(targets_BS % parts == index, here_BS, picked_BS)), None

    nothing_BS = jnp.zeros(targets_BS.shape, wide_BSD.dtype)
    (total_BS, picked_BS), _ = jax.lax.scan(
        with_part, (nothing_BS - jnp.inf, nothing_BS), (jnp.arange(parts), heads_PDV)
    )
    return total_BS - picked_BS


def _loss(model, dvae_model, params, frozen, batch, *, key, step, scales=None):
    del key, step  # nothing random, nothing scheduled
    if "codes" in batch:
        image_BI = batch["codes"]
    else:
        image_BI = jax.lax.stop_gradient(encode_images(dvae_model, frozen, batch["image"]))
    features = model.apply(params, batch["text"], image_BI, scales, method="features")
    text, image = feature_losses(model, params, features, batch["text"], image_BI)
    loss = TEXT_LOSS_WEIGHT * text + IMAGE_LOSS_WEIGHT * image
    return loss, {"text_loss": text, "image_loss": image, "bits_per_image_token": image / jnp.log(2.0)}
