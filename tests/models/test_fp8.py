"""Products in 8-bit floating point: as near as their formats allow, with an exact gradient of the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import fp8, layers, transformer
from dalle_jax.models.transformer import TransformerConfig

# Rounding to 3 or 2 bits of mantissa errs by at most 2^-4 or 2^-3 of a number, about half of that on the whole. Both
# factors err, in e4m3 forward; the gradient in e5m2 and the weight in e4m3 backward.
FORWARD, BACKWARD = 2**-4, 2**-3


def error(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])  # of numbers that do not fit 8 bits without a scale
@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "inputs"), [((6, 32), (32, 3, 4, 8), 1), ((6, 4, 8), (4, 8, 32), 2)]
)
def test_products_are_near_and_the_weights_gradient_is_exact(x_shape, weight_shape, inputs, size):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(size * rng.normal(size=s), jnp.float32) for s in (x_shape, weight_shape))
    y, pull = jax.vjp(lambda x, weight: fp8.linear(x, weight, inputs), x, weight)
    exact, pull_exact = jax.vjp(lambda x, weight: layers.linear(x, weight, inputs), x, weight)
    assert 1e-3 < error(y, exact) < FORWARD
    cotangent = jnp.asarray(rng.normal(size=y.shape), jnp.float32) / size
    (by_x, by_weight), (exact_x, exact_weight) = pull(cotangent), pull_exact(cotangent)
    assert 1e-3 < error(by_x, exact_x) < BACKWARD
    np.testing.assert_array_equal(by_weight, exact_weight)


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    weight = jnp.ones((4, 3))
    np.testing.assert_array_equal(fp8.linear(jnp.zeros((2, 4)), weight), jnp.zeros((2, 3)))
    assert not np.isfinite(fp8.linear(jnp.full((2, 4), jnp.inf), weight)).any()


def test_a_models_gradient_points_where_that_of_float32_does():
    """In every product of every layer: the compiled program multiplies 8-bit numbers."""
    config = TransformerConfig(
        num_layers=2, width=32, heads=4, head_size=8, text_len=8, text_vocab=8, grid=4, image_vocab=16, pattern="full",
        remat="none", scan=False, precision="fp32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    text, codes = rng.integers(8, size=(4, 8)), rng.integers(16, size=(4, 16))
    leaves, tree = jax.tree.flatten(transformer.model(config).abstract)
    params = tree.unflatten([rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])
    found = []
    for matmuls in ("model", "fp8"):
        model = transformer.model(dataclasses.replace(config, matmuls=matmuls))

        def loss(params, model=model):
            return sum(jnp.square(logits).mean() for logits in model.apply(params, text, codes))

        traced = str(jax.make_jaxpr(jax.grad(loss))(params))
        assert ("f8_e4m3fn" in traced and "f8_e5m2" in traced) == (matmuls == "fp8")
        found.append(np.concatenate([g.ravel() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]))
    assert 1e-3 < error(found[1], found[0]) < 0.25
    assert found[0] @ found[1] > 0.98 * np.linalg.norm(found[0]) * np.linalg.norm(found[1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"matmuls": "fp4"}, "matmuls must be one of .*fp8.*got 'fp4'"),
        ({"matmuls": "fp8", "precision": "fp16-paper"}, "bf16 or fp32"),
    ],
)
def test_what_makes_no_sense_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        TransformerConfig(**values)
