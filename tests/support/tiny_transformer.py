"""A tiny transformer with a layer of each kind, its random parameters and batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models import transformer
from dalle_jax.models.layers import Model
from dalle_jax.models.transformer import TransformerConfig
from tests.support.parameters import random_parameters

TINY = TransformerConfig(
    num_layers=3,  # one layer of each kind: most of a test's time is the compiler's
    width=16,
    heads=2,
    head_size=8,
    text_len=5,
    text_vocab=11,
    grid=4,
    image_vocab=7,
    remat="none",
    scan=False,
    precision="fp32",
)


def random_batch(config, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    text = np.stack([config.layout.caption_ids(rng.integers(config.text_vocab, size=n)) for n in range(1, batch + 1)])
    return text, rng.integers(config.image_vocab, size=(batch, config.layout.image_len)).astype(np.int32)


apply = jax.jit(Model.apply, static_argnums=0)


@functools.cache
def random_params(config):
    """As arrays of JAX, which traced ids can index. Nobody changes them."""
    return jax.tree.map(jnp.asarray, random_parameters(transformer.model(config)))
