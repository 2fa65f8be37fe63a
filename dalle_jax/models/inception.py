"""Inception v3 (Szegedy et al. 2015), the network whose features FID, IS and KID are computed from.

Two networks share the parameters' shapes and differ in their pools and classes: 'fid', the graph of 2015-12-05 that
every published FID goes back to, and 'torchvision', which the DM-GAN code used. `fid` averages without the padding and
takes a maximum instead of the average in the very last block, an old mistake that scores now depend on; its logits
leave their bias out, as the code of the Inception score does (Salimans et al. 2016). Batch norms use their stored
statistics; there is no training here, no dropout and no auxiliary classifier. float32 throughout.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.models.layers import Model, param
from dalle_jax.models.ops import plain_conv

SIZE = 299  # pixels
FEATURES = 2_048  # pool3
EPSILON = 1e-3  # of the batch norms, in both published networks
CLASSES = {"fid": 1_008, "torchvision": 1_000}
MIN_SIZE = 75  # pixels; below, the last grid has no position


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """pools: 'fid' or 'torchvision'.

    narrow: the published channel counts are divided by it, for tests; a divisor of 16.
    """

    pools: str = "fid"
    narrow: int = 1

    def __post_init__(self):
        if self.pools not in CLASSES:
            raise ValueError(f"pools must be one of {tuple(CLASSES)}, got {self.pools!r}")
        if self.narrow < 1 or 16 % self.narrow:
            raise ValueError(f"narrow must be a divisor of 16, got {self.narrow}")

    @property
    def classes(self) -> int:
        """Length of the logits."""
        return CLASSES[self.pools]

    @property
    def features(self) -> int:
        """Length of the pool3 vectors."""
        return FEATURES // self.narrow


@functools.cache
def model(config: InceptionConfig) -> Model:
    """The definition as pure functions; the same one for the same config, so that it is compiled once."""
    return Model(config, lambda rngs: Inception(config, rngs))


# A branch is a chain of (name, channels, kernel) or, last, of a pair that reads the same input and is concatenated.
# Convolutions keep the grid, except in the blocks that halve it, where the last one of a branch strides.


def _block_a(pooled: int):
    return (
        (("branch1x1", 64, (1, 1)),),
        (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
        (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
        (("branch_pool", pooled, (1, 1)),),
    )


_BLOCK_B = (
    (("branch3x3", 384, (3, 3)),),
    (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))),
)


def _block_c(width: int):
    return (
        (("branch1x1", 192, (1, 1)),),
        (("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))),
        (
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
        (("branch_pool", 192, (1, 1)),),
    )


_BLOCK_D = (
    (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))),
    (
        ("branch7x7x3_1", 192, (1, 1)),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, (3, 3)),
    ),
)
_BLOCK_E = (
    (("branch1x1", 320, (1, 1)),),
    (("branch3x3_1", 384, (1, 1)), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))),
    (
        ("branch3x3dbl_1", 448, (1, 1)),
        ("branch3x3dbl_2", 384, (3, 3)),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (("branch_pool", 192, (1, 1)),),
)
# Name, branches, whether it halves the grid.
_BLOCKS = (
    ("mixed_5b", _block_a(32), False),
    ("mixed_5c", _block_a(64), False),
    ("mixed_5d", _block_a(64), False),
    ("mixed_6a", _BLOCK_B, True),
    ("mixed_6b", _block_c(128), False),
    ("mixed_6c", _block_c(160), False),
    ("mixed_6d", _block_c(160), False),
    ("mixed_6e", _block_c(192), False),
    ("mixed_7a", _BLOCK_D, True),
    ("mixed_7b", _BLOCK_E, False),
    ("mixed_7c", _BLOCK_E, False),
)


class Inception(nnx.Module):
    """Parameters: {'conv_1a': ..., ..., 'mixed_7c': ..., 'logits': {'weight', 'bias'}}."""

    def __init__(self, config: InceptionConfig, rngs: nnx.Rngs):
        def width(channels):
            return channels // config.narrow

        self.conv_1a = Conv((3, 3), (3, width(32)), rngs, stride=2, padding="VALID")
        self.conv_2a = Conv((3, 3), (width(32), width(32)), rngs, padding="VALID")
        self.conv_2b = Conv((3, 3), (width(32), width(64)), rngs)
        self.conv_3b = Conv((1, 1), (width(64), width(80)), rngs)
        self.conv_4a = Conv((3, 3), (width(80), width(192)), rngs, padding="VALID")
        channels = width(192)
        for name, branches, halves in _BLOCKS:
            pool = _halving_max if halves else _mean_with_padding if config.pools == "torchvision" else _mean
            if name == "mixed_7c" and config.pools == "fid":
                pool = _same_max
            block = Mixed(branches, channels, rngs, pool=pool, halves=halves, narrow=config.narrow)
            setattr(self, name, block)
            channels = block.channels
        self.logits = Linear((config.features, config.classes), rngs, biased=config.pools != "fid")

    def __call__(self, x_BHWC):
        """float32 [B, H, W, 3] in [-1, 1] -> pool3 [B, F] and logits [B, V], float32. Published numbers use SIZE."""
        if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != 3 or min(x_BHWC.shape[1:3]) < MIN_SIZE:
            raise ValueError(f"expected images [B, H, W, 3] of {MIN_SIZE} pixels or more, got {x_BHWC.shape}")
        x_BHWC = self.conv_2b(self.conv_2a(self.conv_1a(x_BHWC.astype(jnp.float32))))
        x_BHWC = self.conv_4a(self.conv_3b(_halving_max(x_BHWC)))
        x_BHWC = _halving_max(x_BHWC)
        for name, _, _ in _BLOCKS:
            x_BHWC = getattr(self, name)(x_BHWC)
        pool3_BF = x_BHWC.mean((1, 2))
        return pool3_BF, self.logits(pool3_BF)


class Conv(nnx.Module):
    """A convolution without bias, a batch norm by its stored statistics, and a ReLU."""

    def __init__(self, kernel: tuple[int, int], channels: tuple[int, int], rngs, *, stride=1, padding="SAME"):
        std = (2 / (kernel[0] * kernel[1] * channels[0])) ** 0.5
        self.weight = param(rngs, (*kernel, *channels), axes=(None, None, "in", "out"), std=std)
        self.gain = param(rngs, channels[1:], axes=("out",), fill=1.0)
        self.bias = param(rngs, channels[1:], axes=("out",))
        self.mean = param(rngs, channels[1:], axes=("out",))
        self.variance = param(rngs, channels[1:], axes=("out",), fill=1.0)
        self.stride, self.padding = stride, padding

    def __call__(self, x_BHWC):
        scale_C = self.gain[...] * jax.lax.rsqrt(self.variance[...] + EPSILON)
        weight = self.weight[...] * scale_C[None, None, None]
        exact = jax.lax.Precision.HIGHEST  # an accelerator must not round to bfloat16 or TF32
        # Without any padding XLA takes up to three times as long on CPU, so there is a row and a column more.
        padding = "SAME" if self.padding == "SAME" else ((0, 1), (0, 1))
        y_BHWC = plain_conv(x_BHWC, weight, exact, stride=self.stride, padding=padding)
        if self.padding == "VALID":
            height, width = ((x_BHWC.shape[i] - weight.shape[i - 1]) // self.stride + 1 for i in (1, 2))
            y_BHWC = y_BHWC[:, :height, :width]
        return jax.nn.relu(y_BHWC + (self.bias[...] - self.mean[...] * scale_C)[None, None, None])


class Mixed(nnx.Module):
    """Branches side by side, concatenated; the last one reads the pooled input, or is it where the grid is halved."""

    def __init__(self, branches, channels: int, rngs, *, pool, halves: bool, narrow: int):
        self.branches, self.pool, self.halves = branches, pool, halves
        self.channels = channels if halves else 0
        for branch in branches:
            inputs = channels
            for place, step in enumerate(branch):
                strides = halves and place == len(branch) - 1
                outputs = 0
                for name, published, kernel in _side_by_side(step):
                    conv = Conv(
                        kernel,
                        (inputs, published // narrow),
                        rngs,
                        stride=2 if strides else 1,
                        padding="VALID" if strides else "SAME",
                    )
                    setattr(self, name, conv)
                    outputs += published // narrow
                inputs = outputs
            self.channels += inputs

    def __call__(self, x_BHWC):
        pooled_BHWC = self.pool(x_BHWC)
        outputs = []
        for place, branch in enumerate(self.branches):
            y_BHWC = x_BHWC if self.halves or place < len(self.branches) - 1 else pooled_BHWC
            for step in branch:
                y_BHWC = jnp.concatenate([getattr(self, name)(y_BHWC) for name, *_ in _side_by_side(step)], axis=-1)
            outputs.append(y_BHWC)
        return jnp.concatenate([*outputs, pooled_BHWC] if self.halves else outputs, axis=-1)


class Linear(nnx.Module):
    def __init__(self, channels: tuple[int, int], rngs, *, biased: bool):
        self.weight = param(rngs, channels, axes=("in", "out"), std=channels[0] ** -0.5)
        self.bias = param(rngs, channels[1:], axes=("out",))  # a published file has it
        self.biased = biased

    def __call__(self, x_BF):
        y_BV = jnp.matmul(x_BF, self.weight[...], precision=jax.lax.Precision.HIGHEST)
        return y_BV + self.bias[...][None] if self.biased else y_BV


def _side_by_side(step):
    """The convolutions of one step of a branch."""
    return (step,) if isinstance(step[0], str) else step


def _window(x_BHWC, combine, *, stride: int = 1):
    """`combine` of two arrays over whole windows of 3 x 3, first down, then across.

    As slices, because XLA's own windows are slow on CPU.
    """
    _, H, W, _ = x_BHWC.shape
    x_BHWC = functools.reduce(combine, (x_BHWC[:, i : H - 2 + i : stride] for i in range(3)))
    return functools.reduce(combine, (x_BHWC[:, :, i : W - 2 + i : stride] for i in range(3)))


def _padded(x_BHWC, value: float):
    return jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _halving_max(x_BHWC):
    return _window(x_BHWC, jnp.maximum, stride=2)


def _same_max(x_BHWC):
    return _window(_padded(x_BHWC, -jnp.inf), jnp.maximum)


def _mean(x_BHWC):
    """Average over those positions of the window that are inside the image."""
    inside = jnp.ones((1, *x_BHWC.shape[1:3], 1), jnp.float32)
    return _window(_padded(x_BHWC, 0.0), jnp.add) / _window(_padded(inside, 0.0), jnp.add)


def _mean_with_padding(x_BHWC):
    """Average over nine positions; those outside the image are zeros."""
    return _window(_padded(x_BHWC, 0.0), jnp.add) / 9
