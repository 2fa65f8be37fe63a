"""From logits to one sampled id: temperature, top-k, top-p.

Pure functions of arrays whose last axis is the vocabulary V; any leading shape. The order is the usual one:
temperature first, then top-k, then top-p over what top-k left, then one draw.
"""

import jax
import jax.numpy as jnp

REMOVED = -jnp.inf


def filter_logits(logits, *, temperature, top_k: int | None = None, top_p: float | None = None):
    """float32 logits [..., V] with everything outside top-k and top-p at -inf.

    temperature: positive scalar, may be traced. top_k: keep the k largest (ties with the k-th stay). top_p: keep the
    smallest set of most likely ids whose probability reaches p; the most likely id always stays.
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], REMOVED, logits)
    if top_p is not None and top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(descending), axis=-1) - jax.nn.softmax(descending)
        last_kept = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(logits < jnp.take_along_axis(descending, last_kept, axis=-1), REMOVED, logits)
    return logits


def draw(key, logits):
    """One id from softmax(logits [V]) by the Gumbel-max rule: int32 scalar. Ids at -inf are never drawn."""
    return jax.random.categorical(key, logits).astype(jnp.int32)
