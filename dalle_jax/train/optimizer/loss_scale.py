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
from dalle_jax.models.scaled import finite_branches

GLOBAL, PAPER = "fp16-global", "fp16-paper"
FALLS = 8  # of a scale in a row: by 16 where it falls by sqrt 2, by 256 where it falls by 2


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How scales start and move.

    shape: () or (layers, 2). start, least, most: bounds hold after each change. growth: factor after every `every`
    finite updates. backoff: factor after one that is not, though not within `hold` updates of the last time.
    """

    shape: tuple[int, ...]
    start: float
    least: float
    most: float
    growth: float
    every: int
    backoff: float
    hold: int

    @property
    def by_branch(self) -> bool:
        return bool(self.shape)

    def init(self) -> dict[str, Any]:
        return {
            "scale": jnp.full(self.shape, self.start, jnp.float32),
            "since": jnp.full(self.shape, self.hold, jnp.int32),
        }

    def finite(self, grads: Any):
        """bool of the state's shape: is the gradient that each scale is responsible for finite? grads: float32."""
        if self.by_branch:
            return finite_branches(grads["blocks"])
        return jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()

    def moved(self, state: dict[str, Any], finite) -> dict[str, Any]:
        """The state after an update. finite: of `finite`."""
        since = state["since"] + 1
        falls = ~finite & (since >= self.hold)
        grows = finite & (since % self.every == 0)
        factor = jnp.where(falls, self.backoff, jnp.where(grows, self.growth, 1.0))
        return {
            "scale": jnp.clip(state["scale"] * factor, self.least, self.most).astype(jnp.float32),
            "since": jnp.where(falls, 0, since),
        }


def patience(model: Model) -> int:
    """Updates in a row that may be skipped because a scale has to fall FALLS times, and for no other reason."""
    scales = of(model, replicas=1)
    return FALLS * max(scales.hold, 1) if scales else 0


def of(model: Model, *, replicas: int) -> Scaling | None:
    """The scaling of a model's precision; None where gradients need none.

    replicas: pieces that the batch of a loss is cut into, the M of section 2.4: losses are means over the whole batch,
      or over a replica's part of it where gradients are compressed, so what a device sees of their gradient is M times
      smaller than that of its own batch, and the paper's scales are M times larger.
    """
    precision = getattr(model.config, "precision", None)
    if precision == GLOBAL:
        return Scaling((), 2.0**16, 1.0, 2.0**24, growth=2.0, every=2_000, backoff=0.5, hold=0)
    if precision == PAPER:
        return Scaling(
            (model.config.num_layers, 2),
            start=replicas * 2.0**13,
            least=replicas * 2.0**7,
            most=replicas * 2.0**24,
            growth=2.0 ** (1 / 1_000),
            every=1,
            backoff=2.0**-0.5,
            hold=125,
        )
    return None
