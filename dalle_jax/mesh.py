"""The device mesh: which sizes of `replica` x `fsdp` x `tensor` fit these devices, this model and this batch.

A slice is a set of devices with a fast network among them (a TPU slice, an NVLink domain): fsdp inside slices and
replica across them is the hybrid layout, fsdp over all devices is full sharding. `sharding.py` says what the axes cut.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from dalle_jax.errors import UserError
from dalle_jax.sharding import MESH_AXES, REPLICA, TABLE, cutting_axes

CHOOSE = -1  # a size that is left to `make_mesh`
WHOLE_SHARE = 0.05  # a mesh axis that fails to cut more of the parameters than this is refused
NEAREST = 3  # possible layouts that a refusal names

Shape = tuple[int, int, int]  # sizes in the order of MESH_AXES


def make_mesh(
    sizes: Mapping[str, int],
    *,
    devices: Sequence[jax.Device] | None = None,
    unfit: Callable[[Shape], str | None] = lambda shape: None,
) -> Mesh:
    """The mesh of these sizes over `devices` (default: all), each -1 replaced by a chosen size.

    A single -1 is what is left over. Of several, tensor becomes 1 and fsdp the largest size that keeps fsdp x tensor
    inside a slice (`slice_size`), so that `replica` -1, `fsdp` -1 is the hybrid layout and `replica` 1, `fsdp` -1
    full sharding. A slow network is crossed by replica first, then by fsdp; tensor stays inside a slice if it can.

    unfit: the reason why a layout does not fit the model and batch (`demand`), or None. Unfit layouts are neither
      chosen nor accepted.

    Raises:
      UserError: an unknown axis, sizes that do not multiply to the number of devices, or an unfit layout; with the
        nearest possible layouts.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = choose(sizes, len(devices), slice_size(devices), unfit=unfit)
    return Mesh(_arranged(shape, tuple(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def local_mesh() -> Mesh:
    """All devices of this process as replicas."""
    return make_mesh({REPLICA: -1}, devices=jax.local_devices())


def choose(
    sizes: Mapping[str, int], count: int, slice_size: int, *, unfit: Callable[[Shape], str | None] = lambda shape: None
) -> Shape:
    """The shape that `make_mesh` gives this number of devices in slices of `slice_size`; raises the same."""
    wanted = tuple(int(sizes.get(axis, 1)) for axis in MESH_AXES)
    if set(sizes) - set(MESH_AXES) or any(size < 1 and size != CHOOSE for size in wanted):
        raise UserError(
            f"mesh must give {', '.join(MESH_AXES)} positive sizes, or {CHOOSE} to choose one, got {dict(sizes)}"
        )
    shapes = _layouts(count, slice_size)
    matching = [s for s in shapes if all(w in (CHOOSE, size) for w, size in zip(wanted, s, strict=True))]
    for shape in matching:
        if unfit(shape) is None:
            return shape
    if matching:  # the reason against the sizes that were asked for, whatever the others become
        replica, fsdp, tensor = (1 if size == CHOOSE else size for size in wanted)
        reason = unfit((replica, fsdp, tensor)) or unfit(matching[0])
    else:
        reason = f"the sizes must multiply to {count}, along slices of {slice_size}"

    def by_distance(shape):
        return round(_distance(wanted, shape), 6), 0 if wanted[1] == CHOOSE else shape[1]

    near = sorted(possible(count, slice_size, unfit=unfit), key=by_distance)[:NEAREST]
    offer = f"the nearest possible: {', or '.join(map(_text, near))}" if near else "no other layout is possible either"
    raise UserError(f"mesh {_text(wanted)} does not fit {count} device(s): {reason}; {offer}")


def possible(count: int, slice_size: int, *, unfit: Callable[[Shape], str | None]) -> list[Shape]:
    """Every shape that `choose` accepts for this number of devices in slices of `slice_size`, the best first."""
    return [shape for shape in _layouts(count, slice_size) if unfit(shape) is None]


def demand(abstract: Any, axes: Any, *, batch_size: int, accumulate: int = 1) -> Callable[[Shape], str | None]:
    """The requirements of a model and its batch on a layout, for `make_mesh(unfit=...)`.

    abstract: nested dict of things with a shape; axes: the names at each leaf. A layout is unfit if the batch does
    not divide into microbatches and devices, or if a mesh axis cannot cut more than WHOLE_SHARE of the parameters
    that ask for it, which would silently lie whole on every device of that axis.
    """
    names_of = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves = list(zip(jax.tree.leaves(abstract), names_of, strict=True))
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
                if axis in TABLE.get(name, ()) and size > 1 and axis not in cutting_axes(leaf.shape, names, mesh)
            ]
            if sum(count for count, *_ in whole) > WHOLE_SHARE * total:
                _, name, length = max(whole)
                return f"{axis} {size} does not divide {length} ({name!r}), so large arrays would stay whole"
        return None

    return unfit


def slice_size(devices: Sequence[jax.Device]) -> int:
    """Devices that share a fast network: of one slice (TPU slice, NVLink domain) where there are several, all of a
    TPU slice, else those of one process; 1 process or 1 device each: all."""
    return len(devices) // len(set(_slices(devices)))


def describe(mesh: Mesh) -> str:
    """One line for the person who started a run, e.g. 'mesh replica 8 x fsdp 8 x tensor 1 on 64 devices'."""
    devices = list(mesh.devices.flat)
    return f"mesh {_text(mesh.devices.shape)} on {len(devices)} device(s) in slices of {slice_size(devices)}"


def _slices(devices: Sequence[jax.Device]) -> list[int]:
    """Number of the slice of each device."""
    slices = [getattr(device, "slice_index", None) or 0 for device in devices]
    processes = [device.process_index for device in devices]
    one_each = len(set(processes)) == len(devices)
    return slices if len(set(slices)) > 1 or devices[0].platform == "tpu" or one_each else processes


def _layouts(count: int, slice_size: int) -> list[Shape]:
    """All sizes that multiply to this number of devices and lie along the slices, the best first: the smallest tensor,
    then the largest part of a slice, then the smallest fsdp beyond it."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    shapes = [(count // f // t, f, t) for f in divisors for t in divisors if count % (f * t) == 0]
    along = [shape for shape in shapes if shape[0] % _inside(shape, slice_size)[0] == 0]
    return sorted(along, key=lambda s: (s[2], (0, -s[1]) if s[1] * s[2] <= slice_size else (1, s[1])))


def _inside(shape: Shape, slice_size: int) -> Shape:
    """The part of each axis that lies inside a slice: as much of tensor as possible, then of fsdp."""
    tensor = math.gcd(shape[2], slice_size)
    fsdp = math.gcd(shape[1], slice_size // tensor)
    return slice_size // (fsdp * tensor), fsdp, tensor


@functools.lru_cache(maxsize=64)  # seconds for a thousand devices, and preflight asks for the same shapes again
def _arranged(shape: Shape, devices: tuple[jax.Device, ...]) -> np.ndarray:
    """The devices as an array of this shape, laid along the machines' networks."""
    slices: dict[int, list] = {}
    for device, number in zip(devices, _slices(devices), strict=True):
        slices.setdefault(number, []).append(device)
    inside = _inside(shape, len(devices) // len(slices))
    outside = [size // part for size, part in zip(shape, inside, strict=True)]
    grids = [
        mesh_utils.create_device_mesh(inside, slices[index], allow_split_physical_axes=True) for index in sorted(slices)
    ]
    order = np.arange(len(grids)).reshape(outside)
    return np.block(np.vectorize(lambda index: grids[index], otypes=[object])(order).tolist())


def _distance(wanted: Sequence[int], shape: Shape) -> float:
    """The distance of a layout from what was asked for, in doublings; large sizes of replica are cheapest to change."""
    asked = [abs(math.log2(size / w)) for w, size in zip(wanted, shape, strict=True) if w != CHOOSE]
    return sum(asked) + 1e-3 * shape[2]


def _text(shape: Sequence[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
