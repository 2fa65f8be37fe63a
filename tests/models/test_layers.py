"""The basis of the models: norm, activation, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.layers import Model, compute_dtype, layer_norm, param, quick_gelu


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
