"""The device mesh and the table from logical axis names to mesh axes.

The only place that knows the mesh: models and losses say 'embed' or 'batch', never 'fsdp'. The mesh has three axes,
`replica` x `fsdp` x `tensor`: parameters are cut along fsdp and tensor and repeated along replica; the batch is cut
along replica and fsdp. An island is a set of devices with a fast network of their own (a TPU slice, the GPUs of a
machine): fsdp inside islands and replica across them is the hybrid layout, fsdp over all devices is full sharding.
Knows nothing of any model.
"""

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dalle_jax.errors import UserError

MESH_AXES = ("replica", "fsdp", "tensor")
HOST = "pinned_host"  # kind of memory
CHOOSE = -1  # a size that is left to `make_mesh`
WHOLE_SHARE = 0.05  # a mesh axis that fails to cut more of the parameters than this is refused
NEAREST = 3  # possible layouts that a refusal names

Shape = tuple[int, int, int]  # sizes in the order of MESH_AXES

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


# Mesh axes along which the function that is being traced runs once for each position (`independent`).
_INDEPENDENT: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("independent", default=())


def make_mesh(
    sizes: Mapping[str, int],
    *,
    devices: Sequence[jax.Device] | None = None,
    unfit: Callable[[Shape], str | None] = lambda shape: None,
) -> Mesh:
    """The mesh of these sizes over `devices` (default: all), each -1 replaced by a chosen size.

    A single -1 is what is left over. Of several, tensor becomes 1 and fsdp the largest size that keeps fsdp x tensor
    inside an island (`island_size`), so that `replica` -1, `fsdp` -1 is the hybrid layout and `replica` 1, `fsdp` -1
    full sharding. A slow network is crossed by replica first, then by fsdp; tensor stays inside an island if it can.

    unfit: what is wrong with a layout for the model and batch at hand (`demand`), None if nothing. Such layouts are
      neither chosen nor accepted.

    Raises:
      UserError: an unknown axis, sizes that do not multiply to the number of devices, or an unfit layout; with the
        nearest possible layouts.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = choose(sizes, len(devices), island_size(devices), unfit=unfit)
    return Mesh(_arranged(shape, tuple(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def choose(
    sizes: Mapping[str, int], count: int, island: int, *, unfit: Callable[[Shape], str | None] = lambda shape: None
) -> Shape:
    """The shape that `make_mesh` gives this number of devices in islands of `island`; raises the same."""
    wanted = tuple(int(sizes.get(axis, 1)) for axis in MESH_AXES)
    if set(sizes) - set(MESH_AXES) or any(size < 1 and size != CHOOSE for size in wanted):
        raise UserError(
            f"mesh must give {', '.join(MESH_AXES)} positive sizes, or {CHOOSE} to choose one, got {dict(sizes)}"
        )
    shapes = _layouts(count, island)
    matching = [s for s in shapes if all(w in (CHOOSE, size) for w, size in zip(wanted, s, strict=True))]
    for shape in matching:
        if unfit(shape) is None:
            return shape
    if matching:  # what is wrong with the sizes that were asked for, whatever the others become
        reason = unfit(tuple(1 if size == CHOOSE else size for size in wanted)) or unfit(matching[0])
    else:
        reason = f"the sizes must multiply to {count}, along islands of {island}"
    by_distance = lambda s: (round(_distance(wanted, s), 6), 0 if wanted[1] == CHOOSE else s[1])  # noqa: E731
    near = sorted(possible(count, island, unfit=unfit), key=by_distance)[:NEAREST]
    offer = f"the nearest possible: {', or '.join(map(_text, near))}" if near else "no other layout is possible either"
    raise UserError(f"mesh {_text(wanted)} does not fit {count} device(s): {reason}; {offer}")


def possible(count: int, island: int, *, unfit: Callable[[Shape], str | None]) -> list[Shape]:
    """Every shape that `choose` accepts for this number of devices in islands of `island`, the best first."""
    return [shape for shape in _layouts(count, island) if unfit(shape) is None]


def demand(abstract: Any, axes: Any, *, batch_size: int, accumulate: int = 1) -> Callable[[Shape], str | None]:
    """What a model and its batch ask of a layout, for `make_mesh(unfit=...)`.

    abstract: nested dict of things with a shape; axes: the names at each leaf. A layout is unfit if the batch does
    not divide into microbatches and devices, or if a mesh axis cannot cut more than WHOLE_SHARE of the parameters
    that ask for it, which would silently lie whole on every device of that axis.
    """
    leaves = list(zip(jax.tree.leaves(abstract), jax.tree.structure(abstract).flatten_up_to(axes), strict=True))
    total = sum(math.prod(leaf.shape) for leaf, _ in leaves)

    def unfit(shape: Shape) -> str | None:
        parts = shape[0] * shape[1] * accumulate
        if batch_size % parts:
            return f"a batch_size of {batch_size} is no multiple of {parts} (replica x fsdp x accumulate)"
        mesh = AbstractMesh(shape, MESH_AXES)
        for axis, size in zip(MESH_AXES, shape, strict=True):
            whole = [
                (math.prod(leaf.shape), name, length)
                for leaf, names in leaves
                for name, length in zip(names, leaf.shape, strict=True)
                if axis in TABLE.get(name, ()) and size > 1 and axis not in _used(leaf.shape, names, mesh)
            ]
            if sum(count for count, *_ in whole) > WHOLE_SHARE * total:
                _, name, length = max(whole)
                return f"{axis} {size} does not divide {length} ({name!r}), so large arrays would stay whole"
        return None

    return unfit


def island_size(devices: Sequence[jax.Device]) -> int:
    """Devices that share a fast network: of one slice (TPU slice, NVLink domain) where there are several, all of a
    TPU slice, else those of one process; 1 process or 1 device each: all."""
    return len(devices) // len({_island(device, devices) for device in devices})


def describe(mesh: Mesh) -> str:
    """One line for the person who started a run, e.g. 'mesh replica 8 x fsdp 8 x tensor 1 on 64 devices'."""
    devices = list(mesh.devices.flat)
    return f"mesh {_text(mesh.devices.shape)} on {len(devices)} device(s) in islands of {island_size(devices)}"


def _island(device: jax.Device, devices: Sequence[jax.Device]) -> int:
    if len({_slice(d) for d in devices}) > 1:
        return _slice(device)
    processes = {d.process_index for d in devices}
    one_each = len(processes) == len(devices)
    return 0 if device.platform == "tpu" or one_each else device.process_index


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _layouts(count: int, island: int) -> list[Shape]:
    """All sizes that multiply to this number of devices and lie along the islands, the best first: the least tensor
    parallelism, then the most of an island, then the least of what exceeds it."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    shapes = [(count // f // t, f, t) for f in divisors for t in divisors if count % (f * t) == 0]
    along = [shape for shape in shapes if _along_islands(shape, island)]
    return sorted(along, key=lambda s: (s[2], (0, -s[1]) if s[1] * s[2] <= island else (1, s[1])))


def _inside(shape: Shape, island: int) -> Shape:
    """The part of each axis that lies inside an island: as much of tensor as possible, then of fsdp."""
    tensor = math.gcd(shape[2], island)
    fsdp = math.gcd(shape[1], island // tensor)
    return island // (fsdp * tensor), fsdp, tensor


def _along_islands(shape: Shape, island: int) -> bool:
    return shape[0] % _inside(shape, island)[0] == 0


@functools.lru_cache(maxsize=64)  # seconds for a thousand devices, and preflight asks for the same shapes again
def _arranged(shape: Shape, devices: tuple[jax.Device, ...]) -> np.ndarray:
    return _arrange(shape, devices)


def _arrange(shape: Shape, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of this shape, laid along the machines' networks."""
    islands: dict[int, list] = {}
    for device in devices:
        islands.setdefault(_island(device, devices), []).append(device)
    inside = _inside(shape, len(devices) // len(islands))
    outside = [size // part for size, part in zip(shape, inside, strict=True)]
    grids = [
        mesh_utils.create_device_mesh(inside, islands[index], allow_split_physical_axes=True)
        for index in sorted(islands)
    ]
    order = np.arange(len(grids)).reshape(outside)
    return np.block(np.vectorize(lambda index: grids[index], otypes=[object])(order).tolist())


def _distance(wanted: Sequence[int], shape: Shape) -> float:
    """How far a layout is from what was asked for, in doublings; large sizes of replica are the cheapest to change."""
    asked = [abs(math.log2(size / w)) for w, size in zip(wanted, shape, strict=True) if w != CHOOSE]
    return sum(asked) + 1e-3 * shape[2]


def _text(shape: Sequence[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))


def _used(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> set[str]:
    """Mesh axes that cut an array."""
    cuts = [cut for cut in spec(shape, names, mesh) if cut is not None]
    return {axis for cut in cuts for axis in ((cut,) if isinstance(cut, str) else cut)}


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
        axes = tuple(a for a in _axes(name) if a not in used and mesh.shape[a] > 1)
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


def on_host(place: NamedSharding) -> NamedSharding:
    """The same cut, in the hosts' memory."""
    return place.with_memory_kind(HOST)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


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
    cuts = enumerate(spec(shape, names, mesh))
    return next(((i, (cut,) if isinstance(cut, str) else cut) for i, cut in cuts if cut), None)


def sum_by_parts(product: Callable[..., jax.Array], *factors: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """product(*factors, parts), a sum over the first dimension of the factors, the batch: each device sums its rows,
    then all of them together, and of the result, whose first dimension has `parts` entries, each receives one.

    axes: of `kept_part`; parts is how many devices lie along them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    copies = tuple(axis for axis in _axes("batch") if axis not in axes)

    def own_part(*pieces):
        part = jax.lax.psum_scatter(product(*pieces, parts), axes, tiled=True)
        return jax.lax.psum(part, copies) if copies else part

    rows, part = PartitionSpec(_axes("batch")), PartitionSpec(axes)
    return jax.shard_map(own_part, mesh=mesh, in_specs=(rows,) * len(factors), out_specs=part)(*factors)


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
    for array, own in zip(arrays, names, strict=True):
        cuts |= zip(own, spec(array.shape, own, mesh), strict=True)
    specs = lambda many: tuple(PartitionSpec(*(cuts[name] for name in own)) for own in many)  # noqa: E731
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
    return tuple(axis for axis in TABLE.get(name, ()) if axis not in _INDEPENDENT.get())


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
