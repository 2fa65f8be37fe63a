"""The sampling engine: text ids in, image ids out, one compiled loop over a key-value cache.

Speaks ids only: no captions, no pictures, no files. The text is read once per caption, whatever the number of
candidates. Candidate m of caption c draws position p with fold_in(key[c, m], p), so an image depends on its own key
and caption and not on its neighbours.

Dimensions: C captions, M candidates of each, T text slots, I image positions, V image vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from dalle_jax.models import Model, Params
from dalle_jax.sample.logits import draw, filter_logits


def image_keys(seeds_CM):
    """jax.random keys [C, M] from the seed of each image, integers in [0, 2**32)."""
    return jax.vmap(jax.vmap(jax.random.key))(jnp.asarray(seeds_CM, jnp.uint32))


@functools.partial(jax.jit, static_argnames=("model", "top_k", "top_p"))
def generate(
    model: Model,
    params: Params,
    text_CT,
    keys_CM,
    given_CMI=None,
    *,
    num_given=0,
    temperature=1.0,
    top_k: int | None = None,
    top_p: float | None = None,
):
    """Sample all image tokens.

    text_CT: int32 text slots. keys_CM: jax.random keys, one an image. given_CMI: int32 image ids whose first
    `num_given` positions are kept as they are (the top rows of a picture to complete). temperature, num_given: numbers
    that may change from call to call; top_k, top_p: compiled in.
    Returns: int32 image ids [C, M, I].
    """
    layout = model.config.layout
    captions, candidates = keys_CM.shape
    layers = model.apply(params, method="layers")
    text_stores = model.apply(params, layers, text_CT, method="prefill")
    ids_CMI = jnp.zeros((captions, candidates, layout.image_len), jnp.int32) if given_CMI is None else given_CMI
    previous_CM = jnp.full((captions, candidates), layout.start_of_image, jnp.int32)

    def one_position(position, carry):
        ids_CMI, previous_CM, cache = carry
        logits_CMV, cache = model.apply(params, layers, text_stores, cache, previous_CM, position, method="decode")
        logits_CMV = filter_logits(logits_CMV, temperature=temperature, top_k=top_k, top_p=top_p)
        keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, position)))(keys_CM)
        drawn_CM = jax.vmap(jax.vmap(draw))(keys, logits_CMV)
        drawn_CM = jnp.where(position < num_given, ids_CMI[:, :, position], drawn_CM)
        return ids_CMI.at[:, :, position].set(drawn_CM), drawn_CM, cache

    cache = model.apply(params, captions, candidates, method="empty_cache")
    return jax.lax.fori_loop(0, layout.image_len, one_position, (ids_CMI, previous_CM, cache))[0]
