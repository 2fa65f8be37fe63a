"""The transformer one image position at a time, from a cache: what sampling runs.

The same function of the same parameters as `transformer.py`, written anew for the case where all weights are read for
a few columns of activations, so that weights, keys and little else cross the memory:

- Matrices are stored as [outputs, inputs] and meet activations [D, B] whose columns are images: no product transposes
  or repacks a weight.
- Every layer norm is folded away. The residual stream is only ever read through norms, which ignore its mean, so
  whatever writes to it is centred once, beforehand; the gain goes into the matrix after the norm, its bias into that
  matrix's bias; and dividing by the root mean square commutes with the product. What is left of a norm in a step is one
  number a column.
- The text's keys and values are stored once per caption and read by all its candidates; a layer keeps of the image what
  its kind of attention can still see (`attention_pattern.cache_slots`).

Dimensions: B images, C captions, M candidates of each, T text, I image, D width, N heads, H head width, F hidden, V
codes, K slots of a cache, X (= 3) queries, keys and values.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dalle_jax.models.attention import blockwise
from dalle_jax.models.layers import EPSILON, Params, compute_dtype, quick_gelu, stream_dtype
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.sharding import constrain

WEIGHTS = ("model", "int8")
# Of the cache [B, N, slots, H] inside the loop as outside of it: XLA would choose others for GPUs and hold it twice.
AS_STORED = Layout(major_to_minor=(0, 1, 2, 3))

# Logical names of the dimensions of everything `layer_weights` and `end_weights` give.
LAYER_AXES = {
    "qkv": ("qkv", "heads", "head", "embed"),
    "qkv_bias": ("qkv", "heads", "head"),
    "out": ("embed", "heads"),
    "out_bias": ("embed",),
    "up": ("mlp", "embed"),
    "up_bias": ("mlp",),
    "down": ("embed", "mlp"),
    "down_bias": ("embed",),
}
END_AXES = {
    "text_embedding": (None, "embed"),
    "text_position": ("position", "embed"),
    "image_embedding": ("image_input", "embed"),
    "row_position": ("position", "embed"),
    "column_position": ("position", "embed"),
    "head": ("vocab", "embed"),
    "head_bias": ("vocab",),
}


def layer_weights(config: TransformerConfig, block: Params, *, weights: str = "model") -> dict[str, Any]:
    """One layer's parameters (without the layer dimension, float32) as `prefill` and `decode` read them.

    weights: 'model' for the model's compute dtype, 'int8' for matrices of 8 bits with a float32 scale an output, read
    back in the compute dtype. Biases are float32.
    """
    qkv = jnp.einsum("dxnh->xnhd", block["qkv"])
    up = block["up"].T
    matrices = {
        "qkv": qkv * block["norm1_gain"],
        "out": _centred(block["out"].reshape(-1, config.width).T),
        "up": up * block["norm2_gain"],
        "down": _centred(block["down"].T),
    }
    biases = {
        "qkv_bias": block["qkv_bias"] + qkv @ block["norm1_bias"],
        "out_bias": _centred(block["out_bias"]),
        "up_bias": block["up_bias"] + up @ block["norm2_bias"],
        "down_bias": _centred(block["down_bias"]),
    }
    return {name: _stored(config, name, matrix, weights) for name, matrix in matrices.items()} | biases


def end_weights(config: TransformerConfig, params: Params) -> dict[str, Any]:
    """What comes before and after the layers: embeddings (float32) and the image head."""
    tables = ("text_embedding", "text_position", "image_embedding", "row_position", "column_position")
    centred = {name: params[name] - params[name].mean(-1, keepdims=True) for name in tables}
    head = params["image_head"].T
    head_bias = head @ params["norm_bias"]
    head = (head * params["norm_gain"]).astype(stream_dtype(config.precision))
    return centred | {"head": head, "head_bias": head_bias}


def prefill(config: TransformerConfig, layers, ends, text_CT):
    """Keys and values of the text, once per caption: a list, one {'k', 'v'} of [C, N, T, H] a layer."""
    dtype, (captions, text_len) = compute_dtype(config.precision), text_CT.shape
    x_CTD = ends["text_embedding"][text_CT] + ends["text_position"]
    x_DB = x_CTD.reshape(captions * text_len, -1).T
    stores = []
    for layer in layers:
        q, k, v = (x.reshape(captions, text_len, *x.shape[1:]) for x in _qkv(layer, x_DB, dtype))
        stores.append({name: x.swapaxes(1, 2) for name, x in (("k", k), ("v", v))})
        mixed = blockwise.attend_text(q, k, v)
        x_DB = _mlp(layer, _project(layer, x_DB, mixed.reshape(captions * text_len, *mixed.shape[2:])), dtype)
    return stores


def empty_cache(config: TransformerConfig, images: int):
    """Image keys and values before the first position: a list, one {'k', 'v'} of [B, N, slots, H] a layer."""
    return [
        blockwise.empty_cache(
            kind,
            grid=config.grid,
            images=images,
            heads=config.heads,
            head_size=config.head_size,
            dtype=compute_dtype(config.precision),
        )
        for kind in config.kinds
    ]


def decode(config: TransformerConfig, layers, ends, stores, cache, previous_B, position):
    """One image position for all images.

    layers, ends, stores: of `layer_weights`, `end_weights` and `prefill`; cache: of `empty_cache` or the step before.
    previous_B: int32 codes at position - 1 (`Layout.start_of_image` at position 0), the candidates of a caption side by
    side. position: int32 scalar.
    Returns: float32 logits [V, B] of the code at `position`, and the new cache.
    """
    dtype = compute_dtype(config.precision)
    x_BD = (
        ends["image_embedding"][previous_B]
        + ends["row_position"][position // config.grid]
        + ends["column_position"][position % config.grid]
    )
    x_DB = constrain(x_BD.T, ("embed_activation", "batch"))
    new_cache = []
    for layer, kind, text, store in zip(layers, config.kinds, stores, cache, strict=True):
        q, k, v = _qkv(layer, x_DB, dtype)
        mixed, store = blockwise.attend_cached(q, k, v, text, store, kind, position=position, grid=config.grid)
        store = {name: constrain(x, ("batch", "heads", None, None)) for name, x in store.items()}
        new_cache.append(with_layout_constraint(store, AS_STORED))
        x_DB = constrain(_mlp(layer, _project(layer, x_DB, mixed), dtype), ("embed_activation", "batch"))
    logits_VB = _product("vd,db->vb", ends["head"], x_DB, ends["head"].dtype)
    return logits_VB * _scale(x_DB) + ends["head_bias"][:, None], new_cache


def _centred(x):
    """Written to the residual stream (first axis), this moves no mean."""
    return x - x.mean(0, keepdims=True)


def _stored(config: TransformerConfig, name: str, matrix, weights: str):
    if weights == "model":
        return matrix.astype(compute_dtype(config.precision))
    inputs = tuple(range({"qkv": 3}.get(name, 1), matrix.ndim))
    scale = jnp.maximum(jnp.abs(matrix).max(inputs) / 127.0, 1e-30)
    rounded = jnp.round(matrix / jnp.expand_dims(scale, inputs)).astype(jnp.int8)
    return {"int8": rounded, "scale": scale}


def _product(equation: str, weight, x, dtype):
    """einsum of a stored matrix and columns, summed in float32."""
    if isinstance(weight, dict):
        return _product(equation, weight["int8"].astype(dtype), x, dtype) * weight["scale"][..., None]
    return jnp.einsum(equation, weight, x.astype(dtype), preferred_element_type=jnp.float32)


def _scale(x_DB):
    """The divisor of layer norm for columns of mean zero, one number a column.

    Averaged in two steps, each too short for XLA's CPU backend to make two passes of it.
    """
    rows = math.gcd(x_DB.shape[0], 1 << (x_DB.shape[0].bit_length() // 2))
    square_B = jnp.square(x_DB).reshape(rows, -1, x_DB.shape[1]).mean(0).mean(0)
    return jax.lax.rsqrt(square_B + EPSILON)


def _qkv(layer, x_DB, dtype):
    """[D, B] -> queries, keys and values, each [B, N, H]."""
    x_XNHB = _product("xnhd,db->xnhb", layer["qkv"], x_DB, dtype) * _scale(x_DB) + layer["qkv_bias"][..., None]
    return x_XNHB.astype(dtype).transpose(0, 3, 1, 2)


def _project(layer, x_DB, mixed_BNH):
    out = _product("dx,bx->db", layer["out"], mixed_BNH.reshape(len(mixed_BNH), -1), mixed_BNH.dtype)
    return _added(x_DB, out, layer["out_bias"])


def _mlp(layer, x_DB, dtype):
    hidden_FB = _product("fd,db->fb", layer["up"], x_DB, dtype) * _scale(x_DB) + layer["up_bias"][:, None]
    return _added(x_DB, _product("df,fb->db", layer["down"], quick_gelu(hidden_FB), dtype), layer["down_bias"])


def _added(x_DB, branch_DB, bias_D):
    """The stream after a branch. With the bias added last, XLA's CPU backend would not keep the stream, and would sum
    up all branches so far anew for every reader of it."""
    return x_DB + (branch_DB + bias_D[:, None])
