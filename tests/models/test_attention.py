"""Blockwise and cached attention against dense attention under the pattern's mask, written out slowly here."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import attention_pattern
from dalle_jax.models.attention import blockwise, cached

KINDS = attention_pattern.KINDS
attend = jax.jit(blockwise.attend, static_argnums=3, static_argnames=("text_len", "grid"))
SHAPES = [(5, 4), (3, 8), (1, 1), (2, 13)]  # text_len, grid; 13 is wider than half a convolution window


def dense(q, k, v, mask):
    """Masked softmax attention in float64, one query at a time. [S, N, H] each; mask [S, S]."""
    out = np.zeros(q.shape)
    for query in range(q.shape[0]):
        keys = np.flatnonzero(mask[query])
        for head in range(q.shape[1]):
            scores = k[keys, head] @ q[query, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[query, head] = weights @ v[keys, head] / weights.sum()
    return out


def random_qkv(text_len, grid, batch=2, heads=2, head_size=4, scale=2.0):
    shape = (3, batch, text_len + grid * grid, heads, head_size)
    return np.random.default_rng(0).normal(size=shape, scale=scale).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid"), SHAPES)
def test_blocks_equal_dense_attention_under_the_mask(kind, text_len, grid):
    q, k, v = random_qkv(text_len, grid)
    mask = attention_pattern.allowed(kind, text_len=text_len, grid=grid)
    got = attend(q, k, v, kind, text_len=text_len, grid=grid)
    want = np.stack([dense(*(x[b].astype(np.float64) for x in (q, k, v)), mask) for b in range(q.shape[0])])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32 sums of up to 171 terms


@pytest.mark.parametrize("kind", KINDS)
def test_output_depends_on_exactly_the_allowed_positions(kind):
    """The gradient of each query's output with respect to keys and values is zero where, and only where, masked."""
    text_len, grid = 3, 7
    q, k, v = random_qkv(text_len, grid, batch=1, heads=1, head_size=2, scale=0.5)
    for argument, name in ((1, "keys"), (2, "values")):
        summed = lambda *qkv: blockwise.attend(*qkv, kind, text_len=text_len, grid=grid)[0, :, 0].sum(-1)  # noqa: E731
        jacobian = jax.jit(jax.jacrev(summed, argnums=argument))(q, k, v)
        depends = np.abs(jacobian[:, 0, :, 0]).max(-1) > 0
        allowed = attention_pattern.allowed(kind, text_len=text_len, grid=grid)
        if argument == 1:  # the only key of a softmax over one position has no gradient
            lonely = allowed.sum(1) == 1
            depends[lonely], allowed[lonely] = False, False
        np.testing.assert_array_equal(depends, allowed, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_dense_attention(kind):
    text_len, grid = 4, 5
    q, k, v = random_qkv(text_len, grid)
    mask = attention_pattern.allowed(kind, text_len=text_len, grid=grid)
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def in_blocks(q, k, v):
        return (weights * blockwise.attend(q, k, v, kind, text_len=text_len, grid=grid)).sum()

    def masked(q, k, v):
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / 2.0
        return (weights * jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(mask, scores, -1e9)), v)).sum()

    chex.assert_trees_all_close(
        jax.jit(jax.grad(in_blocks, (0, 1, 2)))(q, k, v),
        jax.jit(jax.grad(masked, (0, 1, 2)))(q, k, v),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid"), [(5, 4), (3, 8)])
def test_cached_steps_equal_whole_sequence(kind, text_len, grid):
    """Two captions with three candidates each, decoded one position after the other from the ring or store."""
    captions, candidates, heads, head_size = 2, 3, 2, 4
    q, k, v = random_qkv(text_len, grid, batch=captions * candidates, heads=heads, head_size=head_size)
    for x in (k, v):  # candidates of a caption share its text
        shared = x[:, :text_len].reshape(captions, candidates, text_len, heads, head_size)
        shared[:] = shared[:, :1]
    want = np.asarray(attend(q, k, v, kind, text_len=text_len, grid=grid))[:, text_len:]
    text = {name: x[::candidates, :text_len].transpose(0, 2, 1, 3) for name, x in (("k", k), ("v", v))}
    images = captions * candidates
    cache = cached.empty(kind, grid=grid, images=images, heads=heads, head_size=head_size, dtype=jnp.float32)
    assert cache["k"].shape[2] == attention_pattern.cache_slots(kind, grid=grid)
    step = jax.jit(
        lambda q, k, v, cache, position: cached.attend(q, k, v, text, cache, kind, position=position, grid=grid)
    )
    for position in range(grid * grid):
        now = [x[:, text_len + position] for x in (q, k, v)]
        got, cache = step(*now, cache, position)
        np.testing.assert_allclose(got, want[:, position], rtol=1e-5, atol=1e-5, err_msg=str(position))


def test_ring_sizes_of_the_paper():
    """33 row positions and 166 of the convolution are kept, as the windows reach back 32 and 165 positions."""
    assert [attention_pattern.cache_slots(kind, grid=32) for kind in KINDS] == [33, 1024, 166, 1024]
