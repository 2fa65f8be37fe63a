"""From logits to one sampled image token: guidance, temperature, top-k, top-p, and the draw.

Pure functions of arrays whose last axis is the vocabulary V; any leading shape. The order is the usual one: guidance,
temperature, top-k, then top-p over what top-k left, then one draw by the Gumbel-max rule.
"""

import jax
import jax.numpy as jnp

REMOVED = -jnp.inf


def guide(conditional, unconditional, guidance):
    """Logits under classifier-free guidance (Ho & Salimans 2021): u + g (c - u). 1 is no guidance, 0 no caption."""
    return unconditional + guidance * (conditional - unconditional)


def filter_logits(logits, *, temperature, top_k=None, top_p=None):
    """float32 logits [..., V] with everything outside top-k and top-p at -inf.

    temperature: positive, one or one per row [...]. top_k: keep the k largest, of equal ones those of the smallest
    tokens. top_p: keep the smallest set of most likely tokens whose probability reaches p. Each is None, or one, or
    one per row, and may be traced; top_k of V or more and top_p of 1 or more change nothing. The most likely token
    always stays.
    """

    def column(value, dtype=None):
        return jnp.broadcast_to(jnp.asarray(value, dtype), logits.shape[:-1])[..., None]

    logits = logits.astype(jnp.float32) / column(temperature, jnp.float32)
    if top_k is None and top_p is None:
        return logits
    # By rank, not by comparing with the k-th value: a compiler may round the same number differently in two places.
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    keep = rank == 0
    place = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    within_k = place < column(logits.shape[-1] if top_k is None else top_k)
    if top_p is None:
        return jnp.where(keep | (rank < column(top_k)), logits, REMOVED)
    descending = jnp.where(within_k, jnp.take_along_axis(logits, order, axis=-1), REMOVED)
    probability = jax.nn.softmax(descending)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.sum(within_k & ((before < column(top_p)) | (column(top_p) >= 1)), axis=-1, keepdims=True)
    return jnp.where(keep | (rank < kept), logits, REMOVED)


def noise(key, position, vocab: int):
    """Standard Gumbel noise [V] for one position of an image, from the image's key."""
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)


def draw(logits, noise):
    """int32 tokens [...] from softmax(logits [..., V]) by the Gumbel-max rule. Those at -inf are never drawn."""
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
