"""Blockwise and cached attention against dense attention under the pattern's mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import attention_pattern
from dalle_jax.models.attention import blockwise, cached
from tests.support.dense_attention import assert_close, dense, output_and_gradients, random

KINDS = attention_pattern.KINDS
attend = jax.jit(blockwise.attend, static_argnums=3, static_argnames=("text_len", "grid"))
SHAPES = [(5, 4), (3, 8), (1, 1), (2, 13)]  # text_len, grid; 13 is wider than half a convolution window


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid"), SHAPES)
def test_blocks_equal_dense_attention_under_the_mask_and_so_do_their_gradients(kind, text_len, grid):
    q, k, v, w = random(4, 2, text_len + grid * grid, 2, 4, scale=2.0)
    mask = attention_pattern.allowed(kind, text_len=text_len, grid=grid)
    program = jax.jit(output_and_gradients, static_argnums=0)
    found = program(functools.partial(blockwise.attend, kind=kind, text_len=text_len, grid=grid), q, k, v, w)
    assert_close(found, dense(q, k, v, w, mask), 4e-6)  # float32 sums of up to 171 terms


@pytest.mark.parametrize("kind", KINDS)
def test_output_depends_on_exactly_the_allowed_positions(kind):
    """The gradient of each query's output with respect to keys and values is zero where, and only where, masked."""
    text_len, grid = 3, 7
    q, k, v = random(3, 1, text_len + grid * grid, 1, 2, scale=0.5)
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
@pytest.mark.parametrize(("text_len", "grid"), [(5, 4), (3, 8)])
def test_cached_steps_equal_whole_sequence(kind, text_len, grid):
    """Two captions with three candidates each, decoded one position after the other from the ring or store."""
    captions, candidates, heads, head_size = 2, 3, 2, 4
    q, k, v = random(3, captions * candidates, text_len + grid * grid, heads, head_size, scale=2.0)
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
    slots = {kind: attention_pattern.cache_slots(kind, grid=32) for kind in KINDS}
    assert slots == {"row": 33, "column": 1024, "conv": 166, "window": 166, "torus": 1024, "full": 1024}
