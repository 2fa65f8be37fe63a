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

    precision: of float32 products on an accelerator; where the paper has float32 they are not rounded at all. gain: of
    the initial weights. uniform: weights and bias begin uniform within fan-in^-0.5 of zero, as PyTorch's do.
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
        gain: float = 1.0,
        uniform: bool = False,
    ):
        std = gain * (kernel * kernel * channels[0]) ** -0.5
        start = {"bound": std} if uniform else {"std": std}
        self.weight = param(rngs, (kernel, kernel, *channels), axes=(None, None, *axes), **start)
        self.bias = param(rngs, channels[1:], axes=axes[1:], bound=std if uniform else 0.0)
        self.dtype, self.precision = dtype, precision if dtype == jnp.float32 else None

    def __call__(self, x_BHWC):
        # Gathered before use: a convolution whose channels are cut over the mesh got wrong gradients from XLA's CPU
        # backend (jax 0.10.2), and a network this small needs its storage cut, not its products.
        x_BHWC, weight = x_BHWC.astype(self.dtype), constrain(self.weight[...].astype(self.dtype), (None,) * 4)
        y_BHWC = self.product(x_BHWC, weight)
        return y_BHWC + self.bias[...].astype(self.dtype)[None, None, None]

    def product(self, x_BHWC, weight):
        """The convolution without its bias."""
        return ops.conv(x_BHWC, weight, self.precision)

    def look_up(self, tokens_BRC):
        """The result for one-hot inputs; for a 1x1 kernel only."""
        return self.weight[0, 0][tokens_BRC] + self.bias[...][None, None, None]


class HalvingConv(Conv):
    """A convolution of stride 2 that halves even sides, TensorFlow's 'same': with a kernel of 3 one row and one column
    of zeros lie behind the last ones (taming-transformers), with a kernel of 4 also before the first (Sonnet)."""

    def product(self, x_BHWC, weight):
        return ops.plain_conv(x_BHWC, weight, self.precision, stride=2)


class DoublingConv(Conv):
    """Doubles the sides: with a kernel of 3 a convolution of what is repeated twice along both (taming-transformers),
    with a kernel of 4 TensorFlow's 'same' transposed convolution of stride 2 (Sonnet)."""

    def product(self, x_BHWC, weight):
        return ops.doubling_conv(x_BHWC, weight, self.precision)


def fold(x_BHWC, patch: int):
    """[B, H, W, C] -> [B, H / patch, W / patch, patch * patch * C]: a patch's rows, in them its pixels."""
    return einops.rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unfold(x_BHWC, patch: int):
    """The inverse of `fold`: [B, H, W, patch * patch * C] -> [B, H * patch, W * patch, C]."""
    return einops.rearrange(x_BHWC, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)
