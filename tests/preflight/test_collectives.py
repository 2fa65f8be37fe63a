"""What preflight reads of a compiled program: its exchanges, along which axis, how often and how many bytes."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dalle_jax.preflight import collectives


@pytest.mark.parametrize("axis", ["replica", "fsdp", "replica+fsdp"])
def test_collectives_of_a_real_program(axis):
    """A sum over one mesh axis inside a loop of five: known kind, axis, count and bytes."""
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    axes = tuple(axis.split("+"))
    size = math.prod(mesh.shape[a] for a in axes)

    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec(axes), out_specs=PartitionSpec(axes))
    def summed(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(jax.lax.psum(x, axes)) + x, x)

    place = NamedSharding(mesh, PartitionSpec(axes))
    text = jax.jit(summed).lower(jax.ShapeDtypeStruct((size * 6, 7), jnp.float32, sharding=place)).compile().as_text()
    (found,) = collectives.read(text, mesh_shape=dict(mesh.shape), slices=[0, 0, 0, 0, 1, 1, 1, 1])
    assert (found.kind, found.axis, found.count) == ("all-reduce", axis, 5)
    assert found.bytes == 5 * 2 * (6 * 7 * 4) * (size - 1) // size
    assert found.inside == (axis == "fsdp")


def program(operation: str) -> str:
    return f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  %x = {operation}\n}}\n"


@pytest.mark.parametrize(
    ("operation", "kind", "axis", "received"),
    [
        ("bf16[8,16]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", "fsdp", 192),
        ("f32[16]{0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", "all-gather", "replica", 32),
        ("f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}", "reduce-scatter", "fsdp", 48),
        ("(f32[4]{0}, f32[16]{0:T(8,128)}) all-gather-start(%p), replica_groups=[2,4]<=[8]", "all-gather", "fsdp", 48),
        ("((f32[16]{0}, f32[8]), (f32[4]{0}, f32[2])) reduce-scatter-start(%p), replica_groups=[2,4]<=[8]",
         "reduce-scatter", "fsdp", 72),
        ("(f32[4]{0}, bf16[2]{0}) all-reduce-start(%p), replica_groups={}", "all-reduce", "replica+fsdp", 35),
        ("s8[8]{0} collective-permute(%p), source_target_pairs={{0,4},{4,0}}", "collective-permute", "replica", 8),
        ("f32[8]{0} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x=1",
         "all-reduce", "fsdp", 48),
    ],
)  # fmt: skip
def test_forms_of_collectives(operation, kind, axis, received):
    (found,) = collectives.read(program(operation), mesh_shape={"replica": 2, "fsdp": 4}, slices=[0] * 8)
    assert (found.kind, found.axis, found.bytes) == (kind, axis, received)


def test_loops_without_a_noted_trip_count_and_fused_reduce_scatters():
    """As libtpu writes them: the bound stands in the condition, a reduce-scatter is a fused all-reduce and slice."""
    text = """HloModule m

%all-reduce-scatter.1 (i: f32[16]) -> f32[4] {
  %all-reduce.1 = f32[16]{0:T(1024)} all-reduce(%i), replica_groups=[2,4]<=[8], to_apply=%add
}

%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  ROOT %f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="a"}
}

%cond (p: (s32[], f32[16])) -> pred[] {
  %c = s32[]{:T(128)} constant(15)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %w = (s32[]{:T(128)}, f32[16]{0:T(1024)}) while(%t), condition=%cond, body=%body, metadata={op_name="b"}
}
"""
    (found,) = collectives.read(text, mesh_shape={"replica": 2, "fsdp": 4}, slices=[0] * 8)
    assert (found.kind, found.axis, found.count, found.bytes) == ("reduce-scatter", "fsdp", 15, 15 * 48)
