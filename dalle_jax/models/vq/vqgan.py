"""VQGAN's networks as taming-transformers has them (Esser et al. 2021), and LlamaGen with other levels of attention.

Levels of residual blocks with group norms, each with half the positions per side of the one before; between encoder and
decoder two blocks around attention. With 16-bit precision the first and last convolutions, statistics of norms and the
softmax are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.models.convolutions import Conv, DoublingConv, HalvingConv
from dalle_jax.models.layers import compute_dtype, param
from dalle_jax.models.vq.config import NORM_GROUPS, VQConfig
from dalle_jax.sharding import constrain

EPSILON = 1e-6  # of the group norms


class Encoder(nnx.Module):
    """Pixels [B, H, W, 3] -> float32 [B, R, C, latent]."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        dtype, widths = compute_dtype(config.precision), config.widths
        self.conv_in = Conv(3, (3, config.width), rngs, uniform=True)
        self.levels: tuple[tuple[str, ...], ...] = ()
        channels = config.width
        for level, width in enumerate(widths):
            steps = _add_blocks(self, config, rngs, level=level, channels=channels, blocks=config.blocks)
            if level < len(widths) - 1:
                name = f"level_{level}_down"
                setattr(self, name, HalvingConv(3, (width, width), rngs, dtype=dtype, uniform=True))
                steps.append(name)
            self.levels += (tuple(steps),)
            channels = width
        self.middle = Middle(channels, dtype, rngs)
        self.norm_out = GroupNorm(channels, rngs)
        self.conv_out = Conv(3, (channels, config.latent), rngs, uniform=True)
        self.dtype = dtype

    def __call__(self, x_BHWC):
        x_BHWC = self.conv_in(x_BHWC).astype(self.dtype)
        for steps in self.levels:
            x_BHWC = _through(self, steps, x_BHWC)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x_BHWC))))


class Decoder(nnx.Module):
    """float32 [B, R, C, latent] -> pixels float32 [B, H, W, 3]."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        dtype, widths = compute_dtype(config.precision), config.widths
        channels = widths[-1]
        self.conv_in = Conv(3, (config.latent, channels), rngs, uniform=True)
        self.middle = Middle(channels, dtype, rngs)
        self.levels: tuple[tuple[str, ...], ...] = ()
        for level in reversed(range(len(widths))):
            width = widths[level]
            steps = _add_blocks(self, config, rngs, level=level, channels=channels, blocks=config.blocks + 1)
            if level:
                name = f"level_{level}_up"
                setattr(self, name, DoublingConv(3, (width, width), rngs, dtype=dtype, uniform=True))
                steps.append(name)
            self.levels += (tuple(steps),)
            channels = width
        self.norm_out = GroupNorm(channels, rngs)
        self.conv_out = Conv(3, (channels, 3), rngs, uniform=True)
        self.dtype = dtype

    def __call__(self, x_BRCD):
        x_BHWC = self.middle(self.conv_in(x_BRCD).astype(self.dtype))
        for steps in self.levels:
            x_BHWC = _through(self, steps, x_BHWC)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BHWC)))


def _add_blocks(network, config: VQConfig, rngs, *, level: int, channels: int, blocks: int) -> list[str]:
    """Adds the blocks of a level to a network; returns their names in their order."""
    dtype, width, steps = compute_dtype(config.precision), config.widths[level], []
    for index in range(blocks):
        name = f"level_{level}_block_{index}"
        setattr(network, name, Block((channels if index == 0 else width, width), dtype, rngs))
        steps.append(name)
        if level in config.attention_levels:
            name = f"level_{level}_attention_{index}"
            setattr(network, name, Attention(width, dtype, rngs))
            steps.append(name)
    return steps


def _through(network, steps: tuple[str, ...], x_BHWC):
    for name in steps:
        x_BHWC = constrain(getattr(network, name)(x_BHWC), ("batch", None, None, None))
    return x_BHWC


class Middle(nnx.Module):
    """Block, attention, block at the coarsest grid."""

    def __init__(self, channels: int, dtype, rngs):
        self.block_1 = Block((channels, channels), dtype, rngs)
        self.attention = Attention(channels, dtype, rngs)
        self.block_2 = Block((channels, channels), dtype, rngs)

    def __call__(self, x_BHWC):
        return _through(self, ("block_1", "attention", "block_2"), x_BHWC)


class Block(nnx.Module):
    """skip(x) + two times norm, swish, 3x3 convolution; the skip is 1x1 where the channels change."""

    def __init__(self, channels: tuple[int, int], dtype, rngs):
        before, after = channels
        self.norm_1 = GroupNorm(before, rngs)
        self.conv_1 = Conv(3, channels, rngs, dtype=dtype, uniform=True)
        self.norm_2 = GroupNorm(after, rngs)
        self.conv_2 = Conv(3, (after, after), rngs, dtype=dtype, uniform=True)
        self.skip = Conv(1, channels, rngs, dtype=dtype, uniform=True) if before != after else None

    def __call__(self, x_BHWC):
        y_BHWC = self.conv_1(jax.nn.silu(self.norm_1(x_BHWC)))
        y_BHWC = self.conv_2(jax.nn.silu(self.norm_2(y_BHWC)))
        return (x_BHWC if self.skip is None else self.skip(x_BHWC)) + y_BHWC


class Attention(nnx.Module):
    """x + attention of every position to every one, with a single head as wide as x."""

    def __init__(self, channels: int, dtype, rngs):
        self.norm = GroupNorm(channels, rngs)
        self.query, self.key, self.value, self.out = (
            Conv(1, (channels, channels), rngs, dtype=dtype, uniform=True) for _ in range(4)
        )

    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        y_BHWC = self.norm(x_BHWC)
        q_BSC, k_BSC, v_BSC = (conv(y_BHWC).reshape(B, H * W, C) for conv in (self.query, self.key, self.value))
        exact = jax.lax.Precision.HIGHEST
        scores_BST = jnp.einsum(
            "bsc,btc->bst", q_BSC * C**-0.5, k_BSC, precision=exact, preferred_element_type=jnp.float32
        )
        weights_BST = jax.nn.softmax(scores_BST, axis=-1).astype(v_BSC.dtype)
        y_BSC = jnp.einsum("bst,btc->bsc", weights_BST, v_BSC, precision=exact)
        return x_BHWC + self.out(y_BSC.reshape(B, H, W, C))


class GroupNorm(nnx.Module):
    """Normalization over the positions and channels of each of NORM_GROUPS groups, then a gain and a bias per channel.

    Statistics are taken per channel and averaged over a group after, so that no array is laid out anew; the result is
    one multiplication and addition, in x's dtype.
    """

    def __init__(self, channels: int, rngs):
        self.gain = param(rngs, (channels,), axes=("out",), fill=1.0)
        self.bias = param(rngs, (channels,), axes=("out",))

    def __call__(self, x_BHWC):
        B, _, _, C = x_BHWC.shape
        x32_BHWC = x_BHWC.astype(jnp.float32)
        mean_BC = x32_BHWC.mean((1, 2))
        variance_BC = jnp.square(x32_BHWC - mean_BC[:, None, None]).mean((1, 2))

        def of_group(statistic_BC):
            averaged = statistic_BC.reshape(B, NORM_GROUPS, -1).mean(-1, keepdims=True)
            return jnp.broadcast_to(averaged, (B, NORM_GROUPS, C // NORM_GROUPS)).reshape(B, C)

        group_mean_BC = of_group(mean_BC)
        group_variance_BC = of_group(variance_BC + jnp.square(mean_BC - group_mean_BC))
        scale_BC = jax.lax.rsqrt(group_variance_BC + EPSILON) * self.gain[...][None]
        shift_BC = self.bias[...][None] - group_mean_BC * scale_BC
        return (x32_BHWC * scale_BC[:, None, None] + shift_BC[:, None, None]).astype(x_BHWC.dtype)
