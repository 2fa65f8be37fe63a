"""How each kind of attention is computed: whole sequences in blocks, and one position at a time from a cache.

Scores exist only where the pattern allows them, plus the ragged edge of a block: image queries meet the text densely
and the image in one small static block per row (row, conv) or per column (column, on transposed states), and one
softmax spans both. Plain array code: exact, differentiable, the same on every backend. `attention_pattern.py` says
what is allowed, this file how to get it.

Dimensions: B batch, C captions, M candidates of a caption, S sequence, T text, I image = R rows x W columns,
Q queries and K keys of a block, N heads, H head width.
"""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import attention_pattern

MASKED = -1e30  # finite, so that a row without any key gives zeros and no NaN gradients


def attend(q_BSNH, k_BSNH, v_BSNH, kind: str, *, text_len: int, grid: int):
    """Attention over a whole sequence, all of its positions at once.

    Equal to dense attention under `attention_pattern.allowed(kind)`. Softmax in float32, result in q's dtype.
    """
    q_text, q_image = q_BSNH[:, :text_len], q_BSNH[:, text_len:]
    k_text, k_image = k_BSNH[:, :text_len], k_BSNH[:, text_len:]
    v_text, v_image = v_BSNH[:, :text_len], v_BSNH[:, text_len:]
    out_text = attend_text(q_text, k_text, v_text)
    if kind == "full":
        to_blocks, from_blocks, rows_back = _one_block, _from_one_block, 0
    elif kind == "column":
        to_blocks, from_blocks, rows_back = _columns, _from_columns, 0
    else:
        to_blocks, from_blocks = _rows, _from_rows
        rows_back = -(-attention_pattern.image_offsets(kind, grid=grid)[-1] // grid)
    mask_RQK = _block_mask(kind, grid, rows_back)
    blocks = [to_blocks(x, grid) for x in (q_image, k_image, v_image)]
    k_local, v_local = (_with_previous(x, rows_back) for x in blocks[1:])
    out_blocks = _attend_blocks(blocks[0], k_text, v_text, k_local, v_local, mask_RQK)
    return jnp.concatenate([out_text, from_blocks(out_blocks)], axis=1)


def attend_text(q_BTNH, k_BTNH, v_BTNH):
    """Causal attention of the text to itself, every kind alike."""
    scores = jnp.einsum("bqnh,bknh->bnqk", _scaled(q_BTNH), k_BTNH, preferred_element_type=jnp.float32)
    scores = jnp.where(np.tri(q_BTNH.shape[1], dtype=bool), scores, MASKED)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores).astype(v_BTNH.dtype), v_BTNH)


def _attend_blocks(q_BRQNH, k_BTNH, v_BTNH, k_BRKNH, v_BRKNH, mask_RQK):
    """One softmax over all text keys and the block's own keys, without joining the two score arrays."""
    q_BRQNH = _scaled(q_BRQNH)
    text = jnp.einsum("brqnh,bknh->bnrqk", q_BRQNH, k_BTNH, preferred_element_type=jnp.float32)
    local = jnp.einsum("brqnh,brknh->bnrqk", q_BRQNH, k_BRKNH, preferred_element_type=jnp.float32)
    local = jnp.where(mask_RQK, local, MASKED)
    weights_text, weights_local, total_BNRQ = _joint_softmax(text, local)
    out = jnp.einsum("bnrqk,bknh->brqnh", weights_text.astype(v_BTNH.dtype), v_BTNH)
    out += jnp.einsum("bnrqk,brknh->brqnh", weights_local.astype(v_BTNH.dtype), v_BRKNH)
    return (out / total_BNRQ.transpose(0, 2, 3, 1)[..., None]).astype(q_BRQNH.dtype)


def _joint_softmax(text, local):
    """Unnormalised float32 weights of both parts, and the one sum that normalises them."""
    top = jnp.maximum(text.max(-1, initial=MASKED), local.max(-1))
    top = jax.lax.stop_gradient(top)[..., None]
    weights_text, weights_local = jnp.exp(text - top), jnp.exp(local - top)
    return weights_text, weights_local, weights_text.sum(-1) + weights_local.sum(-1)


def _scaled(q):
    return q * q.shape[-1] ** -0.5


def _rows(x_BINH, grid):
    return einops.rearrange(x_BINH, "b (row q) n h -> b row q n h", row=grid)


def _from_rows(x_BRQNH):
    return einops.rearrange(x_BRQNH, "b row q n h -> b (row q) n h")


def _columns(x_BINH, grid):
    return einops.rearrange(x_BINH, "b (q column) n h -> b column q n h", column=grid)


def _from_columns(x_BRQNH):
    return einops.rearrange(x_BRQNH, "b column q n h -> b (q column) n h")


def _one_block(x_BINH, grid):
    return x_BINH[:, None]


def _from_one_block(x_BRQNH):
    return x_BRQNH[:, 0]


def _with_previous(x_BRWNH, rows_back: int):
    """Each row's keys: the rows before it, oldest first, then its own; zeros above the first row."""
    if not rows_back:
        return x_BRWNH
    rows = x_BRWNH.shape[1]
    padded = jnp.pad(x_BRWNH, [(0, 0), (rows_back, 0)] + [(0, 0)] * 3)
    return jnp.concatenate([padded[:, i : i + rows] for i in range(rows_back + 1)], axis=2)


def _block_mask(kind: str, grid: int, rows_back: int) -> np.ndarray:
    """bool [R, Q, K] of the blocks that `attend` makes, cut out of the pattern's own mask."""
    allowed = attention_pattern.allowed_image(kind, grid=grid)
    if kind == "full":
        return allowed[None]
    by_cell = allowed.reshape(grid, grid, grid, grid)  # query row, query column, key row, key column
    if kind == "column":
        return np.stack([by_cell[:, column, :, column] for column in range(grid)])
    mask = np.zeros((grid, grid, rows_back + 1, grid), bool)
    for row in range(grid):
        for back in range(min(row, rows_back) + 1):
            mask[row, :, rows_back - back] = by_cell[row, :, row - back]
    return mask.reshape(grid, grid, -1)


def empty_cache(kind: str, *, grid: int, captions: int, candidates: int, heads: int, head_size: int, dtype):
    """Keys and values of the image positions of one layer, zeros: {'k', 'v'} of [C, M, N, slots, H]."""
    shape = (captions, candidates, heads, attention_pattern.cache_slots(kind, grid=grid), head_size)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def attend_cached(q_CMNH, k_CMNH, v_CMNH, text, cache, kind: str, *, position, grid: int):
    """Attention of the image slot `position` (a traced int32), which is also written to the cache.

    text: {'k', 'v'} of [C, N, T, H], stored once per caption and read by all its candidates.
    Returns: output [C, M, N, H] and the new cache. Equal to `attend` at that position.
    """
    slot, start, size, visible_K = _cache_view(kind, position, grid)
    cache = {
        "k": jax.lax.dynamic_update_slice_in_dim(cache["k"], k_CMNH[..., None, :], slot, axis=3),
        "v": jax.lax.dynamic_update_slice_in_dim(cache["v"], v_CMNH[..., None, :], slot, axis=3),
    }
    k_local, v_local = (jax.lax.dynamic_slice_in_dim(cache[x], start, size, axis=3) for x in ("k", "v"))
    q_CMNH = _scaled(q_CMNH)
    from_text = jnp.einsum("cmnh,cnkh->cmnk", q_CMNH, text["k"], preferred_element_type=jnp.float32)
    local = jnp.einsum("cmnh,cmnkh->cmnk", q_CMNH, k_local, preferred_element_type=jnp.float32)
    local = jnp.where(visible_K, local, MASKED)
    weights_text, weights_local, total_CMN = _joint_softmax(from_text, local)
    out = jnp.einsum("cmnk,cnkh->cmnh", weights_text.astype(v_CMNH.dtype), text["v"])
    out += jnp.einsum("cmnk,cmnkh->cmnh", weights_local.astype(v_CMNH.dtype), v_local)
    return (out / total_CMN[..., None]).astype(q_CMNH.dtype), cache


def _cache_view(kind: str, position, grid: int):
    """Slot to write, first slot to read, how many, and which of those the query may see."""
    slots = attention_pattern.cache_slots(kind, grid=grid)
    if kind == "column":
        row, column = position // grid, position % grid
        return column * grid + row, column * grid, grid, jnp.arange(grid) <= row
    if kind == "full":
        return position, 0, slots, jnp.arange(slots) <= position
    reachable = np.zeros(slots, bool)
    reachable[list(attention_pattern.image_offsets(kind, grid=grid))] = True
    offset = (position - jnp.arange(slots)) % slots
    return position % slots, 0, slots, jnp.asarray(reachable)[offset] & (offset <= position)
