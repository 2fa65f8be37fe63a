"""Parameters and moments in 16 bits: what is kept between updates is rounded, every update computes in float32.

Only hidden matrices are ever kept in 16 bits; embeddings, output heads, gains and biases stay float32, as in the paper
(section 2.4, guideline 2). Moments are kept in one of

    fp32     float32, both
    bf16     bfloat16, both: float32's range, neighbors 0.4 to 0.8 % apart
    paper    the first in 1-6-9, the second in 0-6-10 (`formats.py`), neighbors 0.1 to 0.2 % and 0.05 to 0.1 % apart,
             and the second never above 5 (`MAX_NU`)

A change of less than half the distance between neighbors is lost by rounding to the nearest. So what moves slowly is
rounded up or down at random with the right mean:

    second moment    moves by 1 - b2 of itself, 4 % with b2 = 0.96 but 0.1 % with 0.999: nearest would freeze it
    parameters       move by about step size / size of the weight, 0.1 % late in a run: nearest would freeze them
    first moment     moves by 1 - b1 = 10 %: rounded to the nearest

The random bits depend on the number of the update alone, so a resumed run repeats them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dalle_jax.train.optimizer import formats

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}  # of parameters
MOMENTS = ("fp32", "bf16", "paper")
FORMATS = {"mu": formats.FIRST, "nu": formats.SECOND}  # of 'paper'
MAX_NU = 5.0  # the second moment is clipped to this before it is used or stored (section 2.4, appendix E)


class Stored(NamedTuple):
    """State of `stored`: number of updates made, and the wrapped optimizer's state with its moments in 16 bits."""

    updates: jax.Array
    inner: Any


def round_at_random(x, key):
    """float32 -> bfloat16: the neighbor below or above with the probabilities that make the mean x.

    Infinities and NaN stay what they are, and so does what bfloat16 holds exactly.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # what is cut off, rounded up this often
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def to_float32(tree: Any) -> Any:
    """The same tree with bfloat16 leaves as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def cast_like(tree: Any, like: Any, key) -> Any:
    """float32 leaves rounded at random where `like` holds bfloat16; the leaves have independent random bits."""
    leaves, structure = jax.tree.flatten(tree)
    cast = [
        round_at_random(x, jax.random.fold_in(key, index)) if old.dtype == jnp.bfloat16 else x
        for index, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, cast)


def stored(inner: optax.GradientTransformation, *, matrices: Any, kept: str) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps its moments of the hidden matrices in 16 bits.

    inner: one whose moments are called mu and nu, each a nested dict like the parameters (AdamW, Muon).
    matrices: nested dict of bool, the parameters that count as hidden matrices.
    kept: one of MOMENTS; with 'fp32' it is `inner` itself.
    """
    inner = optax.with_extra_args_support(inner)
    if kept == "fp32":
        return inner
    hidden = {_keys(path) for path, is_matrix in jax.tree_util.tree_leaves_with_path(matrices) if is_matrix}

    def mapped(function, state):
        """function(array, 'mu' or 'nu', its place in the state) over the hidden matrices' moments."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        new = []
        for index, (path, x) in enumerate(leaves):
            moment = _moment(path)
            new.append(function(x, moment, index) if moment in FORMATS and _keys(path) in hidden else x)
        return jax.tree.unflatten(structure, new)

    def narrowed(state, key):
        def narrow(x, moment, index):
            at_random = jax.random.fold_in(key, index) if moment == "nu" else None
            if kept == "paper":
                return formats.encode(x, FORMATS[moment], at_random)
            return x.astype(jnp.bfloat16) if at_random is None else round_at_random(x, at_random)

        return mapped(narrow, state)

    def wide(state):
        if kept == "paper":
            return mapped(lambda x, moment, _: formats.decode(x, FORMATS[moment]), state)
        return to_float32(state)

    def init(params):
        return Stored(jnp.zeros([], jnp.int32), narrowed(inner.init(params), jax.random.key(0)))

    def update(updates, state, params=None, **extra):
        updates, new = inner.update(updates, wide(state.inner), params, **extra)
        key = jax.random.fold_in(jax.random.key(0), state.updates)
        return updates, Stored(optax.safe_increment(state.updates), narrowed(new, key))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_clipped_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose second moment is clipped by value to MAX_NU before it is used."""

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1.0 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: jnp.minimum(b2 * v + (1.0 - b2) * jnp.square(g), MAX_NU), updates, state.nu)
        first, second = 1.0 - b1**count, 1.0 - b2**count  # of the mean of 1, .., 1 so far: Adam's bias correction
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _moment(path) -> str | None:
    """'mu' or 'nu' of .mu['blocks']['up']; another field's name or None for anything else."""
    fields = [step.name for step in path if isinstance(step, jax.tree_util.GetAttrKey)]
    return fields[-1] if fields else None


def _keys(path) -> tuple[str, ...]:
    """The nested dict's keys after the last field: the path of a parameter."""
    keys: list[str] = []
    for step in path:
        keys = [*keys, step.key] if isinstance(step, jax.tree_util.DictKey) else []
    return tuple(keys)
