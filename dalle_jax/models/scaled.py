"""A residual branch in float16 whose gradient has a scale for itself (Ramesh et al. 2021, section 2.4 and figure 4).

Gradients get smaller from early to late branches and from model to larger model, until no single factor keeps all of
them within float16. So each branch has one, and the stream between the branches stays float32. Going backward,

    cast_out    the gradient that comes from the stream is multiplied by the branch's scale and cast to float16,
    cast_in     where it joins the stream again, what is not finite becomes 0, the rest is widened and divided by it;
                the gradient of the branch's parameters is too, but for the zeros: there the update sees an overflow.

So a branch that overflows costs its gradient, and none of the branches before it. Forward these are casts.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def cast_in(x, scale, dtype, zero_overflow: bool):
    """The input of a branch in its dtype: the float32 stream, or all layers' float32 parameter [L, ...].

    scale: float32 scalar or, for a parameter, [L]. zero_overflow: a gradient that is not finite becomes 0.
    """
    del scale, zero_overflow
    return x.astype(dtype)


def _cast_in_forward(x, scale, dtype, zero_overflow):
    del zero_overflow
    return x.astype(dtype), scale


def _cast_in_backward(dtype, zero_overflow, scale, cotangent):
    del dtype
    kept = jnp.where(jnp.isfinite(cotangent), cotangent, 0) if zero_overflow else cotangent
    each = scale.reshape(*scale.shape, *(1,) * (cotangent.ndim - scale.ndim))
    return kept.astype(jnp.float32) / each, jnp.zeros_like(scale)


cast_in.defvjp(_cast_in_forward, _cast_in_backward)


@jax.custom_vjp
def cast_out(y, scale):
    """A branch's output, to be added to the float32 stream. scale: float32 scalar."""
    del scale
    return y.astype(jnp.float32)


def _cast_out_forward(y, scale):
    return y.astype(jnp.float32), (scale, jnp.zeros([], y.dtype))


def _cast_out_backward(saved, cotangent):
    scale, like = saved
    return (cotangent * scale).astype(like.dtype), jnp.zeros_like(scale)


cast_out.defvjp(_cast_out_forward, _cast_out_backward)
