"""Mesh sizes, the logical table and where arrays end up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle_jax import sharding
from dalle_jax.errors import UserError


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (1, 8, 1)),
        ({"replica": 2, "tensor": 2}, (2, 2, 2)),
        ({"fsdp": 1, "tensor": 8}, (1, 1, 8)),
        ({"fsdp": 1, "replica": -1}, (8, 1, 1)),
    ],
)
def test_one_size_is_what_is_left_over(sizes, shape):
    mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "tensor": 1} | sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == sharding.MESH_AXES


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"fsdp": -1, "replica": 3}, {"fsdp": -1, "tensor": -1}, {"model": 8}])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(sizes)


def test_a_dimension_is_cut_only_where_it_divides_and_an_axis_is_used_once():
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    assert sharding.spec((6, 8, 16), ("layers", "embed", "mlp"), mesh) == P(None, ("fsdp",), ("tensor",))
    assert sharding.spec((7, 16), ("embed", "mlp"), mesh) == P(None, ("tensor",))
    assert sharding.spec((8, 8), ("mlp", "vocab"), mesh) == P(("tensor",), None)
    assert sharding.spec((4, 5, 8), ("batch", "sequence", "embed"), mesh) == P(("replica", "fsdp"), None, None)


def test_unknown_names_and_wrong_ranks_are_defects():
    mesh = sharding.make_mesh({"fsdp": -1})
    with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
        sharding.spec((8,), ("embd",), mesh)
    with pytest.raises(ValueError, match="every dimension"):
        sharding.spec((8, 8), ("embed",), mesh)


def test_constrain_is_nothing_without_a_mesh_and_cuts_within_one():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, ("batch", None)) is x
    mesh = sharding.make_mesh({"fsdp": -1})

    def inside(x):
        with sharding.use(mesh):
            return sharding.constrain(x, ("batch", None))

    placed = jax.jit(inside)(jax.device_put(x, sharding.replicated(mesh)))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 4)}


def test_a_batch_is_cut_along_replica_and_fsdp_but_not_tensor():
    mesh = sharding.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    image = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    placed = sharding.shard_batch({"image": image}, mesh)["image"]
    assert sharding.batch_ways(mesh) == 4
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, image)


def test_optimizer_copies_of_parameters_are_cut_like_them():
    mesh = sharding.make_mesh({"fsdp": -1})
    abstract = {"block": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
    places = sharding.shardings(abstract, {"block": {"w": ("embed", "mlp")}}, mesh)
    state = ({"mu": abstract, "count": jax.ShapeDtypeStruct((), jnp.int32)},)
    (found,) = sharding.like_params(state, places, mesh)
    assert found["mu"]["block"]["w"].spec == P(("fsdp",), None)
    assert found["count"].is_fully_replicated
