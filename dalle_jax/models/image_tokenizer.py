"""The image tokenizer: images to image tokens and back, whichever model does it.

An image tokenizer is a `Model` whose config has `image_size` (pixels per side of the images that it is trained on),
`stride` (pixels per side of an image token), `grid` (image tokens per side, image_size / stride) and `vocab` (the
number of different image tokens). It takes images of any height and width that are multiples of the stride, and resizes
nothing. Its parameters are trained before a transformer and frozen since.
"""

from typing import Any

from dalle_jax.models import dvae
from dalle_jax.models.layers import Model, Params
from dalle_jax.models.vq import model as vq
from dalle_jax.models.vq.config import VQConfig

NAMES = ("dvae", "vq")  # of models that are image tokenizers, as `models.build` knows them
_MODULES = {dvae.DVAEConfig: dvae, VQConfig: vq}  # config -> its module: `model`, `encode_images` and `decode_images`


def build(config: Any) -> Model:
    """The image tokenizer of these sizes."""
    return _MODULES[type(config)].model(config)


def encode(model: Model, params: Params, image_BHWC):
    """uint8 [B, H, W, 3] -> image tokens int32 [B, H / stride, W / stride], rows from the top, without noise."""
    return _MODULES[type(model.config)].encode_images(model, params, image_BHWC)


def decode(model: Model, params: Params, tokens_BRC):
    """Image tokens [B, R, C], R rows of C -> uint8 [B, R * stride, C * stride, 3]."""
    return _MODULES[type(model.config)].decode_images(model, params, tokens_BRC)
