"""Pre-activation residual blocks: norm, attention, norm, MLP, with the parameters of all layers stacked.

The text-to-image transformer and both towers of CLIP are made of these; what attends to what is the caller's
`attend`. Knows how one layer is computed and what the backward pass keeps of it; nothing of embeddings and heads.

Dimensions: B batch, S sequence, L layers, D width, N heads, H head width.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.models.layers import layer_norm, param, quick_gelu
from dalle_jax.models.ops import linear
from dalle_jax.models.scaled import BRANCH, enter, leave, own
from dalle_jax.sharding import constrain

_NOTHING = jax.checkpoint_policies.nothing_saveable
_PRODUCTS = jax.checkpoint_policies.save_only_these_names("product")  # of `qkv` and `mlp`

# What the backward pass computes again instead of keeping, from least to most: name -> part of a layer and what
# survives in it. "attend" is the scores and the softmax, "attention" and "mlp" are the two residual blocks.
REMAT = {
    "none": {},
    "attention": {"attend": _NOTHING},
    "dots": {"attention": _PRODUCTS, "mlp": _PRODUCTS},
    "full": {"attention": _NOTHING, "mlp": _NOTHING},
}


def check_remat(remat: str) -> None:
    """Raises ValueError for a step that is not on the ladder REMAT."""
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {tuple(REMAT)}, got {remat!r}")


@dataclasses.dataclass(frozen=True)
class Deviations:
    """Standard deviations of a block's four matrices at the start; its biases are 0, its gains 1."""

    qkv: float
    out: float
    up: float
    down: float


# Meaning of the dimensions of one layer's parameters.
LAYER_AXES = {
    "norm1_gain": ("embed",),
    "norm1_bias": ("embed",),
    "qkv": ("embed", "qkv", "heads", "head"),
    "qkv_bias": ("qkv", "heads", "head"),
    "out": ("heads", "head", "embed"),
    "out_bias": ("embed",),
    "norm2_gain": ("embed",),
    "norm2_bias": ("embed",),
    "up": ("embed", "mlp"),
    "up_bias": ("mlp",),
    "down": ("mlp", "embed"),
    "down_bias": ("embed",),
}


class Blocks(nnx.Module):
    """Parameters of all layers, each with a leading layer dimension. The functions below compute with one layer."""

    def __init__(self, rngs: nnx.Rngs, *, layers: int, width: int, heads: int, head_size: int, std: Deviations):
        hidden = 4 * width

        def stacked(name, *shape, **start):
            return param(rngs, (layers, *shape), axes=("layers", *LAYER_AXES[name]), **start)

        self.norm1_gain = stacked("norm1_gain", width, fill=1.0)
        self.norm1_bias = stacked("norm1_bias", width)
        self.qkv = stacked("qkv", width, 3, heads, head_size, std=std.qkv)
        self.qkv_bias = stacked("qkv_bias", 3, heads, head_size)
        self.out = stacked("out", heads, head_size, width, std=std.out)
        self.out_bias = stacked("out_bias", width)
        self.norm2_gain = stacked("norm2_gain", width, fill=1.0)
        self.norm2_bias = stacked("norm2_bias", width)
        self.up = stacked("up", width, hidden, std=std.up)
        self.up_bias = stacked("up_bias", hidden)
        self.down = stacked("down", hidden, width, std=std.down)
        self.down_bias = stacked("down_bias", width)

    def stacked(self, dtype, *, vectors=None, scales=None):
        """All layers' parameters as `layer` reads them.

        Matrices in `dtype`, norm gains and biases in float32, the other biases in `vectors` (default: `dtype`).
        scales: float32 [L, 2] of each layer's two branches (`scaled.py`); they come along as one more entry.
        """
        arrays = nnx.to_pure_dict(nnx.state(self))
        vectors = dtype if vectors is None else vectors
        dtypes = {n: None if n.startswith("norm") else vectors if n.endswith("bias") else dtype for n in arrays}
        if scales is None:
            return {name: a if dtypes[name] is None else a.astype(dtypes[name]) for name, a in arrays.items()}
        scaled = {name: own(a, scales[:, BRANCH[name]], dtypes[name] or a.dtype) for name, a in arrays.items()}
        return scaled | {"scales": scales}


def layer(block, x_BSD, *, attend: Callable, remat: str):
    """One layer over a whole sequence. attend: (q, k, v) of [B, S, N, H] -> [B, S, N, H].

    Inside, the stream is one row per token, the shape in which a matrix product reads it. Given another one, XLA's CPU
    backend computes the gradient of the stream again for every reader of it, from all the terms of all later layers.
    """
    B, S, D = x_BSD.shape

    def saving(part, function):
        policy = REMAT[remat].get(part)
        return jax.checkpoint(function, policy=policy) if policy else function

    def constrained(x):
        return constrain(x.reshape(B, S, D), ("batch", "sequence", "embed_activation")).reshape(B * S, D)

    def attend_tokens(*qkv):
        mixed_BSNH = attend_sequences(*(x.reshape(B, S, *x.shape[1:]) for x in qkv))
        return mixed_BSNH.reshape(B * S, *mixed_BSNH.shape[2:])

    attend_sequences = saving("attend", attend)
    mix = functools.partial(attention, attend=attend_tokens)
    x = constrained(saving("attention", mix)(block, x_BSD.reshape(B * S, D)))
    return constrained(saving("mlp", mlp)(block, x)).reshape(B, S, D)


def attention(block, x, *, attend):
    """The first residual block, [..., D] -> [..., D]."""

    def branch(x):
        return project(block, attend(*qkv(block, x)))

    return _residual(branch, block, x, branch=0)


def mlp(block, x):
    """The second residual block, [..., D] -> [..., D]."""

    def branch(x):
        hidden = layer_norm(x, block["norm2_gain"], block["norm2_bias"])
        hidden = checkpoint_name(_biased(_linear(hidden, block, "up"), block["up_bias"]), "product")
        hidden = quick_gelu(hidden)
        return _biased(_linear(hidden, block, "down"), block["down_bias"])

    return _residual(branch, block, x, branch=1)


def _residual(function, block, x, *, branch: int):
    """x + function(x), the function in the dtype of the matrices and the sum in that of x."""
    dtype = block["up"].dtype
    if "scales" not in block:
        return x + function(x.astype(dtype)).astype(x.dtype)
    scale = block["scales"][branch]
    return x + leave(function(enter(x, scale, dtype)), scale)


def qkv(block, x):
    """[..., D] -> queries, keys and values, each [..., N, H]."""
    x = layer_norm(x, block["norm1_gain"], block["norm1_bias"])
    all_three = checkpoint_name(_biased(_linear(x, block, "qkv"), block["qkv_bias"]), "product")
    return all_three[..., 0, :, :], all_three[..., 1, :, :], all_three[..., 2, :, :]


def project(block, mixed):
    """What attention adds to the stream: [..., N, H] -> [..., D]."""
    return _biased(_linear(mixed, block, "out", 2), block["out_bias"])


def _biased(x, bias):
    """The sum in the wider of both dtypes, the result in that of x."""
    return (x + bias).astype(x.dtype)


def _linear(x, block, name: str, inputs: int = 1):
    return linear(x, block[name], inputs, LAYER_AXES[name])
