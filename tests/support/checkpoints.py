"""A small training state for tests of checkpoints."""

import jax
import jax.numpy as jnp

from dalle_jax import sharding


def state(step):
    params = {"block": {"w": jnp.arange(16.0).reshape(8, 2) + step}, "b": jnp.full(3, float(step))}
    return {"params": params, "ema": jax.tree.map(lambda p: p + 0.5, params), "step": jnp.int32(step)}


def abstract(mesh=None):
    shapes = jax.eval_shape(lambda: state(0))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape,
            s.dtype,
            sharding=jax.sharding.NamedSharding(mesh, sharding.spec(s.shape, ("embed", None, None)[: s.ndim], mesh)),
        ),
        shapes,
    )
