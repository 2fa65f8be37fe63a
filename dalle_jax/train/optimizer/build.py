"""The optimizer of a run, as one optax chain: clipping, AdamW or Muon with its schedule, halving on plateaus.

The moving average of the parameters is part of the step, not of the optimizer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.train.optimizer import matrices, moments
from dalle_jax.train.optimizer.schedule import Schedule, halve_on_plateau, learning_rate

OPTIMIZERS = ("adamw", "muon")
CONSISTENT_RMS = 0.2  # Muon's update has AdamW's typical size (Liu et al. 2025), so one step size serves both
_KEY = "config.optimizer"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The numbers of an optimizer. The default is AdamW without decay, schedule or clipping."""

    name: str = "adamw"  # one of OPTIMIZERS
    learning_rate: float = 1e-3  # the schedule's peak
    b1: float = 0.9  # Adam's decay of the first moment
    b2: float = 0.999  # and of the second
    eps: float = 1e-8
    weight_decay: float = 0.0  # times the step size
    decay_tables: bool = False  # lookup tables decay too (`matrices.py`)
    clip_norm: float | None = None  # gradients of a larger global norm are scaled down to it; None: never
    momentum: float = 0.95  # Muon's
    moments: str = "fp32"  # how those of hidden matrices are kept: one of `moments.MOMENTS`
    schedule: Schedule = Schedule()

    def __post_init__(self):
        check_choice(f"{_KEY}.name", self.name, OPTIMIZERS)
        check_choice(f"{_KEY}.moments", self.moments, moments.MOMENTS)
        check_number(f"{_KEY}.learning_rate", self.learning_rate, above=0, max=100)
        check_number(f"{_KEY}.schedule.end_learning_rate", self.schedule.end_learning_rate, max=self.learning_rate)
        for name in ("b1", "b2", "momentum"):
            check_number(f"{_KEY}.{name}", getattr(self, name), min=0, below=1)
        check_number(f"{_KEY}.eps", self.eps, above=0, max=1)  # else rows of a table that no batch uses become 0 / 0
        check_number(f"{_KEY}.weight_decay", self.weight_decay, min=0, max=1_000)
        check_number(f"{_KEY}.clip_norm", self.clip_norm, above=0, max=1e12, optional=True)
        if self.name == "muon" and self.moments == "paper":
            raise UserError(
                f"expected {_KEY}.name = adamw with {_KEY}.moments = paper, whose formats are made for Adam's two "
                f"moments, got muon: set --{_KEY}.moments=bf16 or choose adamw"
            )


def build_optimizer(settings: Optimizer, *, steps: int, axes: Any) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer. steps: of the run. axes: the model's nested dict of dimension names.

    `update` takes two extra arguments: `value`, the loss, for the plateau schedule, and optionally `norm`, the
    gradient's global norm where it is known, to clip by.
    """
    rate = learning_rate(settings.schedule, settings.learning_rate, steps=steps)
    parts = [clip_by_norm(settings.clip_norm)] if settings.clip_norm else []
    core = _adamw(settings, rate, axes) if settings.name == "adamw" else _muon(settings, rate, axes)
    parts.append(moments.stored(core, matrices=matrices.hidden_mask(axes), kept=settings.moments))
    if settings.schedule.name == "plateau":
        parts.append(halve_on_plateau(settings.schedule.plateau))
    return optax.with_extra_args_support(optax.chain(*parts))


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` by a norm that may be given: of compressed gradients it is that of their factors."""

    def update(updates, state, params=None, *, norm=None, **extra):
        del params, extra
        norm = optax.tree.norm(updates) if norm is None else norm

        def clipped(g):
            return jnp.where(norm < max_norm, g, g / norm.astype(g.dtype) * max_norm)

        return jax.tree.map(clipped, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _adamw(settings: Optimizer, rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    adam = moments.scale_by_clipped_adam if settings.moments == "paper" else optax.scale_by_adam
    decays = matrices.decay_mask(axes, tables=settings.decay_tables)
    return optax.chain(
        adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask=decays),
        optax.scale_by_learning_rate(rate),
    )


def _muon(settings: Optimizer, rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    """Muon for hidden matrices, AdamW for the rest, of which only decayed parameters decay (e.g. output heads)."""
    dimensions = jax.tree.map(matrices.dimensions, axes, is_leaf=matrices.is_names)
    decays = matrices.decay_mask(axes, tables=settings.decay_tables)
    rest = jax.tree.map(lambda decays, hidden: decays and not hidden, decays, matrices.hidden_mask(axes))
    return optax.chain(
        optax.contrib.muon(
            rate,
            beta=settings.momentum,
            weight_decay=settings.weight_decay,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            eps=settings.eps,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=CONSISTENT_RMS,
        ),
        _decay(rest, rate, settings.weight_decay),
    )


def _decay(mask: Any, rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Subtract rate * weight_decay * parameter from the (already scaled) updates of the masked parameters."""

    def update(updates, count, params):
        factor = weight_decay * rate(count)
        updates = jax.tree.map(lambda u, p, m: u - factor * p if m else u, updates, params, mask)
        return updates, optax.safe_increment(count)

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)
