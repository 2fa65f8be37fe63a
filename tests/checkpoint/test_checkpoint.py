"""Checkpoints: what comes back, and what is never read."""

import asyncio
import json
import shutil
import threading

import jax
import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

from dalle_jax import model_dir
from dalle_jax.checkpoint import manager, reader
from dalle_jax.errors import UserError
from tests.support.checkpoints import abstract, state
from tests.support.trees import identical

CONFIG = {"name": "dvae", "model": {"width": 4}}


def save(workdir, steps, keep=5):
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    saver = manager.Checkpoints(workdir, keep=keep)
    for step in steps:
        saver.save(step, state(step), {"position": [step]})
    saver.close()


def test_an_update_in_place_stays_in_place_while_a_checkpoint_is_written(tmp_path, monkeypatch, request):
    """The storage takes nothing until the gate opens; whoever still held the arrays would make the update copy them."""
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    gate, write = threading.Event(), jax_array_handlers._async_serialize_replica_slices

    request.addfinalizer(gate.set)

    async def held(*args, **options):
        await asyncio.to_thread(gate.wait)
        return await write(*args, **options)

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_replica_slices", held)
    saver = manager.Checkpoints(tmp_path, keep=9)
    for step in (3, 4, 5):
        now = state(step)
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(now)]
        saver.save(step, now, {})
        after = jax.block_until_ready(change(now))
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == places
        assert reader.complete_steps(tmp_path) == list(range(3, step))
        gate.set()
        assert saver.latest() == step
        gate.clear()
    saver.close()
    again = manager.Checkpoints(tmp_path, keep=9)
    for step in (3, 4, 5):
        identical(again.restore(step, abstract())[0], state(step))


@pytest.mark.parametrize("kind", ["empty", "temporary", "not committed"])
def test_an_incomplete_checkpoint_is_never_read_and_does_not_block_its_step(tmp_path, kind):
    save(tmp_path, [4])
    folder = tmp_path / "checkpoints"
    torn = folder / ("8.orbax-checkpoint-tmp-1" if kind == "temporary" else "8")
    if kind == "empty":
        torn.mkdir()
    else:
        shutil.copytree(folder / "4", torn)
        metadata = json.loads((torn / "_CHECKPOINT_METADATA").read_text()) | {"commit_timestamp_nsecs": None}
        (torn / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    identical(model_dir.read_params(tmp_path), state(4)["ema"])
    again = manager.Checkpoints(tmp_path, keep=5)
    assert again.latest() == 4
    again.save(8, state(8), {})
    again.close()
    identical(model_dir.read_params(tmp_path), state(8)["ema"])


def test_a_damaged_checkpoint_names_itself(tmp_path):
    save(tmp_path, [2])
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file() and "ocdbt" not in path.name:
            path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(UserError, match="checkpoints/2.*cannot be read"):
        manager.Checkpoints(tmp_path, keep=1).restore(2, abstract())
    with pytest.raises(UserError, match="checkpoints/2.*cannot be read"):
        model_dir.load(tmp_path)


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a workdir to write to"):
        manager.Checkpoints(tmp_path / "file", keep=1)
