"""Where an array lies: the table from logical axis names to mesh axes, and what follows from it.

Models and losses say 'embed' or 'batch', never 'fsdp'. The mesh has three axes, `replica` x `fsdp` x `tensor`:
parameters are cut along fsdp and tensor and repeated along replica; the batch is cut along replica and fsdp. `mesh.py`
chooses the sizes. Knows nothing of any model.
"""

import contextlib
import contextvars
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.errors import UserError

MESH_AXES = REPLICA, FSDP, TENSOR = ("replica", "fsdp", "tensor")
INSIDE = (FSDP, TENSOR)  # mesh axes inside a replica
HOST = "pinned_host"  # kind of memory

# Logical name -> mesh axes. A dimension named None, or of a size its mesh axes do not divide, is not cut; a mesh axis
# serves only the first dimension of an array that asks for it.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": (REPLICA, FSDP),
    "sequence": (),
    "layers": (),
    "embed": (FSDP,),  # a parameter's model width
    "embed_activation": (),  # an activation's model width
    "mlp": (TENSOR,),
    "qkv": (),
    "heads": (TENSOR,),
    "head": (),
    "vocab": (TENSOR,),
    "image_input": (),  # rows of the image embedding: the image tokens and one more, so nothing divides them
    "position": (),
    "in": (FSDP,),  # channels of a convolution
    "out": (TENSOR,),
}


# Mesh axes along which the function that is being traced runs once for each position (`independent`).
_INDEPENDENT: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("independent", default=())


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> PartitionSpec:
    """The mesh axes that cut each dimension of an array of this shape.

    Raises:
      ValueError: a name that is not in TABLE, or another number of names than dimensions.
    """
    if len(names) != len(shape):
        raise ValueError(f"axes {names} must name every dimension of shape {shape}")
    return PartitionSpec(*(cut or None for cut in _cuts(shape, names, mesh)))


def _cuts(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> list[tuple[str, ...]]:
    """The mesh axes that cut each dimension."""
    used: set[str] = set()
    cuts: list[tuple[str, ...]] = []
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in TABLE:
            raise ValueError(f"unknown logical axis {name!r}: add it to sharding.TABLE or use one of {tuple(TABLE)}")
        axes = tuple(a for a in _axes(name) if a not in used and mesh.shape[a] > 1)
        cuts.append(axes if size % math.prod(mesh.shape[a] for a in axes) == 0 else ())
        used.update(cuts[-1])
    return cuts


def cutting_axes(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> set[str]:
    """The mesh axes that cut any dimension of an array."""
    return {axis for cut in _cuts(shape, names, mesh) for axis in cut}


def shardings(abstract: Any, axes: Any, mesh: Mesh) -> Any:
    """NamedSharding for each leaf. `abstract`: nested dict of things with a shape; `axes`: the names at each leaf."""
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(leaf.shape, names, mesh)), abstract, axes)


def like_params(tree: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds copies of the parameters, such as an optimizer state.

    A leaf whose path ends in a parameter's path and that has its rank is cut like it; the rest is replicated.
    """
    known = {tuple(map(str, path)): value for path, value in jax.tree_util.tree_leaves_with_path(param_shardings)}

    def choose(path, leaf):
        names = tuple(map(str, path))
        for start in range(len(names)):
            found = known.get(names[start:])
            if found is not None and len(found.spec) == leaf.ndim:
                return found
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(choose, tree)


def on_host(place: NamedSharding) -> NamedSharding:
    """The same cut, in the hosts' memory."""
    return place.with_memory_kind(HOST)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """An array whose first dimension is a batch, cut along it."""
    return NamedSharding(mesh, PartitionSpec(TABLE["batch"]))


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Pin the layout of an activation by logical names; does nothing where no mesh is in use (`use`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))


def kept_part(
    shape: tuple[int, ...], names: tuple[str | None, ...], *, batch: int
) -> tuple[int, tuple[str, ...]] | None:
    """The dimension of a parameter that is cut along axes which also cut a batch of this size, and those axes.

    Its gradient is summed over the devices, and each of them keeps one part (`sum_by_parts`). None where nothing is
    cut so, no mesh is in use (`use`), or a tensor axis cuts the gradient too: those sums are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(size > 1 for axis, size in mesh.shape.items() if axis not in TABLE["batch"]):
        return None
    if batch % math.prod(mesh.shape[axis] for axis in _axes("batch")):
        return None
    return next(((i, cut) for i, cut in enumerate(_cuts(shape, names, mesh)) if cut), None)


def sum_by_parts(product: Callable[..., jax.Array], *factors: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """product(*factors, parts), a sum over the first dimension of the factors, the batch: each device sums its rows,
    then all of them together, and of the result, whose first dimension has `parts` entries, each receives one.

    axes: of `kept_part`; parts is how many devices lie along them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    copies = tuple(axis for axis in _axes("batch") if axis not in axes)

    def device_part(*pieces):
        part = jax.lax.psum_scatter(product(*pieces, parts), axes, tiled=True)
        return jax.lax.psum(part, copies) if copies else part

    rows, part = PartitionSpec(_axes("batch")), PartitionSpec(axes)
    return jax.shard_map(device_part, mesh=mesh, in_specs=(rows,) * len(factors), out_specs=part)(*factors)


def per_device(
    function: Callable[..., Any],
    *arrays: jax.Array,
    names: Sequence[tuple[str | None, ...]],
    results: Sequence[tuple[str | None, ...]],
) -> Any:
    """function(*arrays) on each device's pieces of them, for what the compiler cannot cut by itself, such as kernels.

    names, results: logical names of the dimensions of every array and of every result; what has the same name is cut
    alike. The whole arrays go in where no mesh is in use (`use`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arrays)
    cuts: dict[str | None, Any] = {}
    for array, named in zip(arrays, names, strict=True):
        cuts |= zip(named, spec(array.shape, named, mesh), strict=True)

    def specs(many):
        return tuple(PartitionSpec(*(cuts[name] for name in named)) for named in many)

    local = jax.shard_map(function, mesh=mesh, in_specs=specs(names), out_specs=specs(results), check_vma=False)
    return local(*arrays)


def use(mesh: Mesh):
    """Context for tracing: `constrain` refers to this mesh inside."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


@contextlib.contextmanager
def independent(axis: str):
    """Context for tracing what `jax.vmap(..., spmd_axis_name=axis)` maps: inside, that mesh axis cuts nothing."""
    token = _INDEPENDENT.set((axis,))
    try:
        yield
    finally:
        _INDEPENDENT.reset(token)


def _axes(name: str | None) -> tuple[str, ...]:
    """Mesh axes of a logical name, but for independent ones."""
    return tuple(axis for axis in TABLE.get(name or "", ()) if axis not in _INDEPENDENT.get())


def batch_ways(mesh: Mesh) -> int:
    """Number of pieces a batch is cut into: every batch size must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in TABLE["batch"])


def batch_share(
    mesh: Mesh,
    *,
    process: int | None = None,
    owner: Callable[[jax.Device], int] = operator.attrgetter("process_index"),
) -> tuple[int, int]:
    """The part of a batch that a process (default: this one) reads, and the number of such parts.

    Processes whose devices hold the same rows of a batch, as with a tensor axis across processes, read the same part.
    owner: the process of a device.

    Raises:
      UserError: the rows of two processes overlap without being the same.
    """
    place = batch_sharding(mesh)
    rows: dict[int, set[int]] = {}
    for device, (cut,) in place.devices_indices_map((batch_ways(mesh),)).items():
        rows.setdefault(owner(device), set()).add(cut.start or 0)
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != batch_ways(mesh):
        raise UserError(
            f"expected a mesh whose {batch_ways(mesh)} pieces of a batch {len(rows)} processes can share evenly, got "
            f"{dict(mesh.shape)}: choose a tensor size that divides the devices of a process, or the other way round"
        )
    read = rows[jax.process_index() if process is None else process]
    return parts.index(tuple(sorted(read))), len(parts)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch -> global device arrays, cut along their first dimension."""
    place = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(place, value) for name, value in batch.items()}


def in_batches(function: Callable[..., Any], *arrays: np.ndarray, size: int) -> Any:
    """function(*arrays) over N rows, computed `size` rows at a time so that one shape is compiled, whatever N.

    The last batch is filled up (`fill_rows`). A row's result must not depend on its neighbors.

    Returns: what the function returns, an array or nested containers of arrays, as numpy arrays of N rows.
    """
    count = len(arrays[0])
    results = []
    for start in range(0, max(count, 1), size):
        rows = min(size, count - start)
        batch = function(*(fill_rows(array[start : start + size], size) for array in arrays))
        results.append(jax.tree.map(lambda x, rows=rows: np.asarray(x)[:rows], batch))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def fill_rows(array: np.ndarray, size: int) -> np.ndarray:
    """The array with rows of zeros appended, so that it has `size` of them."""
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])
