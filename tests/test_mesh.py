"""Mesh sizes: what is chosen, what is refused, and how devices lie in it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import _arranged, choose, demand, describe, make_mesh, slice_size


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (1, 8, 1)),
        ({"replica": 2, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": 1, "tensor": 8}, (1, 1, 8)),
        ({"fsdp": 1, "replica": -1}, (8, 1, 1)),
        ({"replica": -1, "fsdp": -1, "tensor": -1}, (1, 8, 1)),
    ],
)
def test_one_size_is_what_is_left_over(sizes, shape):
    mesh = make_mesh({"replica": 1, "fsdp": -1, "tensor": 1} | sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == sharding.MESH_AXES


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"fsdp": -1, "replica": 3}, {"fsdp": 0}, {"model": 8}])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(sizes)


HYBRID = {"replica": -1, "fsdp": -1, "tensor": 1}
WIDE = {"w": jax.ShapeDtypeStruct((96, 3, 6, 8), jnp.float32)}  # six heads, width 96 = 32 * 3
NAMES = {"w": ("embed", "qkv", "heads", "head")}


@pytest.mark.parametrize(
    "sizes, count, in_slice, shape",
    [
        (HYBRID, 64, 8, (8, 8, 1)),  # inside a slice, and across
        (HYBRID, 8, 8, (1, 8, 1)),
        (HYBRID, 1024, 1024, (32, 32, 1)),  # a slice larger than what divides the width
        (HYBRID | {"tensor": 2}, 64, 8, (8, 4, 2)),
        (HYBRID | {"replica": 1}, 32, 8, (1, 32, 1)),  # full sharding
    ],
)
def test_what_is_left_open_is_chosen_for_the_model_and_the_slices(sizes, count, in_slice, shape):
    unfit = demand(WIDE, NAMES, batch_size=1024)
    assert choose(sizes, count, in_slice, unfit=unfit) == shape


@pytest.mark.parametrize(
    "sizes, batch, message",
    [
        ({"fsdp": 2, "tensor": 4}, 8, r"tensor 4 does not divide 6 \('heads'\).* fsdp 4 x tensor 2"),
        ({"fsdp": 64}, 64, r"fsdp 64 does not divide 96 \('embed'\).* replica 2 x fsdp 32 x tensor 1"),
        ({"fsdp": 8}, 12, "batch_size of 12 is no multiple of 8 .* fsdp 4 x tensor 2"),
        ({"fsdp": 3}, 8, "must multiply to 8.* nearest possible: replica 2 x fsdp 4 x tensor 1"),
        ({"fsdp": -1}, 7, "batch_size of 7 .*no other layout is possible"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_nearest_possible_ones(sizes, batch, message):
    count = 64 if sizes == {"fsdp": 64} else 8
    with pytest.raises(UserError, match=message):
        choose(sizes, count, 8, unfit=demand(WIDE, NAMES, batch_size=batch))


def test_small_arrays_may_stay_whole():
    """A head of six channels cannot be cut by 4, and nobody minds; a twentieth of the parameters is the limit."""
    small, large = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 6), (64, 64)))
    names = {"small": ("in", "out"), "large": ("in", "out")}
    unfit = demand({"small": small, "large": large}, names, batch_size=8)
    assert unfit((1, 2, 4)) is None
    assert "tensor 4 does not divide 6" in demand({"small": small}, {"small": names["small"]}, batch_size=8)((1, 2, 4))


def machines(hosts, each, *, slices=1, platform="gpu"):
    """Stand-ins for the devices of a cluster, in the order in which JAX lists them."""
    return [
        types.SimpleNamespace(
            id=host * each + i,
            process_index=host,
            slice_index=host * slices // hosts,
            platform=platform,
            device_kind="stand-in",
        )
        for host in range(hosts)
        for i in range(each)
    ]


@pytest.mark.parametrize(
    "devices, in_slice",
    [
        (machines(1, 8), 8),
        (machines(4, 8), 8),  # one process a machine
        (machines(32, 1, slices=4), 8),  # one process a GPU, four machines
        (machines(4, 4, platform="tpu"), 16),  # one slice
        (machines(8, 4, slices=2, platform="tpu"), 16),  # two slices
    ],
)
def test_a_slice_is_what_shares_a_fast_network(devices, in_slice):
    assert slice_size(devices) == in_slice


@pytest.mark.parametrize(
    "shape, axis, per_slice",
    [
        ((4, 8, 1), 1, 8),  # hybrid: fsdp inside
        ((8, 4, 1), 1, 8),
        ((4, 4, 2), 1, 8),  # fsdp and tensor inside
        ((1, 32, 1), 1, 8),  # full sharding: fsdp crosses, in runs of a slice
        ((2, 8, 2), 2, 8),  # tensor inside, fsdp across two slices
    ],
)
def test_the_mesh_lies_along_the_slices(shape, axis, per_slice):
    devices = _arranged.__wrapped__(shape, machines(4, 8))
    assert devices.shape == shape and sorted(d.id for d in devices.flat) == list(range(32))
    hosts = np.vectorize(lambda d: d.process_index)(devices)
    for row in hosts.reshape(-1, shape[2]):
        assert len(set(row)) == 1  # tensor never leaves a slice
    inside = min(shape[1] * shape[2], per_slice) // shape[2]
    for row in np.moveaxis(hosts, 1, -1).reshape(-1, shape[1] // inside, inside):
        assert all(len(set(run)) == 1 for run in row)  # neither does a run of fsdp


def test_a_mesh_is_described_in_a_line():
    assert describe(make_mesh(HYBRID)) == "mesh replica 1 x fsdp 8 x tensor 1 on 8 device(s) in slices of 8"
