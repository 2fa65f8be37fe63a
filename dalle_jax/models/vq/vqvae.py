"""VQ-VAE's networks (van den Oord et al. 2017, section 4.1), as in DeepMind's example for CIFAR-10 in Sonnet.

Strided convolutions, one per halving, a 3x3 one and residual blocks at the coarsest grid; the decoder mirrors them with
transposed convolutions. There are no norms, and values grow at will: with 16-bit precision only what the residual
branches compute is rounded.
"""

import jax
from flax import nnx

from dalle_jax.models.convolutions import Conv, DoublingConv, HalvingConv
from dalle_jax.models.layers import compute_dtype
from dalle_jax.models.vq.config import BOTTLENECK, VQConfig
from dalle_jax.sharding import constrain


class Encoder(nnx.Module):
    """Pixels [B, H, W, 3] -> float32 [B, R, C, channels of the last level]."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        self.halvings = len(config.widths)
        for index, channels in enumerate(zip((3, *config.widths), config.widths, strict=False)):
            setattr(self, f"down_{index}", HalvingConv(4, channels, rngs))
        self.conv = Conv(3, (config.widths[-1],) * 2, rngs)
        self.stack = Stack(config, rngs)

    def __call__(self, x_BHWC):
        for index in range(self.halvings):
            x_BHWC = jax.nn.relu(getattr(self, f"down_{index}")(x_BHWC))
            x_BHWC = constrain(x_BHWC, ("batch", None, None, None))
        return self.stack(self.conv(x_BHWC))


class Decoder(nnx.Module):
    """float32 [B, R, C, code_dim] -> pixels float32 [B, H, W, 3]."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        self.halvings = len(config.widths)
        self.conv = Conv(3, (config.code_dim, config.widths[-1]), rngs)
        self.stack = Stack(config, rngs)
        for index, channels in enumerate(zip(config.widths, (3, *config.widths), strict=False)):
            setattr(self, f"up_{index}", DoublingConv(4, channels, rngs))

    def __call__(self, x_BRCD):
        x_BHWC = self.stack(self.conv(x_BRCD))
        for index in reversed(range(self.halvings)):
            x_BHWC = getattr(self, f"up_{index}")(x_BHWC)
            x_BHWC = constrain(jax.nn.relu(x_BHWC) if index else x_BHWC, ("batch", None, None, None))
        return x_BHWC


class Stack(nnx.Module):
    """Residual blocks ReLU, 3x3 convolution to a quarter of the channels, ReLU, 1x1 convolution; a ReLU at the end."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        width, dtype = config.widths[-1], compute_dtype(config.precision)
        self.blocks = config.blocks
        for index in range(config.blocks):
            setattr(self, f"block_{index}_conv_1", Conv(3, (width, width // BOTTLENECK), rngs, dtype=dtype))
            setattr(self, f"block_{index}_conv_2", Conv(1, (width // BOTTLENECK, width), rngs, dtype=dtype))

    def __call__(self, x_BHWC):
        for index in range(self.blocks):
            y_BHWC = getattr(self, f"block_{index}_conv_1")(jax.nn.relu(x_BHWC))
            y_BHWC = getattr(self, f"block_{index}_conv_2")(jax.nn.relu(y_BHWC))
            x_BHWC = constrain(x_BHWC + y_BHWC.astype(x_BHWC.dtype), ("batch", None, None, None))
        return jax.nn.relu(x_BHWC)
