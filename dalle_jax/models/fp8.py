"""Matrix products in 8-bit floating point (Micikevicius et al. 2022, "FP8 formats for deep learning").

Both factors of a layer's product, and of the product that gives the gradient of its input, are divided by a scale that
takes their largest number to the format's, rounded to 8 bits, multiplied with float32 sums, and scaled back. Values of
the forward pass are e4m3, gradients, whose range is wider, e5m2. The gradient of a matrix keeps the compute dtype: it
is summed over all tokens into what trains. So two of three products of a layer run at a GPU's 8-bit rate (compute
capability 8.9 and later); other devices widen the numbers again and gain nothing.
"""

import functools

import jax
import jax.numpy as jnp

from dalle_jax.models import layers

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x, weight, inputs: int = 1, axes: tuple[str | None, ...] | None = None):
    """`layers.linear` with products in 8 bits, in x's dtype."""
    return _product(x, weight, inputs, of_x=FORWARD)


def _forward(x, weight, inputs, axes):
    return linear(x, weight, inputs, axes), (x, weight)


def _backward(inputs, axes, saved, cotangent):
    x, weight = saved
    outputs = weight.ndim - inputs
    over_outputs = tuple(range(cotangent.ndim - outputs, cotangent.ndim)), tuple(range(inputs, weight.ndim))
    by_x = _product(cotangent, weight, over_outputs, of_x=BACKWARD)
    return by_x, layers.gradient_of_weight(x, weight, cotangent, inputs, axes)


linear.defvjp(_forward, _backward)


def _product(x, weight, dimensions, *, of_x):
    """jnp.tensordot in 8 bits. of_x: the format of x; that of a weight is always FORWARD."""
    (x8, x_scale), (weight8, weight_scale) = _rounded(x, of_x), _rounded(weight, FORWARD)
    product = jnp.tensordot(x8, weight8, dimensions, preferred_element_type=jnp.float32)
    return (product * (x_scale * weight_scale)).astype(x.dtype)


def _rounded(x, dtype):
    """x / scale in this format, and the scale, a float32 scalar. An x that is not finite stays so."""
    largest = jnp.abs(x).max().astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / float(jnp.finfo(dtype).max), 1.0)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale
