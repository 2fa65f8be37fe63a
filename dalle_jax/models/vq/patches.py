"""Small networks on patches of pixels that are folded into channels, for pictures of few pixels and little time.

Levels of residual blocks, the finest at one position per patch; levels are joined by folding 2 x 2 positions into one.
Where a patch has 4 pixels per side or more, the decoder ends with a block at twice the finest grid, so that neighboring
patches meet without seams. With 16-bit precision only what the branches compute is rounded.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.models.convolutions import Conv, fold, unfold
from dalle_jax.models.layers import compute_dtype, param
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.sharding import constrain

EPSILON = 1e-6  # of the root mean squares
BRANCH_GAIN = 0.1  # of a branch's last convolution at first: every block is nearly the identity
FINE_PATCH = 4  # pixels per side, from which on the decoder ends at twice the finest grid


class Encoder(nnx.Module):
    """Pixels [B, H, W, 3] -> float32 [B, R, C, channels of the last level]."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        self.patch, self.widths = config.patch, config.widths
        self.conv_in = Conv(3, (3 * config.patch**2, config.widths[0]), rngs)
        for level, width in enumerate(config.widths):
            if level:
                setattr(self, f"level_{level}_down", Conv(1, (4 * config.widths[level - 1], width), rngs))
            setattr(self, f"level_{level}", Level(width, config.blocks, config, rngs))

    def __call__(self, x_BHWC):
        x_BHWC = self.conv_in(fold(x_BHWC, self.patch))
        for level in range(len(self.widths)):
            if level:
                x_BHWC = getattr(self, f"level_{level}_down")(fold(x_BHWC, 2))
            x_BHWC = getattr(self, f"level_{level}")(x_BHWC)
        return x_BHWC


class Decoder(nnx.Module):
    """float32 [B, R, C, code_dim] -> pixels float32 [B, H, W, 3]."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        finest, self.widths = config.widths[0], config.widths
        self.conv_in = Conv(1, (config.code_dim, config.widths[-1]), rngs)
        for level, width in enumerate(config.widths):
            setattr(self, f"level_{level}", Level(width, config.blocks, config, rngs))
            if level:
                setattr(self, f"level_{level}_up", Conv(1, (width, 4 * config.widths[level - 1]), rngs))
        self.fine = config.patch >= FINE_PATCH
        self.patch = config.patch // 2 if self.fine else config.patch
        if self.fine:
            self.fine_up = Conv(1, (finest, 4 * (finest // 2)), rngs)
            self.fine_level = Level(finest // 2, 1, config, rngs)
        self.conv_out = Conv(3, (finest // 2 if self.fine else finest, 3 * self.patch**2), rngs)

    def __call__(self, x_BRCD):
        x_BHWC = self.conv_in(x_BRCD)
        for level in reversed(range(len(self.widths))):
            x_BHWC = getattr(self, f"level_{level}")(x_BHWC)
            if level:
                x_BHWC = unfold(getattr(self, f"level_{level}_up")(x_BHWC), 2)
        if self.fine:
            x_BHWC = self.fine_level(unfold(self.fine_up(x_BHWC), 2))
        return unfold(self.conv_out(x_BHWC), self.patch)


class Level(nnx.Module):
    """Blocks x + branch(x): root mean square over the channels, 3x3 convolution, SiLU, 1x1 convolution."""

    def __init__(self, width: int, blocks: int, config: VQConfig, rngs: nnx.Rngs):
        dtype = compute_dtype(config.precision)
        self.blocks = blocks
        for index in range(blocks):
            setattr(self, f"block_{index}_gain", param(rngs, (width,), axes=("out",), fill=1.0))
            setattr(self, f"block_{index}_conv_1", Conv(3, (width, width), rngs, dtype=dtype))
            setattr(self, f"block_{index}_conv_2", Conv(1, (width, width), rngs, dtype=dtype, gain=BRANCH_GAIN))

    def __call__(self, x_BHWC):
        for index in range(self.blocks):
            mean_square = jnp.square(x_BHWC).mean(-1, keepdims=True)
            gain = getattr(self, f"block_{index}_gain")[...][None, None, None]
            y_BHWC = getattr(self, f"block_{index}_conv_1")(x_BHWC * jax.lax.rsqrt(mean_square + EPSILON) * gain)
            y_BHWC = getattr(self, f"block_{index}_conv_2")(jax.nn.silu(y_BHWC))
            x_BHWC = constrain(x_BHWC + y_BHWC.astype(x_BHWC.dtype), ("batch", None, None, None))
        return x_BHWC
