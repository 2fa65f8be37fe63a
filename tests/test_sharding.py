"""The logical table, where arrays end up, and computing in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle_jax import sharding
from dalle_jax.mesh import make_mesh


def test_a_dimension_is_cut_only_where_it_divides_and_an_axis_is_used_once():
    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    assert sharding.spec((6, 8, 16), ("layers", "embed", "mlp"), mesh) == P(None, ("fsdp",), ("tensor",))
    assert sharding.spec((7, 16), ("embed", "mlp"), mesh) == P(None, ("tensor",))
    assert sharding.spec((8, 8), ("mlp", "vocab"), mesh) == P(("tensor",), None)
    assert sharding.spec((4, 5, 8), ("batch", "sequence", "embed"), mesh) == P(("replica", "fsdp"), None, None)


def test_unknown_names_and_wrong_ranks_are_defects():
    mesh = make_mesh({"fsdp": -1})
    with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
        sharding.spec((8,), ("embd",), mesh)
    with pytest.raises(ValueError, match="every dimension"):
        sharding.spec((8, 8), ("embed",), mesh)


def test_constrain_is_nothing_without_a_mesh_and_cuts_within_one():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, ("batch", None)) is x
    mesh = make_mesh({"fsdp": -1})

    def inside(x):
        with sharding.use(mesh):
            return sharding.constrain(x, ("batch", None))

    placed = jax.jit(inside)(jax.device_put(x, sharding.replicated(mesh)))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 4)}


def test_a_batch_is_cut_along_replica_and_fsdp_but_not_tensor():
    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    image = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    placed = sharding.shard_batch({"image": image}, mesh)["image"]
    assert sharding.batch_ways(mesh) == 4
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, image)


def test_optimizer_copies_of_parameters_are_cut_like_them():
    mesh = make_mesh({"fsdp": -1})
    abstract = {"block": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
    places = sharding.shardings(abstract, {"block": {"w": ("embed", "mlp")}}, mesh)
    state = ({"mu": abstract, "count": jax.ShapeDtypeStruct((), jnp.int32)},)
    (found,) = sharding.like_params(state, places, mesh)
    assert found["mu"]["block"]["w"].spec == P(("fsdp",), None)
    assert found["count"].is_fully_replicated


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_computing_in_batches_compiles_one_shape_and_changes_nothing(count):
    shapes = set()

    def function(x, y):
        shapes.add(x.shape)
        return {"sum": x + y, "rows": jnp.square(x).sum(1)}

    x, y = np.arange(3.0 * count).reshape(count, 3), np.ones((count, 3), np.float32)
    found = sharding.in_batches(function, x, y, size=4)
    np.testing.assert_array_equal(found["sum"], x + y)
    np.testing.assert_array_equal(found["rows"], np.square(x).sum(1))
    assert shapes == {(4, 3)} and isinstance(found["sum"], np.ndarray)
