"""Attention of one image position at a time, from a cache of keys and values.

The text's are stored once per caption and read by all its candidates; of the image a layer keeps what its kind of
attention can still see (`attention_pattern.cache_slots`). Here B counts images, and K the slots that a step reads.
"""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import attention_pattern
from dalle_jax.models.attention.blockwise import MASKED, scale_queries


def empty(kind: str, *, grid: int, images: int, heads: int, head_size: int, dtype):
    """Keys and values of the image positions of one layer, zeros: {'k', 'v'} of [B, N, slots, H]."""
    shape = (images, heads, attention_pattern.cache_slots(kind, grid=grid), head_size)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def attend(q_BNH, k_BNH, v_BNH, text, cache, kind: str, *, position, grid: int):
    """Attention of the image position `position` (a traced int32), which is also written to the cache.

    The B images are the M candidates of each of P captions, those of a caption side by side.
    text: {'k', 'v'} of [P, N, T, H], stored once per caption and read by all its candidates.
    Returns: output [B, N, H] and the new cache. Equal to `blockwise.attend` at that position.
    """
    dtype = q_BNH.dtype
    slot, start, size, visible_K = _cache_view(kind, position, grid)
    views, updated = {}, {}
    for name, new in (("k", k_BNH), ("v", v_BNH)):
        views[name], updated[name] = _view_and_update(cache[name], new[:, :, None], slot, start, size)
    by_caption = functools.partial(einops.rearrange, pattern="(p m) n ... -> p n m ...", p=len(text["k"]))
    by_image = functools.partial(einops.rearrange, pattern="p n m ... -> (p m) n ...")
    q_BNH = scale_queries(q_BNH)
    from_text = jnp.einsum("pnmh,pnkh->pnmk", by_caption(q_BNH), text["k"], preferred_element_type=jnp.float32)
    local = jnp.einsum("bnh,bnkh->bnk", q_BNH, views["k"], preferred_element_type=jnp.float32)
    local = jnp.where(visible_K[None, None], local, MASKED)
    top_BN = jnp.maximum(by_image(from_text.max(-1, initial=MASKED)), local.max(-1))
    weights_text = jnp.exp(from_text - by_caption(top_BN)[..., None])
    weights_local = jnp.exp(local - top_BN[..., None])
    total_BN = by_image(weights_text.sum(-1)) + weights_local.sum(-1)
    out_text = jnp.einsum("pnmk,pnkh->pnmh", weights_text.astype(dtype), text["v"], preferred_element_type=jnp.float32)
    out = jnp.einsum("bnk,bnkh->bnh", weights_local.astype(dtype), views["v"], preferred_element_type=jnp.float32)
    return ((by_image(out_text) + out) / total_BN[..., None]).astype(dtype), updated


def _view_and_update(stored, new, slot, start, size: int):
    """The part of a store [B, N, slots, H] that this position reads, `new` [B, N, 1, H] included, and the new store.

    What is written to the store is read from the part, so that XLA's CPU backend cannot write before it has read: free
    to choose, it copies the whole store first, twice.
    """
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, axis=2)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    view = put(cut(stored, start, size), new, slot - start)
    return view, view if size == stored.shape[2] else put(stored, cut(view, slot - start, 1), slot)


def _cache_view(kind: str, position, grid: int):
    """Slot to write, first slot to read, how many, and which of those the query may see."""
    slots = attention_pattern.read_slots(kind, grid=grid)
    if kind == "column":
        row, column = position // grid, position % grid
        return column * grid + row, column * grid, slots, jnp.arange(slots) <= row
    if kind in ("full", "torus"):
        key_K, visible_K = jnp.arange(slots), jnp.arange(slots) <= position
    else:
        offset = (position - jnp.arange(slots)) % slots
        reachable = np.zeros(slots, bool)
        reachable[list(attention_pattern.image_offsets(kind, grid=grid))] = True
        key_K, visible_K = position - offset, jnp.asarray(reachable)[offset] & (offset <= position)
    if kind in ("window", "torus"):  # what it sees depends on where it is
        visible_K &= jnp.asarray(attention_pattern.allowed_image(kind, grid=grid))[position, key_K]
    return position % slots, 0, slots, visible_K
