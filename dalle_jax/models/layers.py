"""The basis of every model: parameters with named axes, the dtype policy, norms, and `Model`.

Definitions are Flax NNX modules; nobody outside `models/` needs to know. A `Model` turns a definition into pure
functions over a nested dict of arrays: `init`, `apply`, the abstract shapes and the logical axis names.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]  # nested dict of arrays
EPSILON = 1e-5  # of layer norms
# 'fp16-global' scales the whole loss, 'fp16-paper' the gradient of each residual branch (`models/scaled.py`).
PRECISIONS = {
    "fp32": jnp.float32,
    "bf16": jnp.bfloat16,
    "bf16-paper": jnp.bfloat16,
    "fp16-global": jnp.float16,
    "fp16-paper": jnp.float16,
}


def compute_dtype(precision: str):
    """Dtype of activations and matrix products. Parameters, softmax, norm statistics and losses stay float32; with
    '-paper' (section 2.4, guideline 2) so do the stream between the residual branches, biases, embeddings and output
    heads: `keeps_stream`.

    Raises:
      ValueError: not one of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]


def keeps_stream(precision: str) -> bool:
    """Whether the transformer's stream, embeddings, biases and output heads stay float32 as in the paper."""
    return precision.endswith("-paper")


def stream_dtype(precision: str):
    """Dtype of the residual stream, and of what reads it at the end, the output heads."""
    return jnp.float32 if keeps_stream(precision) else compute_dtype(precision)


def check_no_paper(precision: str, model: str) -> None:
    """Raises ValueError for a '-paper' precision of a model that is not the transformer."""
    if keeps_stream(precision):
        other = {"bf16-paper": "bf16", "fp16-paper": "fp16-global"}[precision]
        raise ValueError(f"precision {precision} is about the transformer's branches, got a {model}: use {other}")


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    *,
    axes: tuple[str | None, ...],
    std: float = 0.0,
    bound: float = 0.0,
    fill: float = 0.0,
):
    """A float32 parameter: normal(fill, std), uniform in [-bound, bound], or the constant `fill` where both are 0.

    axes: one logical name (or None) per dimension, e.g. ('layers', 'embed', 'mlp'); `sharding.py` maps them.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} must name every dimension of shape {shape}")
    value = jnp.full(shape, fill, jnp.float32)
    if std:
        value = value + std * jax.random.normal(rngs.params(), shape, jnp.float32)
    elif bound:
        value = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    return nnx.Param(value, axes=axes)


def layer_norm(x, gain, bias, *, epsilon: float = EPSILON):
    """Layer normalization over the last axis; statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    gain, bias = (jax.lax.broadcast_to_rank(vector, x.ndim) for vector in (gain, bias))
    return ((x32 - mean) * jax.lax.rsqrt(variance + epsilon) * gain + bias).astype(x.dtype)


def quick_gelu(x):
    """x * sigmoid(1.702 x), the approximation of Child et al. 2019 and CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


@dataclasses.dataclass(frozen=True)
class Model:
    """A definition as pure functions. `make(rngs)` builds the NNX module; nothing here holds parameters."""

    config: Any
    make: Callable[[nnx.Rngs], nnx.Module]

    @functools.cached_property
    def _split(self):
        return nnx.split(nnx.eval_shape(lambda: self.make(nnx.Rngs(0))))

    @functools.cached_property
    def abstract(self) -> Params:
        """The parameters as jax.ShapeDtypeStruct: nested dict, nothing allocated."""
        return nnx.to_pure_dict(self._split[1])

    @functools.cached_property
    def axes(self) -> Params:
        """The same nested dict with a tuple of logical axis names at each leaf."""

        def is_variable(leaf):
            return isinstance(leaf, nnx.Variable)

        return jax.tree.map(lambda v: v.axes, nnx.to_pure_dict(self._split[1], lambda v: v), is_leaf=is_variable)

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract))

    def init(self, key) -> Params:
        """Initial parameters from a jax.random.key. Pure: jit it with out_shardings to build them in place."""
        return nnx.to_pure_dict(nnx.split(self.make(nnx.Rngs(params=key)))[1])

    def apply(self, params: Params, *args, method: str = "__call__", **kwargs):
        """Call a method of the module with these parameters."""
        graphdef, state = self._split
        state = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(state, params)
        return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)
