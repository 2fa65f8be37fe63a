"""Checkpoints and exported models: what comes back, and what is never read."""

import asyncio
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

from dalle_jax import model_dir, sharding
from dalle_jax.checkpoint import format, manager
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh

CONFIG = {"name": "dvae", "model": {"width": 4}}


def state(step):
    params = {"block": {"w": jnp.arange(16.0).reshape(8, 2) + step}, "b": jnp.full(3, float(step))}
    return {"params": params, "ema": jax.tree.map(lambda p: p + 0.5, params), "step": jnp.int32(step)}


def abstract(mesh=None):
    shapes = jax.eval_shape(lambda: state(0))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(
            s.shape,
            s.dtype,
            sharding=jax.sharding.NamedSharding(mesh, sharding.spec(s.shape, ("embed", None, None)[: s.ndim], mesh)),
        ),
        shapes,
    )


def save(workdir, steps, keep=5):
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    saver = manager.Checkpoints(workdir, keep=keep)
    for step in steps:
        saver.save(step, state(step), {"position": [step]})
    saver.close()


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_state_comes_back_on_any_mesh_with_the_data_position(tmp_path):
    save(tmp_path, [1, 5, 9], keep=2)
    assert format.complete_steps(tmp_path) == [5, 9]
    mesh = make_mesh({"fsdp": -1})
    reader = manager.Checkpoints(tmp_path, keep=2)
    restored, position = reader.restore(reader.latest(), abstract(mesh))
    equal(restored, state(9))
    assert position == {"position": [9]}
    assert restored["params"]["block"]["w"].addressable_shards[0].data.shape == (1, 2)
    reader.close()


def test_the_arrays_may_be_overwritten_as_soon_as_save_returns(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    before, saver = state(3), manager.Checkpoints(tmp_path, keep=1)
    wanted = jax.tree.map(np.array, before)
    saver.save(3, before, {})
    jax.block_until_ready(change(before))
    saver.close()
    reader = manager.Checkpoints(tmp_path, keep=1)
    equal(reader.restore(3, abstract())[0], wanted)


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
        assert format.complete_steps(tmp_path) == list(range(3, step))
        gate.set()
        assert saver.latest() == step
        gate.clear()
    saver.close()
    reader = manager.Checkpoints(tmp_path, keep=9)
    for step in (3, 4, 5):
        equal(reader.restore(step, abstract())[0], state(step))


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
    equal(model_dir.read_params(tmp_path), state(4)["ema"])
    again = manager.Checkpoints(tmp_path, keep=5)
    assert again.latest() == 4
    again.save(8, state(8), {})
    again.close()
    equal(model_dir.read_params(tmp_path), state(8)["ema"])


def test_a_damaged_checkpoint_names_itself(tmp_path):
    save(tmp_path, [2])
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file() and "ocdbt" not in path.name:
            path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(UserError, match="checkpoints/2.*cannot be read"):
        manager.Checkpoints(tmp_path, keep=1).restore(2, abstract())
    with pytest.raises(UserError, match="checkpoints/2.*cannot be read"):
        model_dir.load(tmp_path)


def test_an_exported_model_comes_back_as_it_was(tmp_path):
    params = state(1)["params"] | {"whole": np.arange(4, dtype=np.int32), "turned": np.arange(6.0).reshape(2, 3).T}
    model_dir.save(tmp_path / "a" / "b", CONFIG, params)
    config, loaded = model_dir.read_config(tmp_path / "a" / "b"), model_dir.read_params(tmp_path / "a" / "b")
    assert config == CONFIG and loaded["whole"].dtype == np.int32
    equal(loaded, params)
    model_dir.save(tmp_path / "a" / "b", CONFIG, {"b": np.zeros(1)})
    equal(model_dir.read_params(tmp_path / "a" / "b"), {"b": np.zeros(1)})
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "params.safetensors"]


def test_a_write_that_fails_leaves_no_half_model(tmp_path, monkeypatch):
    model_dir.save(tmp_path, CONFIG, {"b": np.zeros(1)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        model_dir.save(tmp_path, CONFIG, {"b": np.ones(1)})
    monkeypatch.undo()
    with pytest.raises(UserError, match="config.json"):
        model_dir.load(tmp_path)


def test_wrong_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="check the path"):
        model_dir.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="train it first"):
        model_dir.load(tmp_path)
    with pytest.raises(UserError, match="expected a transformer in .*, got a dvae"):
        model_dir.load(tmp_path, name="transformer")
    (tmp_path / "params.safetensors").write_bytes(b"12345678 no")
    with pytest.raises(UserError, match="export it again"):
        model_dir.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="json"):
        model_dir.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="without 'name'"):
        model_dir.load(tmp_path)


def test_parameters_of_another_model_are_refused():
    params = state(0)["params"]
    model_dir.check_params(params, jax.eval_shape(lambda: params), where="x")
    with pytest.raises(UserError, match=r"parameter block/w of shape \(4, 2\) in x, got \(8, 2\)"):
        model_dir.check_params(params, {"block": {"w": np.zeros((4, 2))}, "b": np.zeros(3)}, where="x")
    with pytest.raises(UserError, match="parameter b of shape None"):
        model_dir.check_params(params, {"block": {"w": np.zeros((8, 2))}}, where="x")


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a workdir to write to"):
        manager.Checkpoints(tmp_path / "file", keep=1)
