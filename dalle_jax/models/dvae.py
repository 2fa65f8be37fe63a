"""The discrete VAE's two networks (Ramesh et al. 2021, section 2.1, appendix A.1, and the released code).

Convolutional ResNets without normalization: `encode` gives logits over the codebook at each grid position, `decode`
gives the parameters of a pixel distribution. Knows nothing of noise, likelihoods or schedules.

Branches add a hundredth to the stream at first, and the likelihood tells mu apart to a thousandth: less than bfloat16's
8 bits do. So with precision 'bf16' only the branches are bfloat16. What every value passes, the first and last
convolutions, the skips and the stream, is float32, its products of TF32 or of three bfloat16 parts (`Precision.HIGH`),
which round like the float16 of the paper or less.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax import pixels
from dalle_jax.errors import check_sizes
from dalle_jax.models.convolutions import Conv, fold, unfold
from dalle_jax.models.layers import Model, Params, check_no_paper, compute_dtype
from dalle_jax.sharding import constrain

OUTPUTS = 6  # per pixel: three means, then three log scales (appendix A.3)
MAX_GROUPS, MAX_NORM = 16, 1_000_000


@dataclasses.dataclass(frozen=True)
class DVAEConfig:
    """Sizes of the networks. The defaults are the paper's; everything after `precision` is not in the paper.

    image_size: pixels per side. vocab: entries of the codebook. width: channels of the encoder's first group,
    doubled in each later group. stem: channels after the decoder's first convolution, in effect the size of an image
    token's embedding. stem_kernel: size of the encoder's first convolution. precision: 'fp32', 'bf16' (of the branches)
    or 'fp16-global', see `layers.compute_dtype`.

    patch: pixels per side that are folded into channels before the first and unfolded after the last convolution, so
    that a small model works on few positions; 1 is the paper's network. logits_norm: root mean square that the features
    before the logits are scaled to at every position, in effect how sure an untrained encoder is; 0 leaves them alone.
    """

    image_size: int = 256
    vocab: int = 8_192
    width: int = 256
    groups: int = 4
    blocks_per_group: int = 2
    stem: int = 128
    stem_kernel: int = 7
    precision: str = "fp32"
    patch: int = 1
    logits_norm: float = 0.0

    def __post_init__(self):
        check_sizes(self, "image_size", "vocab", "blocks_per_group", "stem", "stem_kernel", "patch")
        check_sizes(self, "width", min=4)
        check_sizes(self, "groups", max=MAX_GROUPS)
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (the bottleneck is a quarter), got {self.width}")
        if self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel must be odd, got {self.stem_kernel}")
        if self.image_size % self.stride:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch * 2^(groups-1) = {self.stride}")
        if not 0 <= self.logits_norm <= MAX_NORM:
            raise ValueError(f"logits_norm must be a number of at least 0, at most {MAX_NORM}, got {self.logits_norm}")
        compute_dtype(self.precision)
        check_no_paper(self.precision, "dVAE")

    @property
    def stride(self) -> int:
        """Pixels per grid position and side."""
        return self.patch * 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Grid positions per side."""
        return self.image_size // self.stride

    @property
    def post_gain(self) -> float:
        """Factor of every residual branch, 1 / layers^2 (appendix A.1)."""
        return 1.0 / (self.groups * self.blocks_per_group) ** 2


@functools.cache
def model(config: DVAEConfig) -> Model:
    """The dVAE as pure functions, the same one for the same config; methods `encode`, `decode`, `decode_tokens`."""
    return Model(config, lambda rngs: DVAE(config, rngs))


def encode_images(model: Model, params: Params, image_uint8):
    """uint8 [B, H, W, 3] -> the most likely image tokens int32 [B, R, C]; no noise (footnote 6)."""
    logits_BRCV = model.apply(params, pixels.to_laplace(pixels.to_unit(image_uint8)), method="encode")
    return jnp.argmax(logits_BRCV, axis=-1).astype(jnp.int32)


def decode_images(model: Model, params: Params, tokens_BRC):
    """Image tokens [B, R, C] -> uint8 [B, H, W, 3]."""
    return pixels.to_uint8(to_unit(model.apply(params, tokens_BRC, method="decode_tokens")))


def to_unit(pixel_BHWC):
    """Decoder output [B, H, W, 6] -> means in [0, 1], [B, H, W, 3]; the scale is ignored (appendix A.3)."""
    return pixels.from_laplace(jax.nn.sigmoid(pixel_BHWC[..., :3]))


class DVAE(nnx.Module):
    """Encoder and decoder. Parameters: {'encoder': ..., 'decoder': ...}.

    Heights H and widths W are any multiples of the stride; there are R = H / stride rows of C = W / stride positions.
    """

    def __init__(self, config: DVAEConfig, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)

    def encode(self, x_BHWC):
        """Images in the logit-Laplace range [B, H, W, 3] -> float32 logits over the codebook [B, R, C, V]."""
        return self.encoder(x_BHWC)

    def decode(self, z_BRCV):
        """Image tokens as distributions (one-hot or relaxed) [B, R, C, V] -> float32 [B, H, W, 6]: mu, then ln b."""
        return self.decoder.pixels(self.decoder.stem(z_BRCV))

    def decode_tokens(self, tokens_BRC):
        """`decode` of the one-hot vectors of image tokens, by table look-up."""
        return self.decoder.pixels(self.decoder.stem.look_up(tokens_BRC))


class Block(nnx.Module):
    """skip(x) + post_gain * four convolutions through a bottleneck of a quarter of the output channels."""

    def __init__(self, kernels: tuple[int, int, int, int], channels: tuple[int, int], config: DVAEConfig, rngs):
        before, after = channels
        dtype = compute_dtype(config.precision)
        hidden = after // 4
        widths = (before, hidden, hidden, hidden, after)
        self.conv_1 = Conv(kernels[0], widths[0:2], rngs, dtype=dtype)
        self.conv_2 = Conv(kernels[1], widths[1:3], rngs, dtype=dtype)
        self.conv_3 = Conv(kernels[2], widths[2:4], rngs, dtype=dtype)
        self.conv_4 = Conv(kernels[3], widths[3:5], rngs, dtype=dtype)
        self.skip = Conv(1, channels, rngs, **_trunk(config)) if before != after else None
        self.gain = config.post_gain

    def __call__(self, x_BHWC):
        y_BHWC = x_BHWC
        for conv in (self.conv_1, self.conv_2, self.conv_3, self.conv_4):
            y_BHWC = conv(jax.nn.relu(y_BHWC))
        x_BHWC = x_BHWC if self.skip is None else self.skip(x_BHWC)
        return x_BHWC + self.gain * y_BHWC.astype(x_BHWC.dtype)


class Tower(nnx.Module):
    """Groups of blocks with a change of resolution after every group but the last."""

    def __init__(self, widths: tuple[int, ...], kernels, resize, config: DVAEConfig, rngs):
        # widths[0] channels come in, group g gives widths[g + 1]
        self.resize = resize
        self.shape = (config.groups, config.blocks_per_group)
        for group in range(config.groups):
            for block in range(config.blocks_per_group):
                channels = (widths[group] if block == 0 else widths[group + 1], widths[group + 1])
                setattr(self, _block_name(group, block), Block(kernels, channels, config, rngs))

    def __call__(self, x_BHWC):
        groups, blocks = self.shape
        for group in range(groups):
            for block in range(blocks):
                x_BHWC = getattr(self, _block_name(group, block))(x_BHWC)
                x_BHWC = constrain(x_BHWC, ("batch", None, None, None))
            if group < groups - 1:
                x_BHWC = self.resize(x_BHWC)
        return x_BHWC


class Encoder(nnx.Module):
    def __init__(self, config: DVAEConfig, rngs: nnx.Rngs):
        widths = tuple(config.width * 2**group for group in range(config.groups))
        self.config = config
        self.stem = Conv(config.stem_kernel, (3 * config.patch**2, config.width), rngs, **_trunk(config))
        self.tower = Tower((config.width, *widths), (3, 3, 3, 1), _max_pool, config, rngs)
        self.head = Conv(1, (widths[-1], config.vocab), rngs, axes=("in", "vocab"))

    def __call__(self, x_BHWC):
        x_BRCD = self.tower(self.stem(fold(x_BHWC, self.config.patch)))
        x_BRCD = jax.nn.relu(x_BRCD).astype(jnp.float32)
        if self.config.logits_norm:
            mean_square = jnp.square(x_BRCD).mean(-1, keepdims=True)
            x_BRCD = x_BRCD * self.config.logits_norm * jax.lax.rsqrt(mean_square + 1e-6)
        return self.head(x_BRCD)


class Decoder(nnx.Module):
    def __init__(self, config: DVAEConfig, rngs: nnx.Rngs):
        widths = tuple(config.width * 2**group for group in reversed(range(config.groups)))
        self.config = config
        self.stem = Conv(1, (config.vocab, config.stem), rngs, axes=("vocab", "embed"))
        self.tower = Tower((config.stem, *widths), (1, 3, 3, 3), _double, config, rngs)
        self.head = Conv(1, (config.width, OUTPUTS * config.patch**2), rngs, **_trunk(config))

    def pixels(self, x_BRCD):
        x_BHWC = self.head(jax.nn.relu(self.tower(x_BRCD.astype(_trunk(self.config)["dtype"]))))
        return unfold(x_BHWC, self.config.patch).astype(jnp.float32)


def _trunk(config: DVAEConfig) -> dict[str, Any]:
    """Arguments of the convolutions that every value passes, and the dtype of the stream between them."""
    if config.precision == "bf16":
        return {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGH}
    return {"dtype": compute_dtype(config.precision)}


def _block_name(group: int, block: int) -> str:
    return f"group_{group + 1}_block_{block + 1}"


def _max_pool(x_BHWC):
    B, H, W, C = x_BHWC.shape
    return x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C).max((2, 4))


def _double(x_BHWC):
    """Nearest-neighbour upsampling by 2."""
    B, H, W, C = x_BHWC.shape
    tiled = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (B, H, 2, W, 2, C))
    return tiled.reshape(B, 2 * H, 2 * W, C)
