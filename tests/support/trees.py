"""Comparisons of nested dicts of arrays, wherever they lie."""

import jax
import numpy as np


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), jax.device_get(a), jax.device_get(b))


def identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
