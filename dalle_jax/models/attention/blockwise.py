"""Attention of whole sequences in blocks, for every kind of the pattern.

Scores exist only where the pattern allows them, plus the ragged edge of a block: image queries meet the text densely
and the image in static blocks of whole rows, or of one column each (column, on transposed states), and one softmax
spans both. Plain array code: exact, differentiable, the same on every backend. `attention_pattern.py` says what is
allowed, this file how to get it.
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
    if kind == "column":
        rows, before, mask_RQK = None, 0, _column_mask(grid)
    else:
        rows, before = _block_rows(kind, grid)
        mask_RQK = _row_mask(kind, grid, rows, before)
    q_blocks, k_blocks, v_blocks = (_to_blocks(x, grid, rows) for x in (q_image, k_image, v_image))
    k_local, v_local = (_with_previous(x, before * grid) for x in (k_blocks, v_blocks))
    out_blocks = _attend_blocks(q_blocks, k_text, v_text, k_local, v_local, mask_RQK)
    return jnp.concatenate([out_text, _from_blocks(out_blocks, columns=kind == "column")], axis=1)


def attend_text(q_BTNH, k_BTNH, v_BTNH):
    """Causal attention of the text to itself, every kind alike."""
    return _attend_densely(q_BTNH, k_BTNH, v_BTNH, np.tri(q_BTNH.shape[1], dtype=bool))


def attend_all(q_BSNH, k_BSNH, v_BSNH):
    """Attention of every position to every position."""
    return _attend_densely(q_BSNH, k_BSNH, v_BSNH, None)


def _attend_densely(q_BSNH, k_BSNH, v_BSNH, allowed_SS):
    scores = jnp.einsum("bqnh,bknh->bnqk", scale_queries(q_BSNH), k_BSNH, preferred_element_type=jnp.float32)
    if allowed_SS is not None:
        scores = jnp.where(allowed_SS[None, None], scores, MASKED)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores).astype(v_BSNH.dtype), v_BSNH)


def _attend_blocks(q_BRQNH, k_BTNH, v_BTNH, k_BRKNH, v_BRKNH, mask_RQK):
    """One softmax over all text keys and the block's keys, without joining the two score arrays."""
    q_BRQNH = scale_queries(q_BRQNH)
    text = jnp.einsum("brqnh,bknh->bnrqk", q_BRQNH, k_BTNH, preferred_element_type=jnp.float32)
    local = jnp.einsum("brqnh,brknh->bnrqk", q_BRQNH, k_BRKNH, preferred_element_type=jnp.float32)
    local = jnp.where(mask_RQK[None, None], local, MASKED)
    weights_text, weights_local, total_BNRQ = _joint_softmax(text, local)
    out = jnp.einsum("bnrqk,bknh->brqnh", weights_text.astype(v_BTNH.dtype), v_BTNH)
    out += jnp.einsum("bnrqk,brknh->brqnh", weights_local.astype(v_BTNH.dtype), v_BRKNH)
    return (out / total_BNRQ.transpose(0, 2, 3, 1)[..., None]).astype(q_BRQNH.dtype)


def _joint_softmax(text, local):
    """Unnormalized float32 weights of both parts, and the one sum that normalizes them."""
    top = jnp.maximum(text.max(-1, initial=MASKED), local.max(-1))
    top = jax.lax.stop_gradient(top)[..., None]
    weights_text, weights_local = jnp.exp(text - top), jnp.exp(local - top)
    return weights_text, weights_local, weights_text.sum(-1) + weights_local.sum(-1)


def scale_queries(q):
    """Queries whose products with keys are scores."""
    return q * q.shape[-1] ** -0.5


def _block_rows(kind: str, grid: int) -> tuple[int, int]:
    """Rows of a block, and rows before it that its keys also come from; a block is never shorter than those.

    Longer blocks compute scores that the mask throws away, shorter ones copy every key into many blocks: for the
    convolution's reach of six rows, eight rows a block copy a key less than twice and one row would seven times.
    """
    before = -(-attention_pattern.image_offsets(kind, grid=grid)[-1] // grid)
    rows = next(rows for rows in range(1, grid + 1) if grid % rows == 0 and rows >= min(before, grid))
    return rows, 0 if rows == grid else before


def _to_blocks(x_BINH, grid: int, rows: int | None):
    """Blocks of `rows` rows each, or of one column each where rows is None: [B, R, Q, N, H]."""
    if rows is None:
        return einops.rearrange(x_BINH, "b (q column) n h -> b column q n h", column=grid)
    return einops.rearrange(x_BINH, "b (block q) n h -> b block q n h", block=grid // rows)


def _from_blocks(x_BRQNH, *, columns: bool):
    return einops.rearrange(x_BRQNH, "b r q n h -> b (q r) n h" if columns else "b r q n h -> b (r q) n h")


def _with_previous(x_BRQNH, keys: int):
    """Each block's keys: the last `keys` of the block before it, then its keys; zeros before the first."""
    if not keys:
        return x_BRQNH
    previous = jnp.pad(x_BRQNH[:, :-1, -keys:], [(0, 0), (1, 0)] + [(0, 0)] * 3)
    return jnp.concatenate([previous, x_BRQNH], axis=2)


def _row_mask(kind: str, grid: int, rows: int, before: int) -> np.ndarray:
    """bool [R, Q, K] of blocks of rows, cut out of the pattern's mask."""
    allowed = np.pad(attention_pattern.allowed_image(kind, grid=grid), [(0, 0), (before * grid, 0)])
    size = rows * grid
    return np.stack([allowed[i : i + size, i : i + size + before * grid] for i in range(0, grid * grid, size)])


def _column_mask(grid: int) -> np.ndarray:
    """bool [R, Q, K] of the columns."""
    allowed = attention_pattern.allowed_image("column", grid=grid)
    return np.stack([allowed[column::grid, column::grid] for column in range(grid)])
