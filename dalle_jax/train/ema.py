"""The moving average of the parameters, which samples and evaluations use.

After n moves a plain average still holds a share of decay^n of the initial parameters, which are noise: 13 % after 200
moves with a decay of 0.99. This average holds none of them from its first move on. The parameters theta_1 .. theta_n
have the weights of the plain average, divided by their sum, as Adam corrects its bias:

    average_n = (1 - decay) / (1 - decay^n) * sum over k of decay^(n - k) theta_k

That is a plain average whose decay starts at 0 and rises, so nothing has to be corrected where it is read.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.errors import check_number
from dalle_jax.train.optimizer import matrices


@dataclasses.dataclass(frozen=True)
class Ema:
    """The paper has 0.99 every 25 updates for the transformer (appendix E) and 0.999 in each for the dVAE (A.2).

    It does not say where the average starts, which makes no difference after some thousands of updates.
    """

    decay: float = 0.0  # 0 keeps the average equal to the parameters
    every: int = 1  # updates between two moves of the average

    def __post_init__(self):
        check_number("config.ema.decay", self.decay, min=0, below=1)  # with 1 it would never come near the parameters
        check_number("config.ema.every", self.every, min=1, max=2**31 - 1, whole=True)

    def decay_at(self, step: jax.Array) -> jax.Array:
        """The decay after update number `step`: 1, which leaves the average as it is, where it does not move."""
        if not self.decay:
            return jnp.zeros([])
        moves, log = step // self.every, math.log(self.decay)  # 1 - decay^n = -expm1(n log), also where it is small
        decay = self.decay * jnp.expm1((moves - 1) * log) / jnp.expm1(moves * log)
        return jnp.where(step % self.every == 0, decay, 1.0)


def average(ema: Any, params: Any, decay: jax.Array, *, followed: Collection[tuple[str, ...]] = ()) -> Any:
    """decay * ema + (1 - decay) * params; at the paths `followed` the parameters themselves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, old, new: _mean(old, new, _decay_of(path, decay, followed)), ema, params
    )


def average_on_host(
    ema: Any, params: Any, decay: jax.Array, *, axes: Any, followed: Collection[tuple[str, ...]] = ()
) -> Any:
    """`average` for one that lies in host memory and stays there, also where `decay` is 1: XLA has no conditional over
    arrays in host memory.

    It passes through the device: stacked layers one at a time, in a loop, the rest at once.
    """
    decays = [_decay_of(path, decay, followed) for path, _ in jax.tree_util.tree_leaves_with_path(ema)]
    pairs = list(zip(jax.tree.leaves(ema), jax.tree.leaves(params), strict=True))
    is_stacked = [names[0] == "layers" for names in jax.tree.leaves(axes, is_leaf=matrices.is_names)]

    def through_the_device(pairs, decays):
        here = [(jax.device_put(old, jax.memory.Space.Device), new) for old, new in pairs]
        means = [_mean(old, new, decay) for (old, new), decay in zip(here, decays, strict=True)]
        return [jax.device_put(mean, jax.memory.Space.Host) for mean in means]

    def those(which, many):
        return [one for one, stacked in zip(many, is_stacked, strict=True) if stacked == which]

    layers = those(True, pairs)
    if layers:
        layers = jax.lax.scan(lambda _, pairs: (None, through_the_device(pairs, those(True, decays))), None, layers)[1]
    of_layers, of_rest = iter(layers), iter(through_the_device(those(False, pairs), those(False, decays)))
    return jax.tree.unflatten(jax.tree.structure(ema), [next(of_layers if s else of_rest) for s in is_stacked])


def _mean(old: jax.Array, new: jax.Array, decay: jax.Array) -> jax.Array:
    return decay * old + (1.0 - decay) * new.astype(old.dtype)


def _decay_of(path: Any, decay: jax.Array, followed: Collection[tuple[str, ...]]) -> jax.Array:
    """The decay of one parameter: 0, with which its average is the parameter, where it is followed."""
    return jnp.zeros([]) if tuple(key.key for key in path) in followed else decay
