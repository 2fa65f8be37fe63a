"""Optimizers and step-size schedules, as optax chains: clip, AdamW or Muon, schedule, halving on plateaus.

Which parameter gets weight decay, and which is a hidden matrix for Muon, is read off the names of its dimensions.
Leaving out STACKED ones, and counting a run of HEADS as one:

    decayed         two dimensions or more, and not a lookup table (first of them in TABLES). So projections,
                    convolutions and output heads decay; gains, biases and embeddings do not. The paper does not say
                    which parameters it excludes; this is the usual choice. With `decay_tables`, lookup tables decay
                    too, as CLIP's (Radford et al. 2021, section 2.5).
    hidden matrix   decayed, and no dimension in TABLES at all: neither an embedding nor an output head.

The moving average of the parameters is part of the step, not of the optimizer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.errors import UserError
from dalle_jax.train.optimizer import moments

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "warmup_constant", "warmup_cosine", "warmup_linear", "plateau")
STACKED = ("layers", "qkv")  # one independent parameter per index of these dimensions
TABLES = ("vocab", "image_input", "position")  # a parameter indexed by these is a lookup table
HEADS = ("heads", "head")  # together one side of a matrix
CONSISTENT_RMS = 0.2  # Muon's update has AdamW's typical size (Liu et al. 2025), so one step size serves both


def schedule(config: Mapping[str, Any], *, steps: int) -> optax.Schedule:
    """Step size after a number of updates.

    config: `learning_rate` (peak) and `schedule` with name, warmup_steps, decay_steps (0: `steps`) and
    end_learning_rate. `cosine` starts at the peak and stays at the end value after decay_steps (the dVAE's, appendix
    A.2); the others rise linearly from 0 over warmup_steps first. `warmup_linear` ends at zero. `plateau` is
    `warmup_constant` times the halvings of `build`.

    Raises:
      UserError: an unknown schedule.
    """
    peak, shape = config["learning_rate"], config["schedule"]
    decay_steps = shape["decay_steps"] or steps
    warmup_steps, end = shape["warmup_steps"], shape["end_learning_rate"]
    if shape["name"] not in SCHEDULES:
        raise UserError(f"optimizer.schedule.name must be one of {', '.join(SCHEDULES)}, got {shape['name']!r}")
    if shape["name"] == "cosine":
        return _cosine(peak, end, decay_steps)
    if shape["name"] in ("warmup_constant", "plateau"):
        after = optax.constant_schedule(peak)
    elif shape["name"] == "warmup_cosine":
        after = _cosine(peak, end, max(1, decay_steps - warmup_steps))
    else:
        after = optax.linear_schedule(peak, 0.0, max(1, decay_steps - warmup_steps))
    if not warmup_steps:
        return after
    # The first update already moves: 1 / warmup_steps of the peak, and the peak itself is update number warmup_steps.
    rise = lambda count: peak * (count + 1) / warmup_steps  # noqa: E731
    return optax.join_schedules([rise, after], [warmup_steps])


def _cosine(start: float, end: float, steps: int) -> optax.Schedule:
    def value(count):
        part = jnp.minimum(count / steps, 1.0)
        return end + (start - end) * (1.0 + jnp.cos(jnp.pi * part)) / 2.0

    return value


def build(config: Mapping[str, Any], *, steps: int, axes: Any) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer; `update` takes the loss as `value=`, which only the plateau schedule reads, and where it is
    known the gradient's global norm as `norm=`, to clip by.

    config: name, learning_rate, schedule, b1, b2, eps, weight_decay (times the step size), clip_norm (global norm, 0
    for none), momentum (Muon's) and plateau with window (updates averaged into one value), patience (windows without
    improvement before a halving), min_improvement (relative) and halvings (most of them). decay_tables: lookup tables
    decay too. moments: how those of hidden
    matrices are kept, 'fp32', 'bf16' or 'paper' (`moments.py`).
    axes: the model's nested dict of dimension names.

    Raises:
      UserError: an unknown optimizer, schedule or way of keeping moments, Muon with the paper's, or a plateau or norm
        that means nothing.
    """
    rate = schedule(config, steps=steps)
    if config["name"] not in OPTIMIZERS:
        raise UserError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, got {config['name']!r}")
    if config["clip_norm"] < 0:
        raise UserError(
            f"expected config.optimizer.clip_norm of at least 0, got {config['clip_norm']}: 0 clips nothing"
        )
    parts = [_clip(config["clip_norm"])] if config["clip_norm"] else []
    core = _adamw(config, rate, axes) if config["name"] == "adamw" else _muon(config, rate, axes)
    parts.append(moments.stored(core, matrices=hidden_mask(axes), kept=config["moments"]))
    if config["schedule"]["name"] == "plateau":
        parts.append(_plateau(config["schedule"]["plateau"]))
    return optax.with_extra_args_support(optax.chain(*parts))


def _plateau(config: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Halves the changes where the loss stands still. Of such values optax takes some in silence: without patience it
    would halve at every improvement, with a window of 0 never."""
    key = "config.optimizer.schedule.plateau"
    for name, least in {"window": 1, "patience": 1, "halvings": 0}.items():
        if config[name] < least:
            raise UserError(f"expected {key}.{name} of at least {least}, got {config[name]}: set --{key}.{name}=N")
    if not 0.0 < config["min_improvement"] < 1.0:
        raise UserError(
            f"expected {key}.min_improvement between 0 and 1, a share of the loss, got {config['min_improvement']}: "
            f"set --{key}.min_improvement=0.001"
        )
    return optax.contrib.reduce_on_plateau(
        factor=0.5,
        patience=config["patience"],
        rtol=config["min_improvement"],
        accumulation_size=config["window"],
        min_scale=0.5 ** config["halvings"],
    )


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` by a norm that may be known: of compressed gradients it is that of their factors."""

    def update(updates, state, params=None, *, norm=None, **extra):
        del params, extra
        norm = optax.tree.norm(updates) if norm is None else norm
        return jax.tree.map(lambda g: jnp.where(norm < most, g, g / norm.astype(g.dtype) * most), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _adamw(config: Mapping[str, Any], rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    clipped = config["moments"] == "paper"
    adam = moments.scale_by_clipped_adam if clipped else optax.scale_by_adam
    return optax.chain(
        adam(b1=config["b1"], b2=config["b2"], eps=config["eps"]),
        optax.add_decayed_weights(config["weight_decay"], mask=decay_mask(axes, tables=config["decay_tables"])),
        optax.scale_by_learning_rate(rate),
    )


def _muon(config: Mapping[str, Any], rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    """Muon for hidden matrices, AdamW for the rest, of which only decayed parameters decay (e.g. output heads)."""
    if config["moments"] == "paper":
        raise UserError(
            "expected config.optimizer.name = adamw with config.optimizer.moments = paper, whose formats are made for "
            "Adam's two moments, got muon: set --config.optimizer.moments=bf16 or choose adamw"
        )
    dimensions = jax.tree.map(matrix_dimensions, axes, is_leaf=_is_names)
    decays = decay_mask(axes, tables=config["decay_tables"])
    rest_mask = jax.tree.map(lambda decays, muon: decays and not muon, decays, hidden_mask(axes))
    return optax.chain(
        optax.contrib.muon(
            rate,
            beta=config["momentum"],
            weight_decay=config["weight_decay"],
            adam_b1=config["b1"],
            adam_b2=config["b2"],
            eps=config["eps"],
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=CONSISTENT_RMS,
        ),
        _decay(rest_mask, rate, config["weight_decay"]),
    )


def _decay(mask: Any, rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Subtract rate * weight_decay * parameter from the (already scaled) updates of the masked parameters."""

    def update(updates, count, params):
        factor = weight_decay * rate(count)
        updates = jax.tree.map(lambda u, p, m: u - factor * p if m else u, updates, params, mask)
        return updates, optax.safe_increment(count)

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def decay_mask(axes: Any, *, tables: bool = False) -> Any:
    """Nested dict of bool: does this parameter get weight decay? See the top of the file. tables: lookup tables too."""
    decays = lambda names: _decays(names) or (tables and len(_sides(names)) >= 2)  # noqa: E731
    return jax.tree.map(decays, axes, is_leaf=_is_names)


def hidden_mask(axes: Any) -> Any:
    """Nested dict of bool: is this parameter a hidden matrix? See the top of the file."""
    return jax.tree.map(lambda names: matrix_dimensions(names) is not None, axes, is_leaf=_is_names)


def _decays(names: tuple[str | None, ...]) -> bool:
    sides = _sides(names)
    return len(sides) >= 2 and names[sides[0][0]] not in TABLES


def matrix_dimensions(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions of a hidden matrix are its inputs and which its outputs; None if it is none.

    Stacked dimensions belong to neither, so each layer's matrix is orthogonalised alone. The output is the last side,
    everything before it (height and width of a convolution's kernel too) the input.
    """
    if not _decays(names) or any(name in TABLES for name in names):
        return None
    *inputs, output = _sides(names)
    return optax.contrib.MuonDimensionNumbers(sum(inputs, ()), output)


def _sides(names: tuple[str | None, ...]) -> list[tuple[int, ...]]:
    """Dimensions that are not stacked; neighbouring HEADS count as one."""
    sides: list[tuple[int, ...]] = []
    for index, name in enumerate(names):
        if name in STACKED:
            continue
        if sides and name in HEADS and names[sides[-1][-1]] in HEADS:
            sides[-1] += (index,)
        else:
            sides.append((index,))
    return sides


def plateau_scale(opt_state: Any) -> jax.Array | float:
    """What the halvings have made of the step size so far; 1 without the plateau schedule."""
    is_plateau = lambda leaf: isinstance(leaf, optax.contrib.ReduceLROnPlateauState)  # noqa: E731
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_plateau) if is_plateau(leaf)]
    return found[0].scale if found else 1.0


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple)
