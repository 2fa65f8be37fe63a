"""The encoder-decoder one image position at a time, from a cache: what sampling runs.

The same `seq2seq.layer` as for whole sequences, on columns [D, B] of which each is an image, by matrices [outputs,
inputs], so that no product transposes a weight. The encoder runs once per caption, and its keys and values for the
decoder are stored once per caption, read by all its candidates.
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp

from dalle_jax.models.attention import cached
from dalle_jax.models.attention.blockwise import MASKED, scale_queries
from dalle_jax.models.layers import EPSILON, Params, compute_dtype
from dalle_jax.models.seq2seq import DECODER_LAYER, Seq2SeqConfig, encoder, layer
from dalle_jax.sharding import constrain


def layer_weights(config: Seq2SeqConfig, block: Params) -> dict[str, Any]:
    """One decoder layer's parameters (without the layer dimension, float32) as `prefill` and `decode` read them."""
    stored = {}
    for name, array in block.items():
        if inputs := DECODER_LAYER[name].inputs:
            array = jnp.moveaxis(array, range(inputs), range(-inputs, 0))
            array = array.reshape(*array.shape[:-inputs], -1).astype(compute_dtype(config.precision))
        stored[name] = array
    return stored


def end_weights(config: Seq2SeqConfig, params: Params) -> dict[str, Any]:
    """The weights before and after the decoder's layers, the image head [V, D], and the encoder."""
    head = params["head"][:, : config.image_vocab].T.astype(compute_dtype(config.precision))
    decoder = {name: array for name, array in params["decoder"].items() if name != "blocks"}
    return decoder | {"head": head, "encoder": params["encoder"]}


def prefill(config: Seq2SeqConfig, layers, ends, text_PT):
    """The captions as the decoder reads them, once each: a list, one {'k', 'v', 'seen'} a layer.

    Keys and values are [P, N, T, H]; seen: bool [P, T], where the caption is.
    """
    text_PTD = encoder(config).apply(ends["encoder"], text_PT)
    seen_PT = text_PT != config.text_pad

    def store(block):
        kv = jnp.einsum("anhd,ptd->apnth", block["cross_kv"], text_PTD)
        return {"k": kv[0], "v": kv[1], "seen": seen_PT}

    return [store(block) for block in layers]


def empty_cache(config: Seq2SeqConfig, images: int):
    """Image keys and values before the first position: a list, one {'k', 'v'} of [B, N, I, H] a layer."""
    sizes = {"grid": config.grid, "images": images, "heads": config.heads, "head_size": config.head_size}
    return [cached.empty("full", **sizes, dtype=compute_dtype(config.precision)) for _ in range(config.decoder_layers)]


def decode(config: Seq2SeqConfig, layers, ends, stores, cache, previous_B, position):
    """One image position for all images.

    layers, ends, stores: of `layer_weights`, `end_weights` and `prefill`; cache: of `empty_cache` or the step before.
    previous_B: int32 image tokens at position - 1 (`config.start` at position 0), the candidates of a caption side by
    side. position: int32 scalar.
    Returns: float32 logits [V, B] of the image token at `position`, and the new cache.
    """
    x_DB = (ends["embedding"][previous_B] + ends["position"][position][None]).T
    x_DB = constrain(_norm(ends, "embedding_norm", x_DB), ("embed_activation", "batch"))
    dtype, new_cache = compute_dtype(config.precision), []
    nothing = jnp.zeros((1, config.heads, 0, config.head_size), dtype)

    def within(block, h, store):
        q, k, v = _product(block, "self_qkv", h).astype(dtype).transpose(0, 3, 1, 2)
        text = {"k": nothing, "v": nothing}
        mixed_BNH, new = cached.attend(q, k, v, text, store, "full", position=position, grid=config.grid)
        new_cache.append({name: constrain(x, ("batch", "heads", None, None)) for name, x in new.items()})
        return _columns(mixed_BNH)

    def across(block, h, text):
        return _columns(_attend_text(_product(block, "cross_q", h).astype(dtype).transpose(2, 0, 1), text))

    for block, text, store in zip(layers, stores, cache, strict=True):
        attends = {"self": functools.partial(within, store=store), "cross": functools.partial(across, text=text)}
        x_DB = constrain(
            layer(block, x_DB, attends=attends, norm=_norm, product=_product), ("embed_activation", "batch")
        )
    return _product(ends, "head", _norm(ends, "final_norm", x_DB)), new_cache


def _attend_text(q_BNH, text):
    """Attention of one query an image to its caption, [B, N, H]."""
    q_PMNH = einops.rearrange(scale_queries(q_BNH), "(p m) n h -> p m n h", p=len(text["k"]))
    scores = jnp.einsum("pmnh,pnth->pnmt", q_PMNH, text["k"], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(text["seen"][:, None, None], scores, MASKED), axis=-1)
    mixed = jnp.einsum("pnmt,pnth->pmnh", weights.astype(q_BNH.dtype), text["v"])
    return mixed.reshape(q_BNH.shape)


def _norm(block, name, x_DB):
    """Layer normalization of float32 columns."""
    centered = x_DB - x_DB.mean(0, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centered).mean(0, keepdims=True) + EPSILON)
    return centered * scale * block[f"{name}_gain"][:, None] + block[f"{name}_bias"][:, None]


def _product(block, name, x_DB):
    """A matrix times columns, summed in float32."""
    return jnp.tensordot(block[name], x_DB.astype(block[name].dtype), 1, preferred_element_type=jnp.float32)


def _columns(x_BNH):
    return x_BNH.reshape(len(x_BNH), -1).T
