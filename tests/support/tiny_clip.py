"""A tiny CLIP, its random parameters and batches, and the settings that train it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import clip
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.layers import Model
from tests.support.demo_settings import demo_settings
from tests.support.parameters import random_parameters

TINY = CLIPConfig(
    embed=8,
    image_size=8,
    patch=4,
    image_layers=2,
    image_width=16,
    image_heads=2,
    text_len=6,
    text_vocab=11,
    text_layers=2,
    text_width=16,
    text_heads=2,
    scan=False,
)


apply = jax.jit(Model.apply, static_argnums=0, static_argnames="method")
encode_images, encode_captions = (jax.jit(f, static_argnums=0) for f in (clip.encode_images, clip.encode_captions))


@functools.cache
def random_params(config):
    """As arrays of JAX, which traced ids can index. Nobody here changes them."""
    return jax.tree.map(jnp.asarray, random_parameters(clip.model(config), deviation=0.25))


def random_batch(config, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, config.layout.caption_len + 1, batch)
    text = np.stack([config.layout.caption_ids(rng.integers(config.text_vocab, size=n)) for n in lengths])
    return rng.integers(0, 256, (batch, config.image_size, config.image_size, 3), np.uint8), text


def tiny_settings(values, **run):
    sizes = {f"model.{key}": value for key, value in dataclasses.asdict(TINY).items()}
    return demo_settings("clip", sizes | {"batch_size": 8, "data.image_size": TINY.image_size} | values, **run)


ONE_LAYER = {"model.image_layers": 1, "model.text_layers": 1}  # compiles in half of the time
