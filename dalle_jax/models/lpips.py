"""The perceptual distance of two pictures: LPIPS (Zhang et al. 2018, 0.1 with VGG16), and a substitute without weights.

VGG16 (Simonyan & Zisserman 2014) reads both pictures. Behind the last ReLU of each of its five stages the channels of
every position are scaled to length 1; the squared differences are weighted by channel, summed over channels, averaged
over positions and summed over the stages. The weights are published by others and come by `dalle-jax convert lpips`;
where nobody has them, `edge_error` stands in, a plain number that also rises where edges are blurred.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.models.convolutions import Conv
from dalle_jax.models.layers import Model, Params, param

# Channels and convolutions of VGG16's stages, with a 2 x 2 maximum between them.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# Of the pixels in [-1, 1], for each color: ImageNet's means m and deviations s in that range, 2 m - 1 and 2 s.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10  # added to lengths
MIN_SIZE = 16  # pixels; below, the last stage has no position
SCALES = (1, 2, 4)  # pixels per side that `edge_error` averages


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """narrow: the published channel counts are divided by it, for tests; a divisor of 64."""

    narrow: int = 1

    def __post_init__(self):
        if self.narrow < 1 or 64 % self.narrow:
            raise ValueError(f"narrow must be a divisor of 64, got {self.narrow}")


@functools.cache
def model(config: LPIPSConfig) -> Model:
    """The definition as pure functions; the same one for the same config, so that it is compiled once."""
    return Model(config, lambda rngs: LPIPS(config, rngs))


def distance(model: Model, params: Params, x_unit, y_unit):
    """LPIPS of pairs of pictures, float32 [B]; 0 for equal ones, and in practice below 1.

    x_unit, y_unit: float [B, H, W, 3] in [0, 1], of at least MIN_SIZE pixels per side; others may lie outside a little.
    """
    return model.apply(params, 2.0 * x_unit - 1.0, 2.0 * y_unit - 1.0)


def edge_error(x_unit, y_unit):
    """Mean absolute difference between the edges of two pictures, float32 [B].

    An edge is the difference of two neighboring values, down or across; the mean is over all of them, and over the
    pictures as they are and averaged over 2 x 2 and 4 x 4 pixels (rows and columns that do not fill such a square are
    left out, and so is a scale without neighbors). It needs no weights, but knows texture only from noise of its size.

    x_unit, y_unit: float [B, H, W, 3] in [0, 1].
    """
    errors = []
    for scale in SCALES:
        d_BHWC = _averaged(x_unit - y_unit, scale)  # the difference of edges is the edge of the difference
        down, across = (jnp.abs(jnp.diff(d_BHWC, axis=axis)) for axis in (1, 2))
        if count := math.prod(down.shape[1:]) + math.prod(across.shape[1:]):
            errors.append((down.sum((1, 2, 3)) + across.sum((1, 2, 3))) / count)
    return sum(errors) / len(errors) if errors else jnp.zeros(len(x_unit), jnp.float32)


class LPIPS(nnx.Module):
    """Parameters: {'conv1_1': {'weight', 'bias'}, ..., 'conv5_3': ..., 'linear1': {'weight'}, ..., 'linear5': ...}."""

    def __init__(self, config: LPIPSConfig, rngs: nnx.Rngs):
        inputs = 3
        for stage, (published, convolutions) in enumerate(STAGES, 1):
            width = published // config.narrow
            for place in range(1, convolutions + 1):
                # Not rounded to bfloat16 on an accelerator; TF32 is what published numbers were computed with.
                conv = Conv(3, (inputs, width), rngs, precision=jax.lax.Precision.HIGH)
                setattr(self, f"conv{stage}_{place}", conv)
                inputs = width
            setattr(self, f"linear{stage}", Linear(width, rngs))

    def __call__(self, x_BHWC, y_BHWC):
        """Pictures [B, H, W, 3] in [-1, 1] -> float32 [B]."""
        if x_BHWC.shape != y_BHWC.shape or x_BHWC.shape[-1] != 3 or min(x_BHWC.shape[1:3]) < MIN_SIZE:
            raise ValueError(
                f"expected images [B, H, W, 3] in pairs, {MIN_SIZE} pixels, got {x_BHWC.shape} and {y_BHWC.shape}"
            )
        total_B = jnp.zeros(len(x_BHWC), jnp.float32)
        x_BHWC, y_BHWC = _standardized(x_BHWC), _standardized(y_BHWC)
        for stage, (_, convolutions) in enumerate(STAGES, 1):
            x_BHWC, y_BHWC = (self._stage(z_BHWC, stage, convolutions) for z_BHWC in (x_BHWC, y_BHWC))
            squares_BHWC = jnp.square(_unit(x_BHWC) - _unit(y_BHWC))
            total_B += getattr(self, f"linear{stage}")(squares_BHWC).mean((1, 2))
        return total_B

    def _stage(self, x_BHWC, stage: int, convolutions: int):
        if stage > 1:
            x_BHWC = _halved(x_BHWC)
        for place in range(1, convolutions + 1):
            x_BHWC = jax.nn.relu(getattr(self, f"conv{stage}_{place}")(x_BHWC))
        return x_BHWC


class Linear(nnx.Module):
    """A weighted sum over channels."""

    def __init__(self, channels: int, rngs):
        self.weight = param(rngs, (channels,), axes=("in",), fill=1 / channels)

    def __call__(self, x_BHWC):
        return jnp.einsum("bhwc,c->bhw", x_BHWC, self.weight[...], precision=jax.lax.Precision.HIGHEST)


def _standardized(x_BHWC):
    shift, scale = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (SHIFT, SCALE))
    return (x_BHWC - shift) / scale


def _unit(x_BHWC):
    """Channels of length 1. Where all are 0, as in a picture of one color they can be, so is the gradient."""
    square = jnp.square(x_BHWC).sum(-1, keepdims=True)
    nothing = square == 0
    return x_BHWC / (jnp.where(nothing, 0.0, jnp.sqrt(jnp.where(nothing, 1.0, square))) + EPSILON)


def _halved(x_BHWC):
    """The maximum of each 2 x 2 square; a last odd row or column has none."""
    B, H, W, C = x_BHWC.shape
    x_BHWC = x_BHWC[:, : H // 2 * 2, : W // 2 * 2]
    return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).max((2, 4))


def _averaged(x_BHWC, side: int):
    """The average of each side x side square."""
    B, H, W, C = x_BHWC.shape
    x_BHWC = x_BHWC[:, : H // side * side, : W // side * side]
    return x_BHWC.reshape(B, H // side, side, W // side, side, C).mean((2, 4))
