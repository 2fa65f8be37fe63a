"""The configs for pods: the meshes that docs/configs.md promises, and the papers' numbers; nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import choose, demand
from dalle_jax.models import build
from dalle_jax.train import run
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.settings import MeshSizes, load_settings
from tests.support import ROOT


def promised():
    """Rows of the table of meshes: config, devices of a slice, mesh."""
    for line in (ROOT / "docs" / "configs.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")][1:-1]
        if len(cells) == 3 and " x " in cells[2]:
            yield cells[0], int(cells[1]), tuple(int(size) for size in cells[2].split(" x "))


def bytes_a_device(tree):
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("spec, slice_size, shape", list(promised()))
def test_each_gets_its_mesh_which_cuts_everything_large(spec, slice_size, shape):
    settings = load_settings(spec)
    model = build(settings.name, settings.model)
    ask = demand(model.abstract, model.axes, batch_size=settings.batch_size, accumulate=settings.accumulate)
    assert settings.run.mesh in (MeshSizes(), MeshSizes(*shape))  # chosen, or as the file says
    assert choose({"replica": -1, "fsdp": -1}, math.prod(shape), slice_size, unfit=ask) == shape
    mesh = AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    state = run.step_for(settings, Task(settings.name, model, loss=None), mesh).abstract
    # float32 parameters and average, and two moments in 32 or 16 bits.
    held = 8 + (4 if settings.optimizer.moments == "paper" else 8)
    found = bytes_a_device([state[name] for name in ("params", "ema", "opt_state")])
    assert 0.9 * held < found * shape[1] * shape[2] / model.num_params < 1.02 * held + 0.1
    # What is saved was checked, and something older than the newest checkpoints stays.
    assert (
        settings.run.check_replicas_every == settings.run.checkpoint_every > 0 and settings.run.keep_every_hours == 12.0
    )


def test_heads_of_12b_are_cut_by_two_and_no_further():
    """62 heads are 2 x 31."""
    settings = load_settings("configs/transformer.py:12b")
    model = build(settings.name, settings.model)
    ask = demand(model.abstract, model.axes, batch_size=settings.batch_size)
    assert choose({"replica": -1, "fsdp": -1, "tensor": 2}, 1024, 1024, unfit=ask) == (4, 128, 2)
    with pytest.raises(
        UserError, match=r"tensor 4 does not divide 62 \('heads'\).* nearest possible: replica 4 x fsdp 128 x tensor 2"
    ):
        choose({"replica": -1, "fsdp": -1, "tensor": 4}, 1024, 1024, unfit=ask)
