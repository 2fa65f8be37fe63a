"""Convolutions as modules, and patches of pixels as channels."""

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.models import ops
from dalle_jax.models.layers import param
from dalle_jax.sharding import constrain


class Conv(nnx.Module):
    """A 'same' convolution of stride 1; normal weights with variance 1 / fan-in, zero bias (released code).

    precision: of float32 products on an accelerator; where the paper has float32 they are not rounded at all.
    """

    def __init__(
        self,
        kernel: int,
        channels: tuple[int, int],
        rngs,
        *,
        dtype=jnp.float32,
        precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
        axes=("in", "out"),
    ):
        std = (kernel * kernel * channels[0]) ** -0.5
        self.weight = param(rngs, (kernel, kernel, *channels), axes=(None, None, *axes), std=std)
        self.bias = param(rngs, channels[1:], axes=axes[1:])
        self.dtype, self.precision = dtype, precision if dtype == jnp.float32 else None

    def __call__(self, x_BHWC):
        # Gathered before use: a convolution whose channels are cut over the mesh got wrong gradients from XLA's CPU
        # backend (jax 0.10.2), and a network this small needs its storage cut, not its products.
        x_BHWC, weight = x_BHWC.astype(self.dtype), constrain(self.weight[...].astype(self.dtype), (None,) * 4)
        y_BHWC = ops.conv(x_BHWC, weight, self.precision)
        return y_BHWC + self.bias[...].astype(self.dtype)[None, None, None]

    def look_up(self, tokens_BRC):
        """The result for one-hot inputs; for a 1x1 kernel only."""
        return self.weight[0, 0][tokens_BRC] + self.bias[...][None, None, None]


def fold(x_BHWC, patch: int):
    """[B, H, W, C] -> [B, H / patch, W / patch, patch * patch * C]: a patch's rows, in them its pixels."""
    return einops.rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unfold(x_BHWC, patch: int):
    """The inverse of `fold`: [B, H, W, patch * patch * C] -> [B, H * patch, W * patch, C]."""
    return einops.rearrange(x_BHWC, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)
