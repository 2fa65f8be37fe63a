"""The encoder-decoder of DALL-E mini and mega: BART over image tokens, with the norms of NormFormer.

An encoder reads the caption in both directions, a decoder reads the image tokens so far and the encoder's states. No
matrix has a bias; a branch's attention is normed before and after, its gated MLP before and within. Facts: the code of
dalle-mini. The same model from a cache, one position at a time, is `seq2seq_decoding.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.errors import check_sizes
from dalle_jax.models.attention.blockwise import MASKED, scale_queries
from dalle_jax.models.layers import Model, check_no_paper, compute_dtype, layer_norm, param
from dalle_jax.models.ops import linear
from dalle_jax.sharding import constrain

MAX_LAYERS = 1 << 16
INIT = 0.02  # dalle-mini's: standard deviation of every matrix and table


@dataclasses.dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes; the defaults are DALL-E mini's.

    mlp: hidden units of the gated MLP. image_vocab: tokens of the image tokenizer, which are the first of `image_ids`
    rows of the image embedding and of the head. start: the row that the decoder reads first. text_pad: the text token
    that nothing attends to.
    """

    encoder_layers: int = 12
    decoder_layers: int = 12
    width: int = 1024
    heads: int = 16
    mlp: int = 2730
    text_len: int = 64
    text_vocab: int = 50_264
    text_pad: int = 1
    grid: int = 16
    image_vocab: int = 16_384
    image_ids: int = 16_385
    start: int = 16_384
    precision: str = "bf16"

    def __post_init__(self):
        check_sizes(self, "width", "heads", "mlp", "text_len", "text_vocab", "grid", "image_vocab", "image_ids")
        check_sizes(self, "encoder_layers", "decoder_layers", max=MAX_LAYERS)
        check_no_paper(self.precision, "seq2seq")
        compute_dtype(self.precision)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.image_vocab > self.image_ids:
            raise ValueError(f"image_vocab must be at most image_ids {self.image_ids}, got {self.image_vocab}")
        for name, ids in (("start", self.image_ids), ("text_pad", self.text_vocab)):
            if not 0 <= getattr(self, name) < ids:
                raise ValueError(f"{name} must be in [0, {ids}), got {getattr(self, name)}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def image_len(self) -> int:
        return self.grid**2


class LayerParam(NamedTuple):
    """axes: logical names of the dimensions. inputs: of a matrix, how many dimensions, the first, its product
    contracts; 0 for a gain or a bias of a norm."""

    axes: tuple[str, ...]
    inputs: int = 0


def _norm(name: str, axis: str) -> dict[str, LayerParam]:
    return {f"{name}_gain": LayerParam((axis,)), f"{name}_bias": LayerParam((axis,))}


_GLU = {
    **_norm("glu_norm", "embed"),
    "gate": LayerParam(("embed", "mlp"), 1),
    "up": LayerParam(("embed", "mlp"), 1),
    **_norm("glu_inner", "mlp"),
    "down": LayerParam(("mlp", "embed"), 1),
}
ENCODER_LAYER = {
    **_norm("self_norm", "embed"),
    "self_qkv": LayerParam(("embed", "qkv", "heads", "head"), 1),
    "self_out": LayerParam(("heads", "head", "embed"), 2),
    **_norm("self_post", "embed"),
    **_GLU,
}
DECODER_LAYER = ENCODER_LAYER | {
    **_norm("cross_norm", "embed"),
    "cross_q": LayerParam(("embed", "heads", "head"), 1),
    "cross_kv": LayerParam(("embed", "qkv", "heads", "head"), 1),  # keys and values
    "cross_out": LayerParam(("heads", "head", "embed"), 2),
    **_norm("cross_post", "embed"),
}


@functools.cache
def model(config: Seq2SeqConfig) -> Model:
    """The encoder-decoder as pure functions, the same one for the same config."""
    return Model(config, functools.partial(Seq2Seq, config))


class Stack(nnx.Module):
    """One stack: its embeddings, the norms around its layers, and the layers, each parameter with a leading [L]."""

    def __init__(self, rngs: nnx.Rngs, config: Seq2SeqConfig, table: Mapping[str, LayerParam], **sizes):
        """sizes: number of layers, ids (of tokens) and positions; ids_axis: logical name of the tokens."""
        width = config.width
        self.embedding = param(rngs, (sizes["ids"], width), axes=(sizes["ids_axis"], "embed"), std=INIT)
        self.position = param(rngs, (sizes["positions"], width), axes=("position", "embed"), std=INIT)
        self.embedding_norm_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
        self.embedding_norm_bias = param(rngs, (width,), axes=("embed",))
        self.final_norm_gain = param(rngs, (width,), axes=("embed",), fill=1.0)
        self.final_norm_bias = param(rngs, (width,), axes=("embed",))
        self.blocks = _Blocks(rngs, config, table, sizes["layers"])

    def read(self, ids_BS, dtype):
        """Tokens -> the normed sum of their embeddings and positions, [B, S, D]."""
        x_BSD = self.embedding[...][ids_BS] + self.position[...][None, : ids_BS.shape[1]]
        x_BSD = layer_norm(x_BSD, self.embedding_norm_gain[...], self.embedding_norm_bias[...])
        return constrain(x_BSD.astype(dtype), ("batch", "sequence", "embed_activation"))

    def finish(self, x_BSD):
        return layer_norm(x_BSD, self.final_norm_gain[...], self.final_norm_bias[...])


class _Blocks(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, config: Seq2SeqConfig, table: Mapping[str, LayerParam], layers: int):
        sizes = {"embed": config.width, "heads": config.heads, "head": config.head_size, "mlp": config.mlp}
        for name, entry in table.items():
            sizes["qkv"] = 2 if name == "cross_kv" else 3
            shape = layers, *(sizes[axis] for axis in entry.axes)
            drawn = {"std": INIT} if entry.inputs else {"fill": float(name.endswith("gain"))}
            setattr(self, name, param(rngs, shape, axes=("layers", *entry.axes), **drawn))

    def cast(self, dtype):
        """All layers' parameters: matrices in `dtype`, norms in float32."""
        arrays = nnx.to_pure_dict(nnx.state(self))
        return {name: a.astype(dtype if DECODER_LAYER[name].inputs else a.dtype) for name, a in arrays.items()}


class Encoder(Stack):
    """The stack that reads captions."""

    def __init__(self, config: Seq2SeqConfig, rngs: nnx.Rngs):
        sizes = {"layers": config.encoder_layers, "ids": config.text_vocab, "positions": config.text_len}
        super().__init__(rngs, config, ENCODER_LAYER, **sizes, ids_axis="vocab")
        self.config = config

    def __call__(self, text_BT):
        """int32 text tokens -> states [B, T, D] in the compute dtype."""
        dtype = compute_dtype(self.config.precision)
        self_attend = functools.partial(_self_attend, seen=(text_BT != self.config.text_pad)[:, None])

        def one(x_BSD, block):
            return layer(block, x_BSD, attends={"self": self_attend}, norm=norm, product=product), None

        x_BTD, _ = jax.lax.scan(one, self.read(text_BT, dtype), self.blocks.cast(dtype))
        return self.finish(x_BTD)


@functools.cache
def encoder(config: Seq2SeqConfig) -> Model:
    """The encoder alone as pure functions, of the parameters under 'encoder'."""
    return Model(config, functools.partial(Encoder, config))


class Seq2Seq(nnx.Module):
    """Encoder, decoder and the image head."""

    def __init__(self, config: Seq2SeqConfig, rngs: nnx.Rngs):
        self.config = config
        image = {"layers": config.decoder_layers, "ids": config.image_ids, "positions": config.image_len}
        self.encoder = Encoder(config, rngs)
        self.decoder = Stack(rngs, config, DECODER_LAYER, **image, ids_axis="image_input")
        self.head = param(rngs, (config.width, config.image_ids), axes=("embed", "vocab"), std=INIT)

    def __call__(self, text_BT, image_BI):
        """Logits of every image token.

        text_BT: int32 text tokens, `text_pad` behind the caption. image_BI: int32 image tokens in raster order.
        Returns: float32 [B, I, image_vocab]; position p predicts image token p and sees no later one.
        """
        config, dtype = self.config, compute_dtype(self.config.precision)
        text_BTD, seen_BT = self.encoder(text_BT), text_BT != config.text_pad
        previous_BI = jnp.pad(image_BI[:, :-1], [(0, 0), (1, 0)], constant_values=config.start)
        positions = jnp.arange(image_BI.shape[1])
        earlier_BIK = (positions[:, None] >= positions[None])[None]

        def one(x_BSD, block):
            def across(block, h):
                k, v = jnp.moveaxis(product(block, "cross_kv", text_BTD), 2, 0)
                return attend(product(block, "cross_q", h), k, v, seen_BT[:, None])

            within = functools.partial(_self_attend, seen=earlier_BIK)
            attends: dict[str, Callable] = {"self": within, "cross": across}
            return layer(block, x_BSD, attends=attends, norm=norm, product=product), None

        x_BID, _ = jax.lax.scan(one, self.decoder.read(previous_BI, dtype), self.decoder.blocks.cast(dtype))
        head = self.head[...][:, : config.image_vocab].astype(dtype)
        return jnp.einsum("bsd,dv->bsv", self.decoder.finish(x_BID), head, preferred_element_type=jnp.float32)


def layer(block, x, *, attends: Mapping[str, Callable], norm: Callable, product: Callable):
    """One layer of either stack.

    attends: 'self' and, in the decoder, 'cross': (block, normed stream) -> what the product with `out` reads. norm,
    product: (block, name, x) -> x, on rows as below or on columns.
    """
    for name, attend_here in attends.items():
        mixed = attend_here(block, norm(block, f"{name}_norm", x))
        x = x + norm(block, f"{name}_post", product(block, f"{name}_out", mixed))
    h = norm(block, "glu_norm", x)
    h = jax.nn.gelu(product(block, "gate", h), approximate=False) * product(block, "up", h)
    return x + product(block, "down", norm(block, "glu_inner", h))


def norm(block, name, x):
    return layer_norm(x, block[f"{name}_gain"], block[f"{name}_bias"])


def product(block, name, x):
    return linear(x, block[name], DECODER_LAYER[name].inputs)


def attend(q_BSNH, k_BKNH, v_BKNH, seen_BSK):
    """Attention of every query to the keys that it may see; seen_BSK: bool. Scores and softmax in float32."""
    scores = jnp.einsum("bsnh,bknh->bnsk", scale_queries(q_BSNH), k_BKNH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen_BSK[:, None], scores, MASKED), axis=-1)
    return jnp.einsum("bnsk,bknh->bsnh", weights.astype(v_BKNH.dtype), v_BKNH)


def _self_attend(block, h, *, seen):
    q, k, v = jnp.moveaxis(product(block, "self_qkv", h), 2, 0)
    return attend(q, k, v, seen)
