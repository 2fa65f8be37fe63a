"""PatchGAN, which tells real pictures from reconstructions patch by patch (Isola et al. 2017, in taming's form).

Convolutions of 4 x 4 with zeros of width 1 around, the first `layers` of them with stride 2, leaky ReLUs of slope 0.2,
and a norm behind all but the first and the last. It serves the training of an image tokenizer alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.errors import check_sizes
from dalle_jax.models.layers import Model, check_no_paper, compute_dtype, param
from dalle_jax.models.ops import plain_conv
from dalle_jax.sharding import constrain

KERNEL, PADDING = 4, 1
SLOPE = 0.2  # of the leaky ReLUs for negative values
STD = 0.02  # of the initial weights, and of the norms' gains around 1 (DCGAN, Radford et al. 2015)
EPSILON = 1e-5  # of the norms
MAX_MULTIPLE = 8  # channels double until they are so many times `width`
GROUPS = 32  # of the group norm (Wu & He 2018)
NORMS = ("batch", "group")
MAX_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are taming's (and pix2pix's, whose patches have 70 x 70 pixels).

    width: channels behind the first convolution. layers: convolutions of stride 2. norm: 'batch', whose statistics are
    always those of the batch at hand, over all devices, so that a picture's logits depend on its neighbors and there
    are no running averages; or 'group', within each picture, for batches of one. precision: see `layers.compute_dtype`.
    """

    width: int = 64
    layers: int = 3
    norm: str = "batch"
    precision: str = "fp32"

    def __post_init__(self):
        check_sizes(self, "width")
        check_sizes(self, "layers", max=MAX_LAYERS)
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if self.norm == "group" and self.width * 2 % GROUPS:
            raise ValueError(f"width must be a multiple of {GROUPS // 2} with norm 'group', got {self.width}")
        compute_dtype(self.precision)
        check_no_paper(self.precision, "discriminator")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every convolution's result."""
        multiples = (min(2**layer, MAX_MULTIPLE) for layer in range(self.layers + 1))
        return (*(self.width * multiple for multiple in multiples), 1)

    def positions(self, side: int) -> int:
        """Logits per side of a picture with so many pixels per side; below 1, it is too small."""
        for layer in range(self.layers + 2):
            side = (side + 2 * PADDING - KERNEL) // self.stride(layer) + 1
        return side

    def stride(self, layer: int) -> int:
        """The stride of the convolution of this index, 0 .. layers + 1."""
        return 2 if layer < self.layers else 1


@functools.cache
def model(config: DiscriminatorConfig) -> Model:
    """The discriminator as pure functions, the same one for the same config."""
    return Model(config, lambda rngs: Discriminator(config, rngs))


class Discriminator(nnx.Module):
    """Parameters: {'conv_0': {'weight', 'bias'}, 'conv_1': {'weight'}, 'norm_1': {'gain', 'bias'}, ...}."""

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        self.last = config.layers + 1
        dtype = compute_dtype(config.precision)
        for layer, channels in enumerate(zip((3, *config.channels), config.channels, strict=False)):
            between = 0 < layer < self.last  # a norm's bias follows there, so that the convolution needs none
            conv = Conv(channels, rngs, stride=config.stride(layer), biased=not between, dtype=dtype)
            setattr(self, f"conv_{layer}", conv)
            if between:
                setattr(self, f"norm_{layer}", Norm(channels[1], rngs, batch=config.norm == "batch"))

    def __call__(self, x_BHWC):
        """Pictures [B, H, W, 3] in [-1, 1] -> float32 logits [B, R, C], high where a patch looks real."""
        for layer in range(self.last):
            x_BHWC = getattr(self, f"conv_{layer}")(x_BHWC)
            if layer:
                x_BHWC = getattr(self, f"norm_{layer}")(x_BHWC)
            x_BHWC = constrain(jax.nn.leaky_relu(x_BHWC, SLOPE), ("batch", None, None, None))
        return getattr(self, f"conv_{self.last}")(x_BHWC)[..., 0].astype(jnp.float32)


class Conv(nnx.Module):
    """A convolution; its bias, if it has one, begins uniform within fan-in^-0.5 of zero, as PyTorch's does."""

    def __init__(self, channels: tuple[int, int], rngs, *, stride: int, biased: bool, dtype):
        self.weight = param(rngs, (KERNEL, KERNEL, *channels), axes=(None, None, "in", "out"), std=STD)
        bound = (KERNEL * KERNEL * channels[0]) ** -0.5
        self.bias = param(rngs, channels[1:], axes=("out",), bound=bound) if biased else None
        self.stride, self.dtype = stride, dtype
        self.precision = jax.lax.Precision.HIGH if dtype == jnp.float32 else None  # TF32 as PyTorch's convolutions

    def __call__(self, x_BHWC):
        # Gathered before use, see `convolutions.Conv`.
        weight = constrain(self.weight[...].astype(self.dtype), (None,) * 4)
        padding = ((PADDING, PADDING),) * 2
        y_BHWC = plain_conv(x_BHWC.astype(self.dtype), weight, self.precision, stride=self.stride, padding=padding)
        return y_BHWC if self.bias is None else y_BHWC + self.bias[...].astype(self.dtype)[None, None, None]


class Norm(nnx.Module):
    """Zero mean and unit variance of each channel over the batch, or of each group of channels in each picture."""

    def __init__(self, channels: int, rngs, *, batch: bool):
        self.gain = param(rngs, (channels,), axes=("out",), fill=1.0, std=STD)
        self.bias = param(rngs, (channels,), axes=("out",))
        self.batch = batch

    def __call__(self, x_BHWC):
        x32_BHWC = x_BHWC.astype(jnp.float32)
        B, H, W, C = x_BHWC.shape
        over = (0, 1, 2) if self.batch else (1, 2, 4)
        grouped = x32_BHWC if self.batch else x32_BHWC.reshape(B, H, W, GROUPS, C // GROUPS)
        centered = grouped - grouped.mean(over, keepdims=True)
        variance = jnp.square(centered).mean(over, keepdims=True)
        normal_BHWC = (centered * jax.lax.rsqrt(variance + EPSILON)).reshape(B, H, W, C)
        gain, bias = (vector[...][None, None, None] for vector in (self.gain, self.bias))
        return (normal_BHWC * gain + bias).astype(x_BHWC.dtype)
