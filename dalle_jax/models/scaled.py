"""A residual branch in float16 whose gradient has a scale of its own (Ramesh et al. 2021, section 2.4 and figure 4).

Gradients get smaller from early to late branches and from model to larger model, until no single factor keeps all of
them within float16. So each branch has its own, and the stream between the branches stays float32. Going backward,

    leave    the gradient that comes from the stream is multiplied by the branch's scale and cast to float16,
    enter    and where it joins the stream again, what is not finite becomes 0, the rest is widened and divided by it,
    own      as is the gradient of the branch's parameters, but for the zeros: there the update sees an overflow.

So a branch that overflows costs its own gradient, and none of the branches before it. Forward these are casts.
"""

import functools

import jax
import jax.numpy as jnp

# Which of a layer's two branches a parameter belongs to: 0 attention, 1 MLP.
BRANCH = dict.fromkeys(("norm1_gain", "norm1_bias", "qkv", "qkv_bias", "out", "out_bias"), 0)
BRANCH |= dict.fromkeys(("norm2_gain", "norm2_bias", "up", "up_bias", "down", "down_bias"), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def enter(x, scale, dtype):
    """The float32 stream as a branch reads it. scale: float32 scalar."""
    del scale
    return x.astype(dtype)


def _enter_forward(x, scale, dtype):
    return x.astype(dtype), scale


def _enter_backward(dtype, scale, cotangent):
    del dtype
    kept = jnp.where(jnp.isfinite(cotangent), cotangent, 0).astype(jnp.float32)
    return kept / scale, jnp.zeros_like(scale)


enter.defvjp(_enter_forward, _enter_backward)


@jax.custom_vjp
def leave(y, scale):
    """What a branch adds to the float32 stream. scale: float32 scalar."""
    del scale
    return y.astype(jnp.float32)


def _leave_forward(y, scale):
    return y.astype(jnp.float32), (scale, jnp.zeros([], y.dtype))


def _leave_backward(saved, cotangent):
    scale, like = saved
    return (cotangent * scale).astype(like.dtype), jnp.zeros_like(scale)


leave.defvjp(_leave_forward, _leave_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def own(param, scale, dtype):
    """All layers' float32 parameter [L, ...] in the branch's dtype. scale: float32 [L]."""
    del scale
    return param.astype(dtype)


def _own_forward(param, scale, dtype):
    return param.astype(dtype), scale


def _own_backward(dtype, scale, cotangent):
    del dtype
    each = scale.reshape(-1, *(1,) * (cotangent.ndim - 1))
    return cotangent.astype(jnp.float32) / each, jnp.zeros_like(scale)


own.defvjp(_own_forward, _own_backward)


def finite_branches(block_grads):
    """bool [L, 2]: is the gradient of every parameter of this layer's attention and MLP branch finite?

    block_grads: the gradients of `blocks.Blocks`, each [L, ...].
    """
    each = {n: jnp.isfinite(g).all(axis=tuple(range(1, g.ndim))) for n, g in block_grads.items()}
    both = [functools.reduce(jnp.logical_and, (f for n, f in each.items() if BRANCH[n] == i)) for i in (0, 1)]
    return jnp.stack(both, axis=-1)
