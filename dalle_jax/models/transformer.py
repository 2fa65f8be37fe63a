"""The second stage: a decoder-only sparse transformer over text and image tokens.

Pre-activation blocks as in Child et al. 2019, whose configuration the paper inherits (section 2.2, appendix B.1): norm
before attention and before the MLP, approximate GELU, zero-initialised output heads. Parameters of all layers are
stacked; layers run as a scan over the pattern's period or as a plain loop. No loss, no sampling, no I/O; the same model
from a cache, one position at a time, is `decoding.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dalle_jax import attention_pattern
from dalle_jax.errors import check_sizes
from dalle_jax.layout import Layout
from dalle_jax.models.attention import kernels
from dalle_jax.models.blocks import Blocks, check_remat, scan_layers
from dalle_jax.models.families import FAMILIES, Family
from dalle_jax.models.layers import Model, compute_dtype, keeps_stream, layer_norm, param, stream_dtype
from dalle_jax.sharding import constrain

MAX_LAYERS = 1 << 16
INIT = 0.125  # Child et al. 2019: standard deviation 0.125 / sqrt(fan in)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and ways of computing; the defaults are the paper's 12-billion-parameter model.

    text_pad: see `Layout.pad`. family: what it computes otherwise than DALL-E, one of `families.FAMILIES`. pattern: one
    of `attention_pattern.PATTERNS`, as 'paper' (row, column, row, row ..., conv last) or 'full'. remat: a step of the
    ladder `blocks.REMAT` (see `run_layers`), 'full' as in the paper. scan: run the layers as a scan over the pattern's
    period (compile time independent of depth). precision: one of `layers.PRECISIONS`. attention: what computes it, one
    of `kernels.ATTENTION`.
    """

    num_layers: int = 64
    width: int = 3968
    heads: int = 62
    head_size: int = 64
    text_len: int = 256
    text_vocab: int = 16_384
    grid: int = 32
    image_vocab: int = 8_192
    text_pad: int | None = None
    family: str = "dalle"
    pattern: str = "paper"
    remat: str = "full"
    scan: bool = True
    precision: str = "bf16"
    attention: str = "xla"

    def __post_init__(self):
        check_sizes(self, "width", "heads", "head_size")
        check_sizes(self, "num_layers", max=MAX_LAYERS)
        check_remat(self.remat)
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {tuple(FAMILIES)}, got {self.family!r}")
        compute_dtype(self.precision)
        kernels.check_shapes(self.attention, length=self.layout.length, head_size=self.head_size)
        _ = self.kinds

    @functools.cached_property
    def layout(self) -> Layout:
        sizes = self.text_len, self.text_vocab, self.grid, self.image_vocab
        return Layout(*sizes, first=self.traits.first, marks=self.traits.marks, pad=self.text_pad)

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        return attention_pattern.layer_kinds(self.num_layers, self.pattern)

    @property
    def period(self) -> int:
        """Layers after which the pattern repeats itself."""
        return 1 if self.pattern == "full" else len(attention_pattern.PERIOD)

    @property
    def scan_length(self) -> int:
        """Steps of the scan over layers, each a period of them; the rest is unrolled."""
        return (self.num_layers - (self.pattern != "full")) // self.period if self.scan else 0


@functools.cache
def model(config: TransformerConfig) -> Model:
    """The transformer as pure functions, the same one for the same config."""
    return Model(config, functools.partial(Transformer, config))


class Transformer(nnx.Module):
    """Embeddings, blocks and the two output heads."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        layout, traits, width = config.layout, config.traits, config.width
        token, text_position = INIT * width**-0.5, INIT * width**-0.5
        image_position = INIT * (2 * width) ** -0.5  # two embeddings are added, Child et al. 2019
        self.text_embedding = param(rngs, (layout.text_ids, width), axes=("vocab", "embed"), std=token)
        self.text_position = param(rngs, (layout.text_slots, width), axes=("position", "embed"), std=text_position)
        self.image_embedding = param(rngs, (layout.image_ids, width), axes=("image_input", "embed"), std=token)
        for name in position_tables(config):
            rows = layout.grid if traits.grid_positions else layout.image_len
            setattr(self, name, param(rngs, (rows, width), axes=("position", "embed"), std=image_position))
        self.blocks = Blocks(
            rngs,
            layers=config.num_layers,
            width=width,
            heads=config.heads,
            head_size=config.head_size,
            sandwich=traits.sandwich,
            std=_init_std(config),
        )
        self.norm_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
        self.norm_bias = param(rngs, (width,), axes=("embed",))
        self.text_head = param(rngs, (width, layout.text_ids), axes=("embed", "vocab"))
        self.image_head = param(rngs, (width, layout.image_vocab), axes=("embed", "vocab"))
        if traits.head_norm:
            self.head_norm_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
            self.head_norm_bias = param(rngs, (width,), axes=("embed",))
            self.text_head_bias = param(rngs, (layout.text_ids,), axes=("vocab",))
            self.image_head_bias = param(rngs, (layout.image_vocab,), axes=("vocab",))

    def __call__(self, text_BT, image_BI, scales=None):
        """Logits of every prediction.

        text_BT: int32 of `Layout.caption_ids`. image_BI: int32 image tokens in raster order. scales: float32 [L, 2] of
          the residual branches' gradients, for 'fp16-paper' alone; nothing that is computed forward needs them.
        Returns: float32 text logits [B, T, text_ids], where position p predicts what position p + 1 reads, and float32
        image logits [B, I, image_vocab], where position p predicts image token p. No position sees a later token.
        """
        return self.logits(self.states(text_BT, image_BI, scales))

    def states(self, text_BT, image_BI, scales=None):
        """The vectors that the heads read, [B, T + I, D]; arguments as those of a call."""
        config, dtype, stream = self.config, compute_dtype(self.config.precision), stream_dtype(self.config.precision)
        x_BSD = jnp.concatenate([self._embed_text(text_BT), self._embed_image(image_BI)], axis=1).astype(stream)
        x_BSD = constrain(x_BSD, ("batch", "sequence", "embed_activation"))
        x_BSD = run_layers(self.blocks.cast(dtype, vectors=stream, scales=scales), x_BSD, config)
        x_BSD = layer_norm(x_BSD, self.norm_gain[...], self.norm_bias[...])
        if config.traits.head_norm:
            x_BSD = layer_norm(x_BSD, self.head_norm_gain[...], self.head_norm_bias[...])
        return x_BSD

    def logits(self, x_BSD):
        """`states` [B, S, D] -> float32 [B, T, text_ids] and [B, I, image_vocab]."""
        # Where the paper asks for float32 logits, an accelerator must not round the factors to bfloat16 or TF32.
        exact = jax.lax.Precision.HIGHEST if keeps_stream(self.config.precision) else None
        layout = self.config.layout
        first = layout.text_len - (layout.first == "none")  # the position that predicts image token 0
        text_BTD, image_BID = x_BSD[:, : layout.text_len], x_BSD[:, first : first + layout.image_len]
        text, image = (
            jnp.einsum("bsd,dv->bsv", x, head[...].astype(x.dtype), preferred_element_type=jnp.float32, precision=exact)
            for x, head in ((text_BTD, self.text_head), (image_BID, self.image_head))
        )
        if self.config.traits.head_norm:
            text, image = text + self.text_head_bias[...][None, None], image + self.image_head_bias[...][None, None]
        return text, image

    def _embed_text(self, text_BT):
        return _look_up(self.text_embedding, text_BT, "vocab") + self.text_position[...][None]

    def _embed_image(self, image_BI):
        """Image positions, without the first where it reads a text id."""
        layout = self.config.layout
        tables = {name: getattr(self, name)[...] for name in position_tables(self.config)}
        position_ID = image_position(tables, np.arange(layout.image_len), grid=layout.grid)
        if layout.first == "start":
            image_BI = jnp.pad(image_BI[:, :-1], [(0, 0), (1, 0)], constant_values=layout.start_of_image)
        elif layout.first == "text":
            image_BI, position_ID = image_BI[:, :-1], position_ID[:-1]
        return _look_up(self.image_embedding, image_BI, "image_input") + position_ID[None]


def position_tables(config: TransformerConfig) -> tuple[str, ...]:
    """Names of the parameters that say where in an image a position is."""
    return ("row_position", "column_position") if config.traits.grid_positions else ("image_position",)


def image_position(tables, index, *, grid: int):
    """Vectors [..., D] of image positions, int32 [...] in raster order, from the parameters of `position_tables`."""
    if "image_position" in tables:
        return tables["image_position"][index]
    return tables["row_position"][index // grid] + tables["column_position"][index % grid]


def _init_std(config: TransformerConfig) -> dict[str, float]:
    width, residual = config.width, (2 * config.num_layers) ** -0.5  # of the branches' last matrices, Child et al. 2019
    return {
        "qkv": INIT * width**-0.5,
        "out": INIT * (config.heads * config.head_size) ** -0.5 * residual,
        "up": INIT * width**-0.5,
        "down": INIT * (4 * width) ** -0.5 * residual,
    }


def _look_up(table, ids_BS, rows: str):
    """Rows of a table, whose width is gathered first: the mesh axis that cuts it cuts the batch of the result."""
    x_BSD = constrain(table[...], (rows, "embed_activation"))[ids_BS]
    return constrain(x_BSD, ("batch", "sequence", "embed_activation"))


def run_layers(stacked, x_BSD, config: TransformerConfig):
    """All layers over a whole sequence, as a scan over groups of one period with the rest unrolled, or unrolled.

    What a row layer keeps of each token for the backward pass, in units of the width in bfloat16 (7.9 kB at 12b), and
    what the backward pass computes again, by `config.remat`:

        none          56   nothing again; attention's scores are a third of it (a column layer 52, the convolution 82)
        attention     34   scores and softmax again
        dots           9   everything but the products with qkv and up: norms, activations, attention, out
        full           2   both residual blocks again from their inputs, as in the paper: a third more computing

    A fused kernel (`config.attention`) keeps no scores: 'none' is 35 with it, and computes no kernel twice.
    """
    attend = functools.partial(kernels.attend(config.attention), text_len=config.text_len, grid=config.grid)
    attends = [functools.partial(attend, kind=kind) for kind in config.kinds]
    sizes = {"period": config.period, "scan_length": config.scan_length}
    activation = config.traits.activation
    return scan_layers(stacked, x_BSD, attends=attends, remat=config.remat, activation=activation, **sizes)
