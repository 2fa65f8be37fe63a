"""The transformer's objective: captions and pictures in, weighted cross-entropy of text and image tokens out.

Images become tokens inside the step, by the frozen image tokenizer and without noise (section 2.2, footnote 6),
because augmentation comes before encoding; image tokens that `dalle-jax encode` made are used as they are. The loss is
1/8 text and 7/8 image, each averaged over its tokens.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle_jax import models
from dalle_jax.errors import UserError
from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import image_tokenizer
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.settings import TrainSettings

FROZEN = ("image_tokenizer",)


def build(settings: TrainSettings, frozen: Mapping[str, ModelDir]) -> Task:
    """The task of `settings.model` on the tokens of an image tokenizer.

    Batches: 'image' uint8 [B, H, W, 3] or 'image_tokens' int32 [B, I], and 'text' int32 [B, T].

    Raises:
      UserError: an image tokenizer of another grid, vocabulary or picture size.
    """
    assert isinstance(settings.model, TransformerConfig)  # by its name
    tokenizer = frozen["image_tokenizer"]
    sizes = tokenizer.model.config
    for key, value, wanted in (
        ("config.model.grid", settings.model.grid, sizes.grid),
        ("config.model.image_vocab", settings.model.image_vocab, sizes.vocab),
        ("config.data.image_size", settings.data.image_size, sizes.image_size),
    ):
        if value != wanted:
            raise UserError(
                f"expected {key} = {wanted} as the image tokenizer in {settings.frozen['image_tokenizer']} has it, got "
                f"{value}: set --{key}={wanted} or name another image tokenizer"
            )
    model = models.build("transformer", settings.model)
    return Task(
        name="transformer",
        model=model,
        frozen={"image_tokenizer": tokenizer.params},
        loss=functools.partial(_loss, model, tokenizer.model),
    )


def token_losses(text_logits, image_logits, text_BT, image_BI):
    """Mean cross-entropy in nats per predicted text id (padding included) and per image token.

    Whether padding counts is not stated in the paper; it does here, as padding is neither masked nor special there.
    """
    text = _cross_entropy(text_logits[:, : text_BT.shape[1] - 1], text_BT[:, 1:])
    return text.mean(), _cross_entropy(image_logits, image_BI).mean()


def _cross_entropy(logits, targets):
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _loss(model, tokenizer, params, frozen, batch, *, key, step, scales=None):
    del key, step  # nothing random, nothing scheduled
    if "image_tokens" in batch:
        image_BI = batch["image_tokens"]
    else:
        image_BRC = image_tokenizer.encode(tokenizer, frozen["image_tokenizer"], batch["image"])
        image_BI = jax.lax.stop_gradient(image_BRC.reshape(len(image_BRC), -1))
    text_logits, image_logits = model.apply(params, batch["text"], image_BI, scales)
    text, image = token_losses(text_logits, image_logits, batch["text"], image_BI)
    loss = TEXT_LOSS_WEIGHT * text + IMAGE_LOSS_WEIGHT * image
    return loss, {"text_loss": text, "image_loss": image, "bits_per_image_token": image / jnp.log(2.0)}
