"""Checkpoints: what comes back, and what is never read."""

import asyncio
import errno
import json
import shutil
import threading

import jax
import pytest
from etils import epath
from orbax.checkpoint._src.serialization import jax_array_handlers, ocdbt_utils

from dalle_jax import model_dir
from dalle_jax.checkpoint import digest, manager, reader
from dalle_jax.errors import UserError
from tests.support import ROOT
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
    says = r"expected an undamaged checkpoint in .*checkpoints/2, got one where .* has 3 bytes instead of .*: move"
    with pytest.raises(UserError, match=says):
        manager.Checkpoints(tmp_path, keep=1).restore(2, abstract())
    with pytest.raises(UserError, match=says):
        model_dir.load(tmp_path)


def test_an_exception_of_a_library_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, [2])

    def fails(*_, **__):
        raise AssertionError

    monkeypatch.setattr(manager.ocp.PyTreeCheckpointHandler, "restore", fails)
    with pytest.raises(UserError, match="got AssertionError: its files are not damaged, so leave them as they are"):
        model_dir.read_params(tmp_path)


@pytest.mark.parametrize("name", ["array_metadatas", digest.MANIFEST, reader.COMMITTED])
def test_a_file_without_permission_stops_and_is_no_damage(tmp_path, monkeypatch, name):
    save(tmp_path, [2, 4])
    kind = type(epath.Path(tmp_path))
    opened = kind.open

    def forbidding(path, *args, **options):
        if "/4/" in str(path) and name in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(kind, "open", forbidding)
    with pytest.raises(UserError, match=rf"expected to read .*/4/.*{name}.*, got Permission denied: allow it"):
        manager.Checkpoints(tmp_path, keep=5).restore_latest(abstract())
    monkeypatch.undo()
    assert reader.complete_steps(tmp_path) == [2, 4]


def test_a_path_that_orbax_takes_for_a_pattern_is_refused_and_others_work(tmp_path):
    with pytest.raises(
        UserError, match=r"path is no pattern of names, got .*\[exp1\] run/checkpoints: take one without"
    ):
        manager.Checkpoints(tmp_path / "[exp1] run", keep=1)
    assert not list((tmp_path / "[exp1] run" / "checkpoints").iterdir())
    odd = tmp_path / "a*b? {c} #'%:=ü[\n"
    odd.mkdir()
    save(odd, [2])
    identical(model_dir.read_params(odd), state(2)["ema"])


def test_a_checkpoint_whose_parts_were_not_joined_is_a_failed_save_and_can_be_mended(tmp_path, monkeypatch):
    async def nothing(*_, **__):
        pass

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    said = []
    saver = manager.Checkpoints(tmp_path, keep=5, warn=said.append)
    with monkeypatch.context() as patched:
        patched.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
        saver.save(2, state(2), {})
        assert saver.latest() is None and "step 2 could not be written (state/manifest.ocdbt is missing" in said[0]
        patched.setattr(reader, "JOINED", "state")  # as versions did that did not look
        saver.save(4, state(4), {})
        saver.close()
    with pytest.raises(UserError, match="whose parts were not joined: nothing of it is lost, and docs/faults.md says"):
        model_dir.read_params(tmp_path)
    page = (ROOT / "docs" / "faults.md").read_text().partition("A path with brackets")[2]
    code = page.split("```python\n")[1].partition("```")[0].replace("STEP_FOLDER", str(tmp_path / "checkpoints" / "4"))
    exec(code, {})
    identical(model_dir.read_params(tmp_path), state(4)["ema"])


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a workdir to write to"):
        manager.Checkpoints(tmp_path / "file", keep=1)
