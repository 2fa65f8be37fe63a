"""Devices that must hold the same bits: one flipped bit is found, named, and never saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dalle_jax.checkpoint import reader
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.train.monitor import replicas
from tests.support.line_task import train


def with_a_flipped_bit(array, device, *, bit=3, place=0):
    """The same array, but that one device's own copy differs in one bit."""
    pieces = []
    for shard in array.addressable_shards:
        data = bytearray(np.asarray(shard.data).tobytes())
        if shard.device.id == device:
            data[place] ^= 1 << bit
        piece = np.frombuffer(data, shard.data.dtype).reshape(shard.data.shape)
        pieces.append(jax.device_put(piece, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def placed(tree, sizes, specs):
    mesh = make_mesh(sizes)
    places = {name: NamedSharding(mesh, PartitionSpec(*specs[name])) for name in tree}
    state = {name: jax.device_put(value, places[name]) for name, value in tree.items()}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return state, replicas.make_check(abstract, mesh=mesh)


TREE = {
    "matrix": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32),
    "half": np.arange(6).astype(jnp.bfloat16),
    "count": np.int32(7),
}
SPECS = {"matrix": ("fsdp", "tensor"), "half": (), "count": ()}


@pytest.mark.parametrize(
    "sizes", [{"replica": 4, "fsdp": 2}, {"replica": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str
)
def test_a_flipped_bit_on_one_device_is_found_and_named(sizes):
    state, check = placed(TREE, sizes, SPECS)
    check(state, 5)
    for name, bit, place in [("matrix", 0, 0), ("matrix", 7, 7), ("half", 6, 3), ("count", 5, 2)]:
        if name == "matrix" and sizes.get("replica", 1) == 1:
            continue  # every piece exists once
        broken = state | {name: with_a_flipped_bit(state[name], 3, bit=bit, place=place)}
        with pytest.raises(
            UserError, match=rf"copies of {name} after .* 5, got (other|different) bits .*device 3 of p"
        ):
            check(broken, 5)


def test_among_three_and_more_only_the_odd_one_is_named():
    state, check = placed(TREE, {"replica": 4, "fsdp": 2}, SPECS)
    with pytest.raises(UserError, match="got other bits on device 3 of process 0: "):
        check(state | {"matrix": with_a_flipped_bit(state["matrix"], 3)}, 5)


def test_a_run_stops_before_it_saves_what_differs(tmp_path):
    mesh = make_mesh({"replica": 4, "fsdp": 2})

    def corrupt(n, state):
        if n == 7:
            state["params"]["matrix"] = with_a_flipped_bit(state["params"]["matrix"], 5)

    with pytest.raises(UserError, match="device 5 of process 0"):
        train(tmp_path, mesh=mesh, hooks=[(1, corrupt)], check_replicas_every=100)
    assert reader.complete_steps(tmp_path) == [4]
