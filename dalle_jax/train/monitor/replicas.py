"""A check that devices that must hold the same numbers hold the same bits: it finds silent corruption of one.

Every device sums the bit patterns of its pieces of all arrays, each word weighted by an odd number of its place,
modulo 2^32: a single flipped bit always changes the sum. Only the sums leave the devices. Pieces that exist once, on a
mesh that repeats nothing, cannot be checked this way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dalle_jax.errors import UserError


def make_check(abstract: Any, *, mesh: Mesh) -> Callable[[Any, int], None]:
    """`check(state, n)` for states laid out as `abstract` (ShapeDtypeStruct with shardings) says.

    It compiles at its first call, reads the state once and moves 4 bytes a device and array.

    Raises, when called:
      UserError: devices disagree; names them, their processes and an array.
    """
    paths = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in _on_device(abstract)]
    devices = list(mesh.devices.flat)
    groups = [_groups(leaf, devices) for _, leaf in paths]
    specs = tuple(leaf.sharding.spec for _, leaf in paths)
    everywhere = PartitionSpec(mesh.axis_names)

    def sums(*pieces):
        return jnp.stack([_sum(piece) for piece in pieces])[None]

    # Each device sees its copy as it is: outside of shard_map the compiler may take copies for equal.
    local = jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
    digest = jax.jit(local, out_shardings=jax.sharding.NamedSharding(mesh, PartitionSpec()))

    def check(state: Any, n: int) -> None:
        found = np.asarray(digest(*(leaf for _, leaf in _on_device(state))))  # [devices, arrays]
        for index, (name, _) in enumerate(paths):
            for group in groups[index]:
                odd = _odd(found[group, index])
                if len(odd):
                    raise UserError(_message(n, name, [devices[group[i]] for i in odd], len(group)))

    return check


def _on_device(tree: Any) -> list[tuple[Any, Any]]:
    """Leaves with their paths, but for those that live in host memory."""
    kind = jax.devices()[0].default_memory().kind
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, leaf) for path, leaf in leaves if leaf.sharding.memory_kind in (None, kind)]


def _sum(piece: jax.Array) -> jax.Array:
    """uint32: sum of the words' bits, each times an odd number."""
    width = piece.dtype.itemsize
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    if piece.dtype == jnp.bool_:
        piece = piece.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(piece, word).astype(jnp.uint32).reshape(-1)
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def _groups(leaf: Any, devices: list[jax.Device]) -> list[list[int]]:
    """Indices of devices that hold the same piece, groups of two and more."""
    places = leaf.sharding.devices_indices_map(leaf.shape)
    groups: dict[str, list[int]] = {}
    for index, device in enumerate(devices):
        groups.setdefault(str(places[device]), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _odd(sums: np.ndarray) -> np.ndarray:
    """Places of those that differ from the majority; all of them where there is none."""
    values, counts = np.unique(sums, return_counts=True)
    if len(values) == 1:
        return np.array([], int)
    if 2 * counts.max() > len(sums):
        return np.flatnonzero(sums != values[counts.argmax()])
    return np.arange(len(sums))


def _message(n: int, name: str, odd: list[jax.Device], copies: int) -> str:
    named = ", ".join(f"device {device.id} of process {device.process_index}" for device in odd)
    bits = "different bits (which are right is unknown)" if len(odd) == copies else "other bits"
    return (
        f"expected {copies} identical copies of {name} after update {n}, got {bits} on {named}: memory or a "
        "computation there is faulty; take that machine out and give the command again, which goes on from the last "
        "checkpoint"
    )
