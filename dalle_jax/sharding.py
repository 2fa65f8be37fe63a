"""The device mesh and the table from logical axis names to mesh axes.

The only place that knows the mesh: models and losses say 'embed' or 'batch', never 'fsdp'. The mesh has three axes,
`replica` x `fsdp` x `tensor`: parameters are cut along fsdp (inside a fast island of devices) and tensor, and repeated
along replica; the batch is cut along replica and fsdp. Knows nothing of any model.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle_jax.errors import UserError

MESH_AXES = ("replica", "fsdp", "tensor")

# Logical name -> mesh axes. A dimension named None, or of a size its mesh axes do not divide, is not cut; a mesh axis
# serves only the first dimension of an array that asks for it.
TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "sequence": (),
    "layers": (),
    "embed": ("fsdp",),  # a parameter's model width
    "embed_activation": (),  # an activation's model width
    "mlp": ("tensor",),
    "qkv": (),
    "heads": ("tensor",),
    "head": (),
    "vocab": ("tensor",),
    "image_input": (),  # rows of the image embedding: the codes and one more, so nothing divides them
    "position": (),
    "in": ("fsdp",),  # channels of a convolution
    "out": ("tensor",),
}


def make_mesh(sizes: Mapping[str, int], *, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of these sizes over `devices` (default: all). One size may be -1: what is left over.

    Raises:
      UserError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    unknown = sorted(set(sizes) - set(MESH_AXES))
    free = [axis for axis in MESH_AXES if shape[axis] == -1]
    if unknown or len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise UserError(
            f"mesh must give positive sizes for {', '.join(MESH_AXES)}, one of them -1 at most, got {dict(sizes)}"
        )
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if int(np.prod(list(shape.values()))) != len(devices):
        raise UserError(
            f"mesh {dict(sizes)} does not fit {len(devices)} device(s): "
            "the sizes must multiply to that number (-1 means what is left over)"
        )
    return jax.make_mesh(
        tuple(shape.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> PartitionSpec:
    """Which mesh axes cut which dimension of an array of this shape.

    Raises:
      ValueError: a name that is not in TABLE, or another number of names than dimensions.
    """
    if len(names) != len(shape):
        raise ValueError(f"axes {names} must name every dimension of shape {shape}")
    used: set[str] = set()
    cuts = []
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in TABLE:
            raise ValueError(f"unknown logical axis {name!r}: add it to sharding.TABLE or use one of {tuple(TABLE)}")
        axes = tuple(a for a in TABLE.get(name, ()) if a not in used and mesh.shape[a] > 1)
        if axes and size % int(np.prod([mesh.shape[a] for a in axes])) == 0:
            used.update(axes)
            cuts.append(axes)
        else:
            cuts.append(None)
    return PartitionSpec(*cuts)


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


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Pin the layout of an activation by logical names; does nothing where no mesh is in use (`use`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh))


def use(mesh: Mesh):
    """Context for tracing: `constrain` refers to this mesh inside."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_ways(mesh: Mesh) -> int:
    """Number of pieces a batch is cut into: every batch size must be a multiple of it."""
    return int(np.prod([mesh.shape[axis] for axis in TABLE["batch"]]))


def batch_reader(
    mesh: Mesh,
    *,
    process: int | None = None,
    owner: Callable[[jax.Device], int] = operator.attrgetter("process_index"),
) -> tuple[int, int]:
    """Which part of a batch a process (default: this one) reads, and how many such parts there are.

    Processes whose devices hold the same rows of a batch, as with a tensor axis across processes, read the same part.
    owner: the process of a device.

    Raises:
      UserError: the rows of two processes overlap without being the same.
    """
    place = NamedSharding(mesh, PartitionSpec(TABLE["batch"]))
    rows: dict[int, set[int]] = {}
    for device, (cut,) in place.devices_indices_map((batch_ways(mesh),)).items():
        rows.setdefault(owner(device), set()).add(cut.start or 0)
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != batch_ways(mesh):
        raise UserError(
            f"expected a mesh whose {batch_ways(mesh)} pieces of a batch {len(rows)} processes can share evenly, got "
            f"{dict(mesh.shape)}: choose a tensor size that divides the devices of a process, or the other way round"
        )
    own = rows[jax.process_index() if process is None else process]
    return parts.index(tuple(sorted(own))), len(parts)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch -> global device arrays, cut along their first dimension."""
    place = NamedSharding(mesh, PartitionSpec(TABLE["batch"]))
    return {name: jax.make_array_from_process_local_data(place, value) for name, value in batch.items()}
