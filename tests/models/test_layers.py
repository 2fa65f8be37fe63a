"""The building blocks: gradients of the hand-written matrix product, norm and activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models.layers import Model, compute_dtype, layer_norm, linear, param, quick_gelu


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "inputs"),
    [((3, 5, 4), (4, 7), 1), ((3, 5, 7), (7, 2), 1), ((6, 4), (4, 3, 2, 5), 1), ((3, 2, 4, 5), (4, 5, 3), 2)],
)
def test_linear_and_its_gradients_equal_einsum(x_shape, weight_shape, inputs):
    """Both branches of the gradient: output wider and narrower than the input, one and several dimensions."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=x_shape), rng.normal(size=weight_shape)
    letters = "abcdefgh"
    of_x, rest = letters[: len(x_shape)], letters[len(x_shape) : len(x_shape) + len(weight_shape) - inputs]
    formula = f"{of_x},{of_x[-inputs:]}{rest}->{of_x[:-inputs]}{rest}"
    cotangent = rng.normal(size=np.einsum(formula, x, weight).shape)

    def through(product):
        return jax.vjp(product, x, weight)[1](jnp.asarray(cotangent, jnp.float32))

    np.testing.assert_allclose(linear(x, weight, inputs), np.einsum(formula, x, weight), rtol=1e-5, atol=1e-5)
    got, want = through(lambda x, w: linear(x, w, inputs)), through(lambda x, w: jnp.einsum(formula, x, w))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "inputs", "axes"),
    [
        ((8, 5, 8), (8, 6), 1, ("embed", "mlp")),
        ((8, 5, 6), (6, 8), 1, ("mlp", "embed")),
        ((8, 5, 8), (8, 3, 2, 5), 1, ("embed", "qkv", "heads", "head")),
        ((8, 5, 2, 3), (2, 3, 12), 2, ("heads", "head", "embed")),
    ],
)
def test_on_a_mesh_each_device_receives_its_part_of_a_gradient_alone(x_shape, weight_shape, inputs, axes):
    mesh = make_mesh({"replica": 2, "fsdp": 4})
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in (x_shape, weight_shape))
    rows = jax.sharding.NamedSharding(mesh, sharding.spec(x_shape, ("batch", *[None] * (x.ndim - 1)), mesh))
    place = jax.sharding.NamedSharding(mesh, sharding.spec(weight_shape, axes, mesh))

    def loss(x, weight, axes=None):
        return jnp.square(linear(x, weight, inputs, axes)).sum()

    def on_mesh(x, weight):
        with sharding.use(mesh):
            return jax.grad(loss, (0, 1))(x, weight, axes)

    compiled = jax.jit(on_mesh, in_shardings=(rows, place), out_shardings=(rows, place)).lower(x, weight).compile()
    assert "reduce-scatter" in compiled.as_text()
    got, want = compiled(*jax.device_put((x, weight), (rows, place))), jax.grad(loss, (0, 1))(x, weight)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_layer_norm_has_zero_mean_and_unit_variance_in_float32_statistics():
    x = np.random.default_rng(0).normal(3.0, 5.0, size=(4, 64)).astype(np.float32)
    y = layer_norm(x, jnp.ones(64), jnp.zeros(64))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)
    assert layer_norm(jnp.asarray(x, jnp.bfloat16), jnp.ones(64), jnp.zeros(64)).dtype == jnp.bfloat16


def test_quick_gelu_is_the_stated_approximation():
    x = np.linspace(-4, 4, 9)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), rtol=1e-5)


def test_unknown_precision_and_missing_axes_are_refused():
    with pytest.raises(ValueError, match="precision must be one of"):
        compute_dtype("fp8")
    with pytest.raises(ValueError, match="must name every dimension"):
        param(None, (2, 3), axes=("embed",))
    assert Model.__dataclass_params__.frozen
