"""Pre-activation residual blocks: norm, attention, norm, MLP, with the parameters of all layers stacked.

`layer` is how one layer is computed, everywhere: the text-to-image transformer and both towers of CLIP give it whole
sequences as rows (`Rows`), sampling one position at a time as columns (`decoding.Columns`). What attends to what is the
caller's `attend`. `LAYER` is the one description of a layer's parameters. Knows nothing of embeddings and heads.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dalle_jax.models.layers import layer_norm, param, quick_gelu
from dalle_jax.models.ops import linear
from dalle_jax.models.scaled import cast_in, cast_out
from dalle_jax.sharding import constrain

ATTENTION, MLP = BRANCHES = ("attention", "mlp")  # the residual branches of a layer, in their order

_NOTHING = jax.checkpoint_policies.nothing_saveable
_PRODUCTS = jax.checkpoint_policies.save_only_these_names("product")  # with qkv and up

# Parts of a layer that the backward pass computes again instead of keeping, fewest first: name -> part and what is
# kept of it. "attend" is the scores and the softmax, the others are the two residual branches.
REMAT = {
    "none": {},
    "attention": {"attend": _NOTHING},
    "dots": {ATTENTION: _PRODUCTS, MLP: _PRODUCTS},
    "full": {ATTENTION: _NOTHING, MLP: _NOTHING},
}


def check_remat(remat: str) -> None:
    """Raises ValueError for a step that is not on the ladder REMAT."""
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {tuple(REMAT)}, got {remat!r}")


@dataclasses.dataclass(frozen=True)
class LayerParam:
    """One parameter of a layer.

    axes: logical names of its dimensions. branch: the residual branch it belongs to. inputs: of a matrix, how many
    dimensions, the first, its product contracts. norm: a gain or bias of a norm, which stays float32. after: of a norm
    behind a branch, which only models with sandwich norms have. fill: initial value of what is no matrix.
    """

    axes: tuple[str, ...]
    branch: str
    inputs: int = 0
    norm: bool = False
    after: bool = False
    fill: float = 0.0


LAYER = {
    "norm1_gain": LayerParam(("embed",), ATTENTION, norm=True, fill=1.0),
    "norm1_bias": LayerParam(("embed",), ATTENTION, norm=True),
    "qkv": LayerParam(("embed", "qkv", "heads", "head"), ATTENTION, inputs=1),
    "qkv_bias": LayerParam(("qkv", "heads", "head"), ATTENTION),
    "out": LayerParam(("heads", "head", "embed"), ATTENTION, inputs=2),
    "out_bias": LayerParam(("embed",), ATTENTION),
    "after1_gain": LayerParam(("embed",), ATTENTION, norm=True, after=True, fill=1.0),
    "after1_bias": LayerParam(("embed",), ATTENTION, norm=True, after=True),
    "norm2_gain": LayerParam(("embed",), MLP, norm=True, fill=1.0),
    "norm2_bias": LayerParam(("embed",), MLP, norm=True),
    "up": LayerParam(("embed", "mlp"), MLP, inputs=1),
    "up_bias": LayerParam(("mlp",), MLP),
    "down": LayerParam(("mlp", "embed"), MLP, inputs=1),
    "down_bias": LayerParam(("embed",), MLP),
    "after2_gain": LayerParam(("embed",), MLP, norm=True, after=True, fill=1.0),
    "after2_bias": LayerParam(("embed",), MLP, norm=True, after=True),
}


class Blocks(nnx.Module):
    """The parameters of LAYER, each with a leading dimension for the layers."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        layers: int,
        width: int,
        heads: int,
        head_size: int,
        sandwich: bool = False,
        **initial: Mapping[str, float],
    ):
        """sandwich: with norms behind the branches. initial: std or bound of `layers.param`, by the name of a layer's
        parameter."""
        sizes = {"embed": width, "qkv": 3, "heads": heads, "head": head_size, "mlp": 4 * width}
        for name, entry in LAYER.items():
            if entry.after and not sandwich:
                continue
            shape = layers, *(sizes[axis] for axis in entry.axes)
            axes = "layers", *entry.axes
            drawn = {kind: values.get(name, 0.0) for kind, values in initial.items()}
            setattr(self, name, param(rngs, shape, axes=axes, fill=entry.fill, **drawn))

    def cast(self, dtype, *, vectors=None, scales=None):
        """All layers' parameters as `layer` reads them from rows.

        Matrices in `dtype`, norm gains and biases in float32, the other biases in `vectors` (default: `dtype`).
        scales: float32 [L, 2] of each layer's two branches (`scaled.py`); they come along as one more entry.
        """
        arrays = nnx.to_pure_dict(nnx.state(self))
        vectors = dtype if vectors is None else vectors

        def one(name, array):
            entry = LAYER[name]
            target = array.dtype if entry.norm else dtype if entry.inputs else vectors
            if scales is None:
                return array.astype(target)
            return cast_in(array, scales[:, BRANCHES.index(entry.branch)], target, zero_overflow=False)

        return {n: one(n, a) for n, a in arrays.items()} | ({} if scales is None else {"scales": scales})


def layer(block, x, *, attend: Callable, ops, activation: Callable = quick_gelu):
    """One layer.

    block: its parameters, as `ops` reads them. x: the stream. attend: queries, keys and values of `ops.heads` -> what
    the product with `out` reads. ops: its operations, `Rows` or `decoding.Columns`: `norm` of the stream, in whatever
    form `product` takes, which adds the bias; `norm_after`, of what a branch gives, where it has such a norm; and
    `add`, the stream after a residual branch function(block, x).
    """

    def attention(block, x):
        qkv = checkpoint_name(ops.product(block, "qkv", ops.norm(block, "norm1", x)), "product")
        y = ops.product(block, "out", attend(*ops.heads(qkv)))
        return ops.norm_after(block, "after1", y) if "after1_gain" in block else y

    def mlp(block, x):
        hidden = checkpoint_name(ops.product(block, "up", ops.norm(block, "norm2", x)), "product")
        y = ops.product(block, "down", activation(hidden))
        return ops.norm_after(block, "after2", y) if "after2_gain" in block else y

    return ops.add(block, ops.add(block, x, ATTENTION, attention), MLP, mlp)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Operations of whole sequences, [B * S, D], of parameters by `Blocks.cast`.

    One row per token is the shape in which a matrix product reads the stream. Given another one, XLA's CPU backend
    computes the gradient of the stream again for every reader of it, from all the terms of all later layers.
    """

    batch: int
    remat: str

    def norm(self, block, name, x):
        return layer_norm(x, block[f"{name}_gain"], block[f"{name}_bias"])

    norm_after = norm

    def product(self, block, name, x):
        """The sum with the bias in the wider of both dtypes, the result in that of x."""
        y = linear(x, block[name], LAYER[name].inputs, LAYER[name].axes)
        return (y + jax.lax.broadcast_to_rank(block[f"{name}_bias"], y.ndim)).astype(y.dtype)

    def heads(self, qkv):
        return qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]

    def add(self, block, x, branch, function):
        """The branch in the dtype of the matrices, the sum in that of x."""

        def residual(block, x):
            dtype = block["up"].dtype
            if "scales" not in block:
                return x + function(block, x.astype(dtype)).astype(x.dtype)
            scale = block["scales"][BRANCHES.index(branch)]
            return x + cast_out(function(block, cast_in(x, scale, dtype, zero_overflow=True)), scale)

        x_BSD = self.saving(branch, residual)(block, x).reshape(self.batch, -1, x.shape[-1])
        return constrain(x_BSD, ("batch", "sequence", "embed_activation")).reshape(x.shape)

    def saving(self, part: str, function: Callable) -> Callable:
        """The function, of whose values the backward pass keeps what REMAT says."""
        policy = REMAT[self.remat].get(part)
        return jax.checkpoint(function, policy=policy) if policy else function


def sequence_layer(block, x_BSD, *, attend: Callable, remat: str, activation: Callable = quick_gelu):
    """One layer over whole sequences. attend: (q, k, v) of [B, S, N, H] -> [B, S, N, H]."""
    B, S, D = x_BSD.shape
    ops = Rows(B, remat)

    def attend_rows(*qkv):
        mixed_BSNH = ops.saving("attend", attend)(*(x.reshape(B, S, *x.shape[1:]) for x in qkv))
        return mixed_BSNH.reshape(B * S, *mixed_BSNH.shape[2:])

    x_RD = layer(block, x_BSD.reshape(B * S, D), attend=attend_rows, ops=ops, activation=activation)
    return x_RD.reshape(B, S, D)


def scan_layers(
    stacked,
    x_BSD,
    *,
    attends: Sequence[Callable],
    remat: str,
    activation: Callable = quick_gelu,
    period: int = 1,
    scan_length: int = 0,
):
    """All layers over whole sequences: a scan over groups of `period` layers, the rest unrolled.

    stacked: of `Blocks.cast`. attends: of each layer, repeating themselves with the period as far as the scan goes.
    scan_length: groups that the scan takes.
    """
    scanned = scan_length * period

    def run(block, x_BSD, attend):
        return sequence_layer(block, x_BSD, attend=attend, remat=remat, activation=activation)

    def at(arrays, i):
        return {name: a[i] for name, a in arrays.items()}

    if scan_length:

        def group(x_BSD, blocks):
            for i in range(period):
                x_BSD = run(at(blocks, i), x_BSD, attends[i])
            return x_BSD, None

        groups = {name: a[:scanned].reshape(scan_length, period, *a.shape[1:]) for name, a in stacked.items()}
        x_BSD, _ = jax.lax.scan(group, x_BSD, groups)
    for i in range(scanned, len(attends)):
        x_BSD = run(at(stacked, i), x_BSD, attends[i])
    return x_BSD


def finite_branches(block_grads):
    """bool [L, 2]: is the gradient of every parameter of this layer's branches finite?

    block_grads: the gradients of `Blocks`, each [L, ...].
    """
    finite = {name: jnp.isfinite(g).all(axis=tuple(range(1, g.ndim))) for name, g in block_grads.items()}

    def of(branch):
        return functools.reduce(jnp.logical_and, (f for name, f in finite.items() if LAYER[name].branch == branch))

    return jnp.stack([of(branch) for branch in BRANCHES], axis=-1)
