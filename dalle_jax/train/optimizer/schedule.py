"""Schedules of the step size, and its halving where the loss stands still."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.errors import check_choice, check_number

SCHEDULES = ("cosine", "warmup_constant", "warmup_cosine", "warmup_linear", "plateau")
_KEY = "config.optimizer.schedule"


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Conditions under which the schedule `plateau` halves the step size."""

    window: int = 1_000  # updates averaged into one value of the loss
    patience: int = 10  # windows without an improvement before a halving
    min_improvement: float = 1e-3  # a share of the loss
    halvings: int = 5  # at most

    def __post_init__(self):
        # optax accepts values that mean nothing: without patience it would halve at every improvement.
        check_number(f"{_KEY}.plateau.window", self.window, min=1, max=2**31 - 1, whole=True)
        check_number(f"{_KEY}.plateau.patience", self.patience, min=1, max=2**31 - 1, whole=True)
        check_number(f"{_KEY}.plateau.min_improvement", self.min_improvement, above=0, below=1)
        check_number(f"{_KEY}.plateau.halvings", self.halvings, min=0, max=100, whole=True)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The step size by the number of updates.

    `cosine` starts at the peak (the dVAE's, appendix A.2); the others rise linearly from 0 over warmup_steps first.
    `warmup_linear` ends at 0. `plateau` is `warmup_constant` times the halvings of `halve_on_plateau`.
    """

    name: str = "warmup_constant"  # one of SCHEDULES
    warmup_steps: int = 0
    decay_steps: int | None = None  # after so many updates the end is reached; None: after all of the run
    end_learning_rate: float = 0.0  # of the cosines
    plateau: Plateau = Plateau()

    def __post_init__(self):
        check_choice(f"{_KEY}.name", self.name, SCHEDULES)
        check_number(f"{_KEY}.warmup_steps", self.warmup_steps, min=0, max=2**31 - 1, whole=True)
        check_number(f"{_KEY}.decay_steps", self.decay_steps, min=1, max=2**31 - 1, whole=True, optional=True)
        check_number(f"{_KEY}.end_learning_rate", self.end_learning_rate, min=0, max=100)


def learning_rate(schedule: Schedule, peak: float, *, steps: int) -> optax.Schedule:
    """The step size as a function of the updates made. steps: of the whole run."""
    decay_steps, warmup_steps = schedule.decay_steps or steps, schedule.warmup_steps
    if schedule.name == "cosine":
        return cosine(peak, schedule.end_learning_rate, decay_steps)
    if schedule.name == "warmup_cosine":
        after = cosine(peak, schedule.end_learning_rate, max(1, decay_steps - warmup_steps))
    elif schedule.name == "warmup_linear":
        after = optax.linear_schedule(peak, 0.0, max(1, decay_steps - warmup_steps))
    else:
        after = optax.constant_schedule(peak)
    if not warmup_steps:
        return after

    def rise(count):  # the first update moves already, by 1 / warmup_steps of the peak
        return peak * (count + 1) / warmup_steps

    return optax.join_schedules([rise, after], [warmup_steps])


def cosine(start: float, end: float, steps: int) -> optax.Schedule:
    """Half a cosine from `start` at 0 to `end` at `steps`, constant after.

    `optax.cosine_decay_schedule` takes the end as a share of the start, which may be 0 here (a dVAE's beta), and rounds
    differently.
    """

    def value(count):
        done = jnp.minimum(jnp.asarray(count, jnp.float32) / steps, 1.0)
        return end + (start - end) * (1.0 + jnp.cos(jnp.pi * done)) / 2.0

    return value


def halve_on_plateau(plateau: Plateau) -> optax.GradientTransformationExtraArgs:
    """Scales updates by 1/2 for every plateau of the loss, which `update` takes as `value=`."""
    return optax.contrib.reduce_on_plateau(
        factor=0.5,
        patience=plateau.patience,
        rtol=plateau.min_improvement,
        accumulation_size=plateau.window,
        min_scale=0.5**plateau.halvings,
    )


def measured(opt_state: Any) -> dict[str, jax.Array]:
    """`plateau_scale`, what the halvings have made of the step size so far; nothing without them."""

    def is_plateau(leaf):
        return isinstance(leaf, optax.contrib.ReduceLROnPlateauState)

    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_plateau) if is_plateau(leaf)]
    return {"plateau_scale": found[0].scale} if found else {}
