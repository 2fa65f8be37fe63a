"""PowerSGD across the replica axis: slices exchange two thin factors of a gradient instead of the gradient itself
(Vogels et al. 2019; Ramesh et al. 2021, section 2.5 and appendix E).

Every hidden matrix is cut into as many pieces as a replica has devices, along its longer side, and each piece M is
compressed by itself, on its device, with the same device of the other replicas:

    M = what was left out before + the replica's gradient        P = orthonormal columns of mean(M Q0)
    Q = mean(M^T P)      gradient of the update = P Q^T          left out now = M - P Q^T

Q0 is drawn once for all updates: drawn anew it hurts a lot, carried over it is no better. All other parameters
(embeddings, output heads, gains, biases) are averaged in float32. An update that is skipped leaves what was left out
as it was. Both means and what is left out are kept in one format, both computed from the same rounded factors, so
rounding errors of the exchange are made up for too.

Where the paper leaves a choice, or needs hand-tuned constants: P is divided by its root mean square before eps is added
to its diagonal, whatever the size of the gradients; columns are made orthonormal by Householder's QR; a mean is taken
in float32 of values sent in 16 bits, by an all-to-all and an all-gather, which move what a ring's all-reduce would.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax import sharding
from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.sharding import INSIDE, REPLICA
from dalle_jax.train.optimizer import formats, matrices, moments
from dalle_jax.train.optimizer.loss_scale import all_finite

FORMATS = ("fp32", "bf16", "paper")
EPSILON = 1e-6  # added to P's diagonal, so that its columns are independent (appendix E)
REPLICAS, LEFT_OUT = 2**31 - 2, 2**31 - 3  # folded into an update's key, numbers that no microbatch has
KEY = 0x9051  # of Q0, which the layers of a stacked parameter share
Error = dict[str, jax.Array]
Gradients = Callable[[Any, jax.Array], tuple[Any, Any]]  # (batch, key) -> (gradients, metrics)
# Of three thin products, for which the paper wants float32: an accelerator must not round factors to bfloat16 or TF32.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Compression:
    """Compression of gradients between replicas."""

    # Of all pieces of a matrix together, a multiple of their number; None compresses nothing. The paper's are 512, 640
    # and 896 for its models of 2.8, 5.6 and 12 billion parameters (Table 1).
    rank: int | None = None
    format: str = "bf16"  # of what is sent and of what is left out: 'fp32', 'bf16' or 'paper' (1-6-9)

    def __post_init__(self):
        check_number("config.compression.rank", self.rank, min=1, max=2**20, whole=True, optional=True)
        check_choice("config.compression.format", self.format, FORMATS)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The layout of a parameter of this shape as [matrices, pieces, rows, columns], rows <= columns.

    inputs, outputs: the dimensions that are the sides of a matrix; the others stack matrices. count: of pieces.
    max_rank: of a piece.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    count: int
    max_rank: int

    @property
    def sides(self) -> tuple[int, int]:
        """Inputs and outputs of a matrix."""
        inputs, outputs = (math.prod(self.shape[i] for i in part) for part in (self.inputs, self.outputs))
        return inputs, outputs

    @property
    def piece(self) -> tuple[int, int]:
        """Rows and columns."""
        sides = min(self.sides), max(self.sides) // self.count
        return min(sides), max(sides)

    @property
    def rank(self) -> int:
        return min(self.max_rank, self.piece[0])

    @property
    def matrices(self) -> int:
        return math.prod(self.shape) // math.prod(self.sides)

    def flat(self, x):
        """[*shape] -> [matrices, inputs, outputs]."""
        inside = *self.inputs, *self.outputs
        stacked = (i for i in range(len(self.shape)) if i not in inside)
        return x.transpose(*stacked, *inside).reshape(-1, *self.sides)

    def split(self, x):
        """[matrices, inputs, outputs] -> [matrices, pieces, rows, columns]. The longer side is cut."""
        inputs, outputs = self.sides
        if inputs > outputs:
            x = x.reshape(-1, self.count, inputs // self.count, outputs)
        else:
            x = x.reshape(-1, inputs, self.count, outputs // self.count).swapaxes(1, 2)
        return x if x.shape[2] <= x.shape[3] else x.swapaxes(2, 3)


def layouts(abstract: Any, axes: Any, *, compression: Compression, mesh: Any) -> dict[str, Pieces]:
    """The pieces of every parameter that is compressed, by `name`.

    abstract: nested dict of things with a shape; axes: the names of their dimensions; mesh: its sizes count alone.

    Raises:
      UserError: a mesh without replicas, or a rank that its devices cannot share.
    """
    replicas, count = mesh.shape[REPLICA], math.prod(mesh.shape[axis] for axis in INSIDE)
    if replicas == 1:
        raise UserError(
            "expected several replicas with config.compression.rank, between which gradients are compressed, got "
            f"{dict(mesh.shape)}: set --config.run.mesh.replica, or --config.compression.rank=None"
        )
    if compression.rank % count:
        raise UserError(
            f"expected config.compression.rank to be a multiple of {count}, the devices of a replica, got "
            f"{compression.rank}: choose {max(compression.rank // count, 1) * count}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    names = jax.tree.leaves(axes, is_leaf=matrices.is_names)
    found = {}
    for (path, leaf), dimensions in zip(leaves, names, strict=True):
        split = matrices.dimensions(dimensions)
        if split is None:
            continue
        pieces = Pieces(leaf.shape, split.reduction_axis, split.output_axis, count, compression.rank // count)
        if max(pieces.sides) % count:
            raise UserError(
                f"expected the {count} devices of a replica to share the {max(pieces.sides)} numbers of a side of "
                f"{name(path)}, which they cannot: choose another mesh, or --config.compression.rank=None"
            )
        found[name(path)] = pieces
    return found


class Mean:
    """Gradients without compression: those of the whole batch's loss, which the compiler averages over the devices."""

    replicas = 1  # whose gradients are reduced here
    places: dict[str, NamedSharding] = {}
    packed_abstract: dict[str, jax.ShapeDtypeStruct] = {}

    def init(self) -> Error:
        return {}

    def per_replica(self, gradients: Gradients) -> Gradients:
        return gradients

    def everywhere(self, check: Callable[[Any], jax.Array], grads: Any) -> jax.Array:
        return check(grads)

    def reduce(self, grads: Any, error: Error, key: jax.Array) -> tuple[Any, jax.Array, Error]:
        return grads, optax.tree.norm(grads), error

    def pack(self, error: Error) -> Error:
        return error

    def unpack(self, total: Error) -> Error:
        return total


class PowerSGD:
    """Compression of one model's gradients on one mesh. `error` is what was left out: name -> [replicas, matrices,
    pieces, rows, columns] in the format, its replicas and pieces on their devices."""

    def __init__(self, abstract: Any, axes: Any, *, compression: Compression, mesh: Mesh):
        self.layouts = layouts(abstract, axes, compression=compression, mesh=mesh)
        self.replicas = mesh.shape[REPLICA]
        self._format, self._mesh = compression.format, mesh
        self._whole = PartitionSpec(REPLICA, None, INSIDE)
        places = sharding.shardings(abstract, axes, mesh)
        self._param = {name(path): place for path, place in jax.tree_util.tree_leaves_with_path(places)}

    def init(self) -> Error:
        """Nothing left out yet."""
        dtype = jnp.float32 if self._format == "fp32" else jnp.uint16
        return {n: jnp.zeros(self._shape(pieces), dtype) for n, pieces in self.layouts.items()}

    def _shape(self, pieces: Pieces) -> tuple[int, ...]:
        return self.replicas, pieces.matrices, pieces.count, *pieces.piece

    @property
    def places(self) -> dict[str, NamedSharding]:
        """Shardings of the error."""
        return {n: NamedSharding(self._mesh, self._whole) for n in self.layouts}

    def per_replica(self, gradients: Gradients) -> Gradients:
        """The function that computes gradients of each replica's part of the batch, [replicas, ...], and mean metrics.

        gradients: (batch, key) -> (gradients, metrics) of a batch.
        """

        def of_each(batch, key):
            parts = jax.tree.map(lambda x: x.reshape(self.replicas, -1, *x.shape[1:]), batch)
            place = PartitionSpec(*sharding.TABLE["batch"])
            parts = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), parts)
            keys = jax.random.split(jax.random.fold_in(key, REPLICAS), self.replicas)
            with sharding.independent(REPLICA):
                grads, metrics = jax.vmap(gradients, spmd_axis_name=REPLICA)(parts, keys)
            return grads, jax.tree.map(lambda x: x.mean(0), metrics)

        return of_each

    def everywhere(self, check: Callable[[Any], jax.Array], grads: Any) -> jax.Array:
        """Whether `check`, an array of bool, holds for the gradients of every replica."""
        return jax.vmap(check)(grads).all(0)

    def reduce(self, grads: Any, error: Error, key: jax.Array) -> tuple[Any, jax.Array, Error]:
        """The gradient of the update, its norm (infinite if any replica's is not finite), and what is left out then.

        grads: nested dict of float32 [replicas, ...]. key: of the update, for rounding what is left out.
        """
        in_range, key = all_finite(grads), jax.random.fold_in(key, LEFT_OUT)
        leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
        grads = {name(path): g for path, g in leaves}

        def each(function, n):
            return jax.vmap(functools.partial(function, n), spmd_axis_name=REPLICA)(grads[n])

        # Only the part that a device keeps crosses to the other replicas.
        means = {n: each(self._kept, n).mean(0) for n in grads if n not in self.layouts}
        squares = [jnp.square(g).sum() for g in means.values()]
        cut = {n: each(self._split, n) for n in self.layouts}
        local = jax.shard_map(
            self._exchange_pieces,
            mesh=self._mesh,
            in_specs=(self._whole, self._whole, PartitionSpec()),
            out_specs=(PartitionSpec(None, INSIDE), self._whole, PartitionSpec()),
            check_vma=False,  # what is gathered from all replicas is the same on all
        )
        decompressed, left_out, square = local(cut, error, key)
        means |= {n: self._join(n, x) for n, x in decompressed.items()}
        norm = jnp.where(in_range, jnp.sqrt(sum(squares) + square), jnp.inf)
        return jax.tree.unflatten(structure, [means[n] for n in grads]), norm, left_out

    def _kept(self, n: str, x):
        return self._pin(x, self._param[n].spec)

    def _split(self, n: str, x):
        """A parameter's array in pieces, each on its device. Pinned on the way, so that it moves there at once."""
        x = self._pin(self.layouts[n].flat(self._kept(n, x)), self._flat(n))
        return self._pin(self.layouts[n].split(x), PartitionSpec(None, INSIDE))

    def _join(self, n: str, x):
        """The inverse of `_split`, which is its transpose, as nothing but places change."""
        whole = jax.ShapeDtypeStruct(self.layouts[n].shape, x.dtype)
        return jax.linear_transpose(functools.partial(self._split, n), whole)(x)[0]

    def _flat(self, n: str) -> PartitionSpec:
        """The place of a parameter as [matrices, inputs, outputs]: a side is cut as the first of its dimensions is."""
        spec, pieces = self._param[n].spec, self.layouts[n]
        return PartitionSpec(None, spec[pieces.inputs[0]], spec[pieces.outputs[0]])

    def _pin(self, x, spec: PartitionSpec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, spec))

    def _exchange_pieces(self, grads, error, key):
        """On one device: its piece of every matrix, [1, matrices, 1, rows, columns] each."""
        here, replica = jax.lax.axis_index(INSIDE), jax.lax.axis_index(REPLICA)
        gradient, left_out, square = {}, {}, jnp.float32(0)
        for index, (n, pieces) in enumerate(self.layouts.items()):
            matrix = _read(error[n][0, :, 0], self._format) + grads[n][0, :, 0]  # [matrices, rows, columns]
            key_q = jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), index), here)
            rows, columns = pieces.piece
            q = jax.random.normal(key_q, (columns, pieces.rank)) / columns**0.5
            p = self._mean(_product("src,ck->srk", matrix, q))
            size = jnp.sqrt(jnp.square(p).mean((1, 2), keepdims=True))
            p = jnp.where(size > 0, p / jnp.where(size > 0, size, 1.0), 0.0)
            p += EPSILON * jnp.eye(rows, pieces.rank)[None]
            p = _read(_written(jnp.linalg.qr(p)[0], self._format), self._format)
            q = self._mean(_product("src,srk->sck", matrix, p))
            gradient[n] = _product("srk,sck->src", p, q)[:, None]
            square += jnp.square(q).sum()  # P is orthonormal
            random = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, index), here), replica)
            left_out[n] = _written(matrix - gradient[n][:, 0], self._format, random)[None, :, None]
        return gradient, left_out, jax.lax.psum(square, INSIDE)

    def _mean(self, x):
        """Over the replicas, sent in the format, summed in float32, and the same bits on all of them."""
        if self._format == "fp32":
            return jax.lax.pmean(x, REPLICA)
        parts = jnp.pad(x.reshape(-1), (0, -x.size % self.replicas)).reshape(self.replicas, -1)
        sent = _written(parts, self._format)
        mine = jax.lax.all_to_all(sent, REPLICA, split_axis=0, concat_axis=0)  # my part from every replica
        mean = _written(_read(mine, self._format).mean(0), self._format)
        whole = jax.lax.all_gather(mean, REPLICA, tiled=True)
        return _read(whole, self._format)[: x.size].reshape(x.shape)

    @property
    def packed_abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The result of `pack`, as shapes with shardings."""
        return {
            n: jax.ShapeDtypeStruct(pieces.shape, jnp.float32, sharding=self._param[n])
            for n, pieces in self.layouts.items()
        }

    @functools.cached_property
    def pack(self) -> Callable[[Error], Error]:
        """An error as checkpoints hold it: the sum over the replicas, float32, in the shapes of the parameters.

        An update depends on the mean over the replicas alone, so nothing is lost but rounding.
        """

        def pack(error):
            return {n: self._join(n, _read(x, self._format).sum(0)) for n, x in error.items()}

        return jax.jit(pack, out_shardings={n: self._param[n] for n in self.layouts})

    @functools.cached_property
    def unpack(self) -> Callable[[Error], Error]:
        """The error on any number of replicas and pieces, from a checkpoint's sum."""

        def unpack(total):
            each = {n: _written(self._split(n, x) / self.replicas, self._format) for n, x in total.items()}
            return {n: jnp.broadcast_to(x, self._shape(self.layouts[n])) for n, x in each.items()}

        return jax.jit(unpack, out_shardings=self.places)


def name(path) -> str:
    """The name of a parameter, e.g. 'blocks-up'."""
    return jax.tree_util.keystr(path, simple=True, separator="-")


def sent_numbers(found: dict[str, Pieces]) -> tuple[int, int]:
    """Numbers that a device averages over the replicas in an update, of P and Q, and in place of how many."""
    sent = sum(pieces.matrices * pieces.rank * sum(pieces.piece) for pieces in found.values())
    return sent, sum(pieces.matrices * math.prod(pieces.piece) for pieces in found.values())


def check_rank(found: dict[str, Pieces], *, form: str, item: int) -> None:
    """Raises UserError for factors that have no fewer bytes than the gradients, or that hold all of them.

    form: of what is sent. item: bytes of a number of a gradient that is not compressed.
    """
    sent, instead = sent_numbers(found)
    wire = 4 if form == "fp32" else 2
    if sent * wire >= instead * item or all(pieces.rank == pieces.piece[0] for pieces in found.values()):
        of_rank_one = sum(pieces.matrices * sum(pieces.piece) for pieces in found.values())
        max_rank = min(
            (instead * item - 1) // (of_rank_one * wire), max(pieces.piece[0] for pieces in found.values()) - 1
        )
        max_rank *= next(iter(found.values())).count
        raise UserError(
            f"expected a config.compression.rank that leaves something out, got one with {sent * wire:,} bytes a "
            f"device in place of {instead * item:,}: choose at most {max_rank}, or None to compress nothing"
        )


def _written(x, form: str, key=None):
    """float32 -> the format; to the nearest, or at random with the right mean where there is a key.

    16 bits are written as uint16: some backends widen bfloat16 before they send it.
    """
    if form == "paper":
        return formats.encode(x, formats.FIRST, key)
    if form == "fp32":
        return x
    rounded = x.astype(jnp.bfloat16) if key is None else moments.round_at_random(x, key)
    return jax.lax.bitcast_convert_type(rounded, jnp.uint16)


def _read(x, form: str):
    """The inverse of `_written`."""
    if form == "paper":
        return formats.decode(x, formats.FIRST)
    return x if form == "fp32" else jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)
