"""The codebook of image tokenizers: against slow formulas, and against Haiku's on random weights."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dalle_jax.models.vq import quantizer
from dalle_jax.models.vq.config import VQConfig
from tests.support.tiny_vq import GUMBEL, PATCHES, VQGAN, VQVAE, brute_force, normal


def test_distances_are_squares_of_differences():
    z, codes = normal(7, 6), normal(5, 6, seed=1)
    np.testing.assert_allclose(quantizer.distances(z, codes), ((z[:, None] - codes[None]) ** 2).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(11,), (3, 7), (3, 5, 4), (1, 1, 1), (2, 0)])
@pytest.mark.parametrize("bound", [1, 100, 1 << 24])
def test_nearest_is_the_search_one_by_one_whatever_is_held_at_once(shape, bound, monkeypatch):
    monkeypatch.setattr(quantizer, "MAX_DISTANCES", bound)
    z, codes = normal(*shape, 6), normal(13, 6, seed=1)
    found = jax.jit(lambda *args: quantizer.nearest(*args))(z, codes)
    assert found.dtype == jnp.int32 and found.shape == shape
    np.testing.assert_array_equal(found, brute_force(z, codes))


def test_of_equal_codes_the_first_is_nearest():
    codes = normal(4, 6)[[0, 1, 1, 0]]
    np.testing.assert_array_equal(quantizer.nearest(codes, codes), [0, 1, 1, 0])


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation makes, inner programs included."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [value for equation in jaxpr.eqns for value in jax.tree.leaves(equation.params) if hasattr(value, "jaxpr")]
    return max(sizes + [largest_array(program.jaxpr) for program in inner], default=0)


@pytest.mark.parametrize("shape", [(1 << 20, 4), (64, 256, 256, 4)])
def test_nearest_never_holds_all_distances(shape):
    """2^20 vectors or more by 8,192 codes would be 32 GiB and more; 64 MiB are allowed, and the vectors themselves."""
    program = jax.make_jaxpr(quantizer.nearest)(*(jax.ShapeDtypeStruct(s, np.float32) for s in (shape, (8_192, 4))))
    assert largest_array(program.jaxpr) <= 1 << 24


def test_a_unit_vector_has_length_one_and_its_direction():
    x = normal(5, 6) * np.float32([[1e-9], [1e-3], [1], [1e3], [1e9]])
    found = np.asarray(quantizer.unit(x))
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(found * np.linalg.norm(x, axis=-1, keepdims=True), x, rtol=1e-5)
    nearly_zero = np.float32([[1e-13, 0, 0, 0, 0, 0]])  # below 1e-12 in PyTorch's normalize
    np.testing.assert_allclose(quantizer.unit(nearly_zero), 1e12 * nearly_zero, rtol=1e-5)
    zeros = jnp.zeros((1, 6))
    assert not quantizer.unit(zeros).any() and np.isfinite(jax.grad(lambda x: quantizer.unit(x).sum())(zeros)).all()


@pytest.mark.parametrize("kind", [hk.nets.VectorQuantizer, hk.nets.VectorQuantizerEMA])
def test_the_codebook_is_haikus(kind):
    """What is looked up, with which distances, and the gradient that goes through to the vectors."""
    options = {"decay": 0.99} if kind is hk.nets.VectorQuantizerEMA else {}
    theirs = hk.transform_with_state(lambda z: kind(6, 13, commitment_cost=0.25, **options)(z, is_training=False))
    z, cotangent = normal(2, 3, 4, 6), normal(2, 3, 4, 6, seed=2)
    params, state = theirs.init(jax.random.key(0), z)
    codes = np.asarray(jax.tree.leaves({k: v for k, v in (params or state).items() if "ema_" not in k})[0]).T
    wanted, _ = theirs.apply(params, state, None, z)

    def ours(z):
        return quantizer.straight_through(z, codes[quantizer.nearest(z, codes)])

    def quantized(z):
        return theirs.apply(params, state, None, z)[0]["quantize"]

    np.testing.assert_array_equal(quantizer.nearest(z, codes), wanted["encoding_indices"])
    np.testing.assert_allclose(quantizer.distances(z.reshape(-1, 6), codes), wanted["distances"], atol=1e-5)
    np.testing.assert_allclose(ours(z), wanted["quantize"], atol=1e-6)
    (by_z,), (wanted_by_z,) = jax.vjp(ours, z)[1](cotangent), jax.vjp(quantized, z)[1](cotangent)
    np.testing.assert_array_equal(by_z, wanted_by_z)
    np.testing.assert_array_equal(by_z, cotangent)


def test_the_codebook_begins_as_haikus_or_as_tamings():
    def codebook(**sizes):
        return np.asarray(quantizer.Quantizer(VQConfig(**sizes), nnx.Rngs(0)).codebook[...])

    haiku_like = codebook(**VQVAE | {"vocab": 512, "code_dim": 64})
    theirs = hk.transform(lambda z: hk.nets.VectorQuantizer(64, 512, 0.25)(z, is_training=True))
    theirs = jax.tree.leaves(theirs.init(jax.random.key(0), np.zeros((1, 64), np.float32)))[0]
    bound = (3 / 64) ** 0.5
    for codes in (haiku_like, np.asarray(theirs)):
        assert 0.99 * bound < np.abs(codes).max() <= bound and abs(codes.std() / (bound / 3**0.5) - 1) < 0.02
    taming_like = codebook(**VQGAN | {"vocab": 512, "code_dim": 64})
    assert 0.99 / 512 < np.abs(taming_like).max() <= 1 / 512
    gumbel = codebook(**GUMBEL | {"vocab": 512, "code_dim": 64})
    assert abs(gumbel.std() - 1) < 0.02
    unit = codebook(**PATCHES | {"vocab": 512, "code_dim": 64})
    assert abs(np.square(unit).sum(-1).mean() - 1) < 0.05
