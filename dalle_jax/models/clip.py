"""CLIP, the reranker (Radford et al. 2021): a vision transformer and a causal text transformer that meet in one space.

Both towers are made of `blocks.py`; each ends in a linear projection and unit length, so that the dot product of an
image's and a caption's vector is their cosine. Sizes, initial values and the normalization of pixels are the released
models'. No loss, no tokenizer, no I/O.
"""

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax import pixels
from dalle_jax.errors import check_sizes
from dalle_jax.layout import CaptionLayout
from dalle_jax.models.attention import blockwise
from dalle_jax.models.blocks import Blocks, check_remat, scan_layers
from dalle_jax.models.layers import (
    Model,
    Params,
    check_no_paper,
    compute_dtype,
    layer_norm,
    param,
)
from dalle_jax.sharding import constrain

INITIAL_LOG_SCALE = math.log(1 / 0.07)  # section 2.5, as is the limit
MAX_LOG_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes and ways of computing; the defaults are the released ViT-B/32.

    embed: length of the shared vectors. image_size, patch: pixels per side. text_vocab: entries of the BPE vocabulary
    without start and end marks. mean, std: of the pixels in [0, 1], by channel; what the image tower reads is
    (pixel - mean) / std. remat: a step of `blocks.REMAT`. scan: run the layers as a scan. precision: 'fp32',
    'bf16' or 'fp16-global'.
    """

    embed: int = 512
    image_size: int = 224
    patch: int = 32
    image_layers: int = 12
    image_width: int = 768
    image_heads: int = 12
    text_len: int = 77
    text_vocab: int = 49_406
    text_layers: int = 12
    text_width: int = 512
    text_heads: int = 8
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    remat: str = "none"
    scan: bool = True
    precision: str = "fp32"

    def __post_init__(self):
        for name in ("mean", "std"):  # json gives lists
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std above 0, got {self.mean} and {self.std}")
        check_sizes(self, *(field.name for field in dataclasses.fields(self) if field.type is int))
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch = {self.patch}, got {self.image_size}")
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width must be a multiple of {tower}_heads = {heads}, got {width}")
        check_remat(self.remat)
        compute_dtype(self.precision)
        check_no_paper(self.precision, "CLIP")
        _ = self.layout

    @functools.cached_property
    def layout(self) -> CaptionLayout:
        return CaptionLayout(self.text_len, self.text_vocab)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch


@functools.cache
def model(config: CLIPConfig) -> Model:
    """CLIP as pure functions, the same one for the same config; methods `__call__`, `encode_image`, `encode_text`."""
    return Model(config, functools.partial(CLIP, config))


def encode_images(model: Model, params: Params, image_uint8):
    """uint8 [B, H, W, 3] of the model's `image_size` -> unit vectors float32 [B, E]."""
    return model.apply(params, normalize(image_uint8, model.config), method="encode_image")


def encode_captions(model: Model, params: Params, text_BT):
    """int32 of `CaptionLayout.caption_ids` -> unit vectors float32 [B, E]."""
    return model.apply(params, text_BT, method="encode_text")


def normalize(image_uint8, config: CLIPConfig):
    """uint8 [..., 3] -> float32, what the image tower reads."""
    mean, std = (jax.lax.broadcast_to_rank(jnp.array(c), image_uint8.ndim) for c in (config.mean, config.std))
    return (pixels.to_unit(image_uint8) - mean) / std


class CLIP(nnx.Module):
    """Parameters: {'image': ..., 'text': ..., 'log_scale': [1]}."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = ImageTower(config, rngs)
        self.text = TextTower(config, rngs)
        self.log_scale = param(rngs, (1,), axes=(None,), fill=INITIAL_LOG_SCALE)

    def __call__(self, pixel_BHWC, text_BT):
        """Unit vectors of images and captions, float32 [B, E] each, and the scale of their cosines, at most 100."""
        scale = jnp.exp(at_most(self.log_scale[...][0], MAX_LOG_SCALE))
        return self.encode_image(pixel_BHWC), self.encode_text(text_BT), scale

    def encode_image(self, pixel_BHWC):
        """Normalized pixels (`normalize`) of the config's image_size -> unit vectors float32 [B, E]."""
        return _unit(self.image(pixel_BHWC))

    def encode_text(self, text_BT):
        """int32 of `CaptionLayout.caption_ids` -> unit vectors float32 [B, E]; nothing after the end mark counts."""
        return _unit(self.text(text_BT))


class ImageTower(nnx.Module):
    """Patches and a class token through a transformer; the class token's last state, normed and projected."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        width, inputs, std = config.image_width, 3 * config.patch**2, config.image_width**-0.5
        self.patch = param(rngs, (inputs, width), axes=("in", "embed"), bound=inputs**-0.5)  # PyTorch's default
        self.class_embedding = param(rngs, (1, width), axes=("position", "embed"), std=std)
        self.position = param(rngs, (config.grid**2 + 1, width), axes=("position", "embed"), std=std)
        self.norm_before_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
        self.norm_before_bias = param(rngs, (width,), axes=("embed",))
        self.blocks = Blocks(
            rngs,
            layers=config.image_layers,
            width=width,
            heads=config.image_heads,
            head_size=width // config.image_heads,
            bound=_pytorch_bounds(width),
        )
        self.norm_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
        self.norm_bias = param(rngs, (width,), axes=("embed",))
        self.projection = param(rngs, (width, config.embed), axes=("embed", "out"), std=std)

    def __call__(self, pixel_BHWC):
        config, dtype = self.config, compute_dtype(self.config.precision)
        patch_BSF = einops.rearrange(
            pixel_BHWC, "b (y h) (x w) c -> b (y x) (h w c)", h=config.patch, w=config.patch
        ).astype(dtype)
        x_BSD = patch_BSF @ self.patch[...].astype(dtype)
        first_B1D = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (len(x_BSD), 1, x_BSD.shape[-1]))
        x_BSD = jnp.concatenate([first_B1D, x_BSD], axis=1) + self.position[...].astype(dtype)[None]
        x_BSD = constrain(x_BSD, ("batch", "sequence", "embed_activation"))
        x_BSD = layer_norm(x_BSD, self.norm_before_gain[...], self.norm_before_bias[...])
        x_BSD = _run(self.blocks, x_BSD, blockwise.attend_all, config)
        x_BD = layer_norm(x_BSD[:, 0], self.norm_gain[...], self.norm_bias[...])
        return _project(x_BD, self.projection)


class TextTower(nnx.Module):
    """Tokens through a causal transformer; the state at the end mark, normed and projected."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        layout, width = config.layout, config.text_width
        self.embedding = param(rngs, (layout.text_ids, width), axes=("vocab", "embed"), std=0.02)
        self.position = param(rngs, (layout.text_len, width), axes=("position", "embed"), std=0.01)
        out = (2 * width * config.text_layers) ** -0.5
        self.blocks = Blocks(
            rngs,
            layers=config.text_layers,
            width=width,
            heads=config.text_heads,
            head_size=width // config.text_heads,
            std={"qkv": width**-0.5, "out": out, "up": (2 * width) ** -0.5, "down": out},
        )
        self.norm_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
        self.norm_bias = param(rngs, (width,), axes=("embed",))
        self.projection = param(rngs, (width, config.embed), axes=("embed", "out"), std=width**-0.5)

    def __call__(self, text_BT):
        config, dtype = self.config, compute_dtype(self.config.precision)
        x_BTD = constrain(self.embedding[...], ("vocab", "embed_activation"))[text_BT] + self.position[...][None]
        x_BTD = constrain(x_BTD.astype(dtype), ("batch", "sequence", "embed_activation"))
        x_BTD = _run(self.blocks, x_BTD, blockwise.attend_text, config)
        end_B = jnp.argmax(text_BT == config.layout.end_of_text, axis=1)
        x_BD = jnp.take_along_axis(x_BTD, end_B[:, None, None], axis=1)[:, 0]
        return _project(layer_norm(x_BD, self.norm_gain[...], self.norm_bias[...]), self.projection)


def _pytorch_bounds(width: int) -> dict[str, float]:
    """The bounds of uniform initial values, PyTorch's default for `nn.MultiheadAttention` and `nn.Linear`.

    The released code sets those of the text tower alone.
    """
    by_width, by_hidden = width**-0.5, (4 * width) ** -0.5
    bounds = {"qkv": (6 / (4 * width)) ** 0.5, "out": by_width, "up": by_width, "up_bias": by_width}
    return bounds | {"down": by_hidden, "down_bias": by_hidden}


def _run(blocks: Blocks, x_BSD, attend, config: CLIPConfig):
    """All layers of a tower, as a scan or unrolled."""
    stacked = blocks.cast(x_BSD.dtype)
    layers = len(stacked["qkv"])
    length = layers if config.scan else 0
    return scan_layers(stacked, x_BSD, attends=[attend] * layers, remat=config.remat, scan_length=length)


def _project(x_BD, projection):
    return jnp.einsum("bd,de->be", x_BD, projection[...].astype(x_BD.dtype), preferred_element_type=jnp.float32)


def _unit(x_BE):
    return x_BE * jax.lax.rsqrt(jnp.square(x_BE).sum(-1, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x, limit: float):
    """min(x, limit), whose gradient beyond the limit is kept where descending it leads back below, and else dropped."""
    return jnp.minimum(x, limit)


def _at_most_forward(x, limit):
    return at_most(x, limit), x


def _at_most_backward(limit, x, cotangent):
    return (jnp.where((x < limit) | (cotangent > 0), cotangent, 0.0),)


at_most.defvjp(_at_most_forward, _at_most_backward)
