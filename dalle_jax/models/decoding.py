"""The transformer one image position at a time, from a cache: what sampling runs.

The same `blocks.layer` as in training, with operations for the case where all weights are read for a few columns of
activations (`Columns`), so that weights, keys and little else cross the memory:

- Matrices are stored as [outputs, inputs] and meet activations [D, B] whose columns are images: no product transposes
  or repacks a weight.
- Every layer norm before a product is folded away. The residual stream is only ever read through norms, which ignore
  its mean, so whatever writes to it is centered once, beforehand; the gain of a norm goes into the matrix after it, its
  bias into that matrix's bias; and dividing by the root mean square commutes with the product. What is left of a norm
  in a step is one number a column. Norms behind a branch are computed.
- The text's keys and values are stored once per caption (`attention/cached.py`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dalle_jax.models.attention import blockwise, cached
from dalle_jax.models.blocks import LAYER, layer
from dalle_jax.models.layers import EPSILON, Params, compute_dtype, layer_norm, stream_dtype
from dalle_jax.models.transformer import TransformerConfig, image_position, position_tables
from dalle_jax.sharding import constrain

WEIGHTS = ("model", "int8")
# Of the cache [B, N, slots, H] inside the loop as outside of it: XLA would choose others for GPUs and hold it twice.
AS_STORED = Layout(major_to_minor=(0, 1, 2, 3))
NORM_BEFORE = {"qkv": "norm1", "up": "norm2"}  # the matrices that read the stream; the others write to it

# Logical names of the dimensions of everything `layer_weights` and `end_weights` give.
LAYER_AXES = {
    n: (*entry.axes[entry.inputs :], *entry.axes[: min(entry.inputs, 1)])
    for n, entry in LAYER.items()
    if entry.after or not entry.norm
}
END_AXES = {
    "text_embedding": (None, "embed"),
    "text_position": ("position", "embed"),
    "image_embedding": ("image_input", "embed"),
    "image_position": ("position", "embed"),
    "row_position": ("position", "embed"),
    "column_position": ("position", "embed"),
    "norm_gain": ("embed",),
    "norm_bias": ("embed",),
    "head": ("vocab", "embed"),
    "head_bias": ("vocab",),
}


def layer_weights(config: TransformerConfig, block: Params, *, weights: str = "model") -> dict[str, Any]:
    """One layer's parameters (without the layer dimension, float32) as `prefill` and `decode` read them.

    weights: 'model' for the model's compute dtype, 'int8' for matrices of 8 bits with a float32 scale an output, read
    back in the compute dtype. Biases are float32. Several dimensions of inputs become one.
    """
    stored = {}
    for name, entry in LAYER.items():
        if entry.after and name in block:  # what it gives to the stream is centered in `Columns.norm_after`
            stored[name] = block[name]
        if not entry.inputs:
            continue
        matrix = jnp.moveaxis(block[name], range(entry.inputs), range(-entry.inputs, 0))
        matrix = matrix.reshape(*matrix.shape[: -entry.inputs], -1)
        bias = block[f"{name}_bias"]
        if name in NORM_BEFORE:
            bias = bias + matrix @ block[f"{NORM_BEFORE[name]}_bias"]
            matrix = matrix * jax.lax.broadcast_to_rank(block[f"{NORM_BEFORE[name]}_gain"], matrix.ndim)
        elif "after1_gain" not in block:
            matrix, bias = _centered(matrix), _centered(bias)
        stored |= {name: _stored(matrix, compute_dtype(config.precision), weights), f"{name}_bias": bias}
    return stored


def end_weights(config: TransformerConfig, params: Params) -> dict[str, Any]:
    """The weights before and after the layers: embeddings (float32) and the image head."""
    tables = ("text_embedding", "text_position", "image_embedding", *position_tables(config))
    ends = {name: params[name] - params[name].mean(-1, keepdims=True) for name in tables}
    head, head_bias, last = params["image_head"].T, 0.0, "norm"
    if config.traits.head_norm:
        ends |= {"norm_gain": params["norm_gain"], "norm_bias": params["norm_bias"]}
        head_bias, last = params["image_head_bias"], "head_norm"
    head_bias = head_bias + head @ params[f"{last}_bias"]
    head = (head * params[f"{last}_gain"][None]).astype(stream_dtype(config.precision))
    return ends | {"head": head, "head_bias": head_bias}


class _Normed(NamedTuple):
    """Columns and what each is to be multiplied by after the product."""

    x: jax.Array
    scale: jax.Array


class Columns:
    """Operations of `blocks.layer` on a few columns, [D, B], whose parameters are of `layer_weights`.

    Products are summed in float32.
    """

    def __init__(self, dtype):
        self.dtype = dtype

    def norm(self, block, name, x):
        """The rest of a norm that `layer_weights` cannot fold: columns have mean zero, so one number each."""
        return _Normed(x, _inverse_rms(x))

    def norm_after(self, block, name, x):
        """A norm of what a branch gives, and that centered as everything that the stream is the sum of."""
        return _centered(_norm(x, block[f"{name}_gain"], block[f"{name}_bias"]))

    def product(self, block, name, x):
        if isinstance(x, _Normed):
            y = _product(block[name], x.x, self.dtype)
            y = y * jax.lax.broadcast_to_rank(x.scale, y.ndim)
        else:
            y = _product(block[name], x, self.dtype)
        return y + block[f"{name}_bias"][..., None]

    def heads(self, qkv):
        """[3, N, H, B] -> queries, keys and values, each [B, N, H]."""
        return qkv.astype(self.dtype).transpose(0, 3, 1, 2)

    def add(self, block, x, branch, function):
        """The stream after a branch, whose bias is added first: with that last, XLA's CPU backend would not keep the
        stream, and would sum up all branches so far anew for every reader of it."""
        return x + function(block, x)


def prefill(config: TransformerConfig, layers, ends, text_PT):
    """The text as later positions read it, once per caption.

    Returns: 'layers', its keys and values, a list with one {'k', 'v'} of [P, N, T, H] a layer; and 'first', [P, ...],
    what stands at image position 0 if it is a text id, or the logits of image token 0 if the text predicts them.
    """
    captions, text_len = len(text_PT), config.text_len
    x_PTD = ends["text_embedding"][text_PT] + ends["text_position"][None]
    stores = []

    def attend(*qkv):
        q, k, v = (x.reshape(captions, text_len, *x.shape[1:]) for x in qkv)
        stores.append({"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)})
        return _columns(blockwise.attend_text(q, k, v))

    x_DB = x_PTD[:, :text_len].reshape(captions * text_len, -1).T
    run = functools.partial(layer, ops=Columns(compute_dtype(config.precision)), activation=config.traits.activation)
    for block in layers:
        x_DB = run(block, x_DB, attend=attend)
    if config.layout.first == "start":
        return {"layers": stores}
    if config.layout.first == "text":
        return {"layers": stores, "first": x_PTD[:, text_len]}
    last_DP = x_DB.reshape(-1, captions, text_len)[..., -1]
    return {"layers": stores, "first": _logits(config, ends, last_DP).T}


def empty_cache(config: TransformerConfig, images: int):
    """Image keys and values before the first position: a list, one {'k', 'v'} of [B, N, slots, H] a layer."""
    sizes = {"grid": config.grid, "images": images, "heads": config.heads, "head_size": config.head_size}
    return [cached.empty(kind, **sizes, dtype=compute_dtype(config.precision)) for kind in config.kinds]


def decode(config: TransformerConfig, layers, ends, stores, cache, previous_B, position):
    """One image position for all images.

    layers, ends, stores: of `layer_weights`, `end_weights` and `prefill`; cache: of `empty_cache` or the step before.
    previous_B: int32 image tokens at position - 1 (at position 0 `Layout.start_of_image`, or anything), those of a
    caption's candidates side by side. position: int32 scalar.
    Returns: float32 logits [V, B] of the image token at `position`, and the new cache.
    """
    first = config.layout.first
    at = position if first == "start" else position - 1  # of the image token that is read
    where = {name: ends[name] for name in position_tables(config)}
    x_BD = ends["image_embedding"][previous_B] + image_position(where, at, grid=config.grid)[None]
    if first == "text":
        x_BD = jnp.where(position == 0, _of_images(stores["first"], x_BD.shape[0]), x_BD)
    x_DB = constrain(x_BD.T, ("embed_activation", "batch"))
    new_cache = []
    place = at if first == "none" else position

    def attend(q, k, v, text, store, kind):
        mixed_BNH, store = cached.attend(q, k, v, text, store, kind, position=place, grid=config.grid)
        store = {name: constrain(x, ("batch", "heads", None, None)) for name, x in store.items()}
        new_cache.append(with_layout_constraint(store, AS_STORED))
        return _columns(mixed_BNH)

    run = functools.partial(layer, ops=Columns(compute_dtype(config.precision)), activation=config.traits.activation)
    for block, kind, text, store in zip(layers, config.kinds, stores["layers"], cache, strict=True):
        x_DB = run(block, x_DB, attend=functools.partial(attend, text=text, store=store, kind=kind))
        x_DB = constrain(x_DB, ("embed_activation", "batch"))
    logits_VB = _logits(config, ends, x_DB)
    if first == "none":
        logits_VB = jnp.where(position == 0, _of_images(stores["first"], logits_VB.shape[1]).T, logits_VB)
    return logits_VB, new_cache


def _of_images(x_PX, images: int):
    """Arrays of captions, for each of their candidates."""
    return jnp.repeat(x_PX, images // len(x_PX), axis=0)


def _logits(config: TransformerConfig, ends, x_DB):
    if config.traits.head_norm:
        x_DB = _centered(_norm(x_DB, ends["norm_gain"], ends["norm_bias"]))
    return _product(ends["head"], x_DB, ends["head"].dtype) * _inverse_rms(x_DB)[None] + ends["head_bias"][:, None]


def _norm(x_DB, gain_D, bias_D):
    """A layer norm of columns."""
    return layer_norm(x_DB.T, gain_D, bias_D).T


def _centered(x):
    """Written to the residual stream (first axis), this does not change its mean."""
    return x - x.mean(0, keepdims=True)


def _stored(matrix, dtype, weights: str):
    if weights == "model":
        return matrix.astype(dtype)
    scale = jnp.maximum(jnp.abs(matrix).max(-1) / 127.0, 1e-30)
    return {"int8": jnp.round(matrix / scale[..., None]).astype(jnp.int8), "scale": scale}


def _product(weight, x_DB, dtype):
    """A stored matrix times columns, summed in float32."""
    if isinstance(weight, dict):
        return _product(weight["int8"].astype(dtype), x_DB, dtype) * weight["scale"][..., None]
    return jnp.tensordot(weight, x_DB.astype(dtype), 1, preferred_element_type=jnp.float32)


def _columns(x):
    """[..., N, H] -> columns [N * H, B]."""
    return x.reshape(-1, x.shape[-2] * x.shape[-1]).T


def _inverse_rms(x_DB):
    """1 / the root mean square of each column, the scale of a layer norm of columns of mean zero.

    Averaged in two steps, each too short for XLA's CPU backend to make two passes of it.
    """
    rows = math.gcd(x_DB.shape[0], 1 << (x_DB.shape[0].bit_length() // 2))
    square_B = jnp.square(x_DB).reshape(rows, -1, x_DB.shape[1]).mean(0).mean(0)
    return jax.lax.rsqrt(square_B + EPSILON)
