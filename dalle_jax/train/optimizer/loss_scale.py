"""Scales that keep float16 gradients in range: one for the whole loss, or one a residual branch.

    fp16-global    the loss is multiplied by one scale and all gradients divided by it, as the paper trains its dVAE
                   (appendix A.2). How the scale moves is not stated there; these are the usual numbers.
    fp16-paper     one scale a residual branch, two a layer, inside the model (`models/scaled.py`; section 2.4).

An update whose gradient is not finite anywhere is skipped. Then, and after every other update, each scale moves by
itself: a finite gradient lets it grow, another one makes it fall. The state is {'scale': float32, 'since': int32
updates since it last fell}, scalars or [layers, 2], and is part of every checkpoint.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.models import Model
from dalle_jax.models.blocks import finite_branches

GLOBAL, PAPER = "fp16-global", "fp16-paper"
FALLS = 8  # of a scale in a row: by 16 where it falls by sqrt 2, by 256 where it falls by 2
Scales = dict[str, jax.Array]


class NoScale:
    """Scales of a precision that needs none: nothing changes. The others answer the same calls."""

    @property
    def patience(self) -> int:
        """Updates in a row that may be skipped because a scale has to fall, and for no other reason."""
        return 0

    def init(self) -> Scales:
        """The state of the scales before the first update."""
        return {}

    def loss_options(self, scales: Scales) -> dict[str, jax.Array]:
        """Keyword arguments of the task's loss."""
        return {}

    def scaled(self, loss: jax.Array, scales: Scales) -> jax.Array:
        """The loss to differentiate."""
        return loss

    def unscaled(self, grads: Any, scales: Scales) -> Any:
        """The gradients of the loss itself, from those of the scaled one. grads: float32."""
        return grads

    def finite(self, grads: Any) -> jax.Array:
        """bool of the scales' shape: is the gradient that each scale is responsible for finite? grads: float32."""
        return jnp.array(True)

    def updated(self, scales: Scales, finite: jax.Array) -> Scales:
        """The state after an update with these results of `finite`."""
        return scales

    def measured(self, scales: Scales) -> dict[str, jax.Array]:
        """The metrics of the scales."""
        return {}


@dataclasses.dataclass(frozen=True)
class _Moving(NoScale):
    """Scales that start at `start` and stay between `min_scale` and `max_scale`."""

    start: float
    min_scale: float
    max_scale: float
    growth: float  # factor after so many finite updates:
    every: int
    backoff: float  # factor after an update that is not finite,
    hold: int  # though not within so many updates of the last time
    shape: tuple[int, ...] = ()

    @property
    def patience(self) -> int:
        return FALLS * max(self.hold, 1)

    def init(self) -> Scales:
        return {
            "scale": jnp.full(self.shape, self.start, jnp.float32),
            "since": jnp.full(self.shape, self.hold, jnp.int32),
        }

    def updated(self, scales: Scales, finite: jax.Array) -> Scales:
        since = scales["since"] + 1
        falls = ~finite & (since >= self.hold)
        grows = finite & (since % self.every == 0)
        factor = jnp.where(falls, self.backoff, jnp.where(grows, self.growth, 1.0))
        return {
            "scale": jnp.clip(scales["scale"] * factor, self.min_scale, self.max_scale).astype(jnp.float32),
            "since": jnp.where(falls, 0, since),
        }

    def measured(self, scales: Scales) -> dict[str, jax.Array]:
        return {"log2_scale": jnp.log2(scales["scale"])}


class GlobalScale(_Moving):
    """One scale for the whole loss."""

    def scaled(self, loss: jax.Array, scales: Scales) -> jax.Array:
        return loss * scales["scale"]

    def unscaled(self, grads: Any, scales: Scales) -> Any:
        return jax.tree.map(lambda g: g / scales["scale"], grads)

    def finite(self, grads: Any) -> jax.Array:
        return all_finite(grads)


class BranchScales(_Moving):
    """A scale a residual branch, [layers, 2], which the model applies and takes off again."""

    def loss_options(self, scales: Scales) -> dict[str, jax.Array]:
        return {"scales": scales["scale"]}

    def finite(self, grads: Any) -> jax.Array:
        return finite_branches(grads["blocks"])


def for_model(model: Model, *, replicas: int) -> NoScale:
    """The scales of a model's precision.

    replicas: pieces that the batch of a loss is cut into, the M of section 2.4. Losses are means over the whole batch,
      or over a replica's part of it where gradients are compressed, so what a device sees of their gradient is M times
      smaller than that of its local batch, and the paper's scales are M times larger.
    """
    precision = getattr(model.config, "precision", None)
    if precision == GLOBAL:
        return GlobalScale(2.0**16, 1.0, 2.0**24, growth=2.0, every=2_000, backoff=0.5, hold=0)
    if precision == PAPER:
        return BranchScales(
            start=replicas * 2.0**13,
            min_scale=replicas * 2.0**7,
            max_scale=replicas * 2.0**24,
            growth=2.0 ** (1 / 1_000),
            every=1,
            backoff=2.0**-0.5,
            hold=125,
            shape=(model.config.num_layers, 2),
        )
    return NoScale()


def all_finite(tree: Any) -> jax.Array:
    """bool: is every number of every array finite?"""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
