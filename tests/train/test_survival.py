"""Faults, one at a time: damaged checkpoints, other meshes, updates that are not finite."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax import model_dir
from dalle_jax.checkpoint import digest, manager, reader
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.train import loop, rollback
from dalle_jax.train.monitor import goodput
from dalle_jax.train.monitor.report import Report
from tests.support.line_task import LINE, Numbers, digest_of, line_settings, line_step, logged, train
from tests.support.trees import identical

# Damage on disk.


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    train(workdir)
    return workdir


def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.unlink()], ids=["flipped", "cut", "gone"])
def test_harm_to_any_file_of_a_checkpoint_is_found_and_the_one_before_is_used(trained, tmp_path, capfd, harm):
    names = [path.relative_to(trained) for path in files(trained / "checkpoints" / "12")]
    names = [name for name in names if name.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")]
    assert len(names) > 8
    for index, name in enumerate(names):
        if (name.name, harm.__name__) == (digest.MANIFEST, "<lambda>"):
            continue  # without a manifest a checkpoint is as trustworthy as Orbax makes it
        workdir = copy(trained, tmp_path / str(index))
        harm(workdir / name)
        abstract = line_step().abstract
        saved = manager.Checkpoints(workdir, keep=2)
        found = saved.restore_latest(abstract)
        saved.close()
        assert found[0] == 8 and found[2] == {"position": 8}, name
        said = capfd.readouterr().err
        assert said.count("warning") == 1 and "damaged-12-1" in said, name
        aside = workdir / "checkpoints" / "damaged-12-1"
        assert len(files(aside)) >= len(names) - 1
        assert reader.complete_steps(workdir) == [8]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_with_the_same_bits(trained, tmp_path):
    workdir = copy(trained, tmp_path)
    flip(max(files(workdir / "checkpoints" / "12" / "state"), key=lambda path: path.stat().st_size))
    batches = Numbers()
    assert train(workdir, batches).step == 12
    assert batches.given == [9, 10, 11, 12]
    assert digest_of(workdir) == digest_of(trained)


def test_with_every_checkpoint_damaged_a_run_begins_again(trained, tmp_path):
    workdir = copy(trained, tmp_path)
    for number in (8, 12):
        cut(workdir / "checkpoints" / str(number) / digest.MANIFEST)
    batches = Numbers()
    train(workdir, batches)
    assert batches.given[0] == 1 and digest_of(workdir) == digest_of(trained)
    assert sorted(path.name for path in (workdir / "checkpoints").glob("damaged-*")) == ["damaged-12-1", "damaged-8-1"]


def test_a_checkpoint_that_no_longer_says_it_is_complete_is_set_aside_and_not_deleted(trained, tmp_path):
    workdir, said = copy(trained, tmp_path), []
    path = workdir / "checkpoints" / "12"
    names = [name.relative_to(path) for name in files(path)]
    cut(path / reader.COMMITTED)
    manager.Checkpoints(workdir, keep=2, warn=said.append).close()
    assert reader.complete_steps(workdir) == [8] and len(said) == 1
    aside = workdir / "checkpoints" / "damaged-12-1"
    assert [name.relative_to(aside) for name in files(aside)] == names


# Where checkpoints lie, and on what.


def test_the_place_of_checkpoints_may_be_an_object_store(tmp_path, monkeypatch):
    """Nothing here reaches one; that the path arrives as it was given is what can go wrong on our side."""
    monkeypatch.chdir(tmp_path)
    assert str(reader.checkpoint_folder("run", "gs://bucket/run/x")) == "gs://bucket/run/x"
    assert str(reader.checkpoint_folder("gs://bucket/run", "") / "12") == "gs://bucket/run/checkpoints/12"
    assert str(reader.checkpoint_folder("run", "")) == str(tmp_path / "run" / "checkpoints")
    assert str(reader.checkpoint_folder("run", "else")) == str(tmp_path / "else")


def test_checkpoints_in_another_folder_are_found_through_the_config(tmp_path):
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", checkpoint_dir=str(tmp_path / "store"))
    assert not (tmp_path / "run" / "checkpoints").exists()
    content = {"name": "dvae", "model": {}, "checkpoint_dir": str(tmp_path / "store")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    assert reader.checkpoint_path(tmp_path / "run", str(tmp_path / "store"))[0] == 12
    assert reader.complete_steps(tmp_path / "run", str(tmp_path / "store")) == [8, 12]
    assert set(model_dir.read_params(tmp_path / "run")) == {"matrix", "gain"}
    raw, average = (model_dir.read_params(tmp_path / "run", step=8, average=a) for a in (False, True))
    assert np.abs(raw["matrix"] - average["matrix"]).max() > 0


@pytest.mark.parametrize("sizes", [{"replica": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}, None])
def test_a_state_comes_back_on_another_mesh_bit_for_bit(tmp_path, sizes):
    train(tmp_path, mesh=make_mesh({"fsdp": 8}), steps=4)
    before = digest_of(tmp_path)
    abstract = line_step(sizes and make_mesh(sizes)).abstract
    saved = manager.Checkpoints(tmp_path, keep=2)
    _, state, position = saved.restore_latest(abstract)
    assert state["params"]["matrix"].sharding == abstract["params"]["matrix"].sharding
    assert position == {"position": 4}
    saved.save(5, state, position)
    saved.close()
    assert digest_of(tmp_path) == before  # and the digest does not know the mesh
    whole = jax.device_get(state["params"])
    assert digest.of_tree(whole) == reader.state_digests(reader.checkpoint_folder(tmp_path, "") / "4")["params"]


def test_a_digest_sees_every_bit_name_type_and_shape():
    tree = {"a": np.zeros((2, 3), np.float32), "b": [np.zeros(2, jnp.bfloat16), np.int32(1)]}
    same = {"b": (np.zeros(2, jnp.bfloat16), np.int32(1)), "a": jnp.zeros((2, 3))}
    assert digest.of_tree(tree) == digest.of_tree(same)
    others = [
        tree | {"a": np.zeros((3, 2), np.float32)},
        tree | {"a": np.zeros((2, 3), np.int32)},
        tree | {"a": -np.zeros((2, 3), np.float32)},
        {"c": tree["a"], "b": tree["b"]},
    ]
    assert len({digest.of_tree(other) for other in [tree, *others]}) == 5


# Updates that are not finite.


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_poisoned_batch_leaves_state_and_moments_clean(tmp_path, value):
    result = train(tmp_path, Numbers(poison=(6,), value=value))
    clean = jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), result.state)
    assert all(jax.tree.leaves(clean))
    assert int(result.state["skipped"]) == 1 and int(result.state["step"]) == 12
    assert np.isfinite(result.metrics["train/loss"])


def test_updates_whose_parameters_would_not_be_finite_are_skipped_and_counted(tmp_path, capfd):
    """Loss and gradient are finite; what the optimizer makes of them is not, as with an epsilon of 0."""
    endless = optax.with_extra_args_support(optax.scale(np.inf))
    step, settings = line_step(optimizer=endless), line_settings(rollback_after=None, log_every=2)
    with pytest.raises(UserError, match="got none in the last 2 updates before 3"):
        loop.run(step, settings, tmp_path, batches=Numbers(), progress=False)
    assert "2 of the last 2 updates were not finite, skipped" in capfd.readouterr().err
    state, values = step.update(step.init(jax.random.key(0)), {}, Numbers().batch(1), jax.random.key(1))
    assert np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]) and not values["finite"]
    identical(state["params"], step.init(jax.random.key(0))["params"])
    assert (int(state["step"]), int(state["skipped"])) == (1, 1)


def test_many_in_a_row_go_back_to_the_last_checkpoint_and_past_the_data(tmp_path, capfd):
    batches = Numbers(poison=range(6, 10))
    result = train(tmp_path, batches, checkpoint_every=5, steps=10)
    # Updates 6 to 8 are skipped, seen when 9 is under way; the state of 5 then takes the batches from 10 on.
    assert batches.given == list(range(1, 15))
    assert int(result.state["skipped"]) == 0 and int(result.state["step"]) == 10
    said = [line for line in capfd.readouterr().err.splitlines() if "back to" in line]
    assert len(said) == 1 and "3 updates in a row" in said[0] and "parameters of update 5" in said[0]
    assert list(logged(tmp_path, "train/loss")) == [4, 8]
    ledger = goodput.read(tmp_path)
    assert ledger["seconds"]["lost"] > 0


def test_a_rollback_is_repeated_by_a_run_that_was_killed_after_it(tmp_path):
    poison = range(6, 10)
    straight = train(tmp_path / "straight", Numbers(poison), checkpoint_every=5, steps=10)

    def kill(n, state):
        if n == 7 and batches.position > 10:
            raise KeyboardInterrupt

    batches = Numbers(poison)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", batches, checkpoint_every=5, steps=10, hooks=[(1, kill)])
    done = train(tmp_path / "killed", Numbers(poison), checkpoint_every=5, steps=10)
    identical(done.state, straight.state)


def test_no_checkpoint_is_written_while_updates_are_skipped(tmp_path):
    train(tmp_path, Numbers(poison=(4, 5)), keep_checkpoints=9)
    assert reader.complete_steps(tmp_path) == [6, 8, 12]  # the one due at 4 came at the first finite update


def test_poison_without_an_end_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"none in the last 3 updates before \d+ after 3 returns to update 4"):
        train(tmp_path, Numbers(poison=range(6, 1000)))


@pytest.mark.parametrize(
    "first, values, lines", [(1, {"checkpoint_every": None}, []), (6, {"rollback_after": None}, [2, 4, 6])]
)
def test_a_run_that_cannot_go_back_and_has_no_finite_update_ends(tmp_path, first, values, lines):
    with pytest.raises(UserError, match="expected finite losses and gradients, got none in the last 2 updates"):
        train(tmp_path, Numbers(poison=range(first, 100)), log_every=2, **values)
    assert list(logged(tmp_path, "train/loss")) == lines


def test_losses_that_are_finite_may_wait_for_a_scale_and_others_may_not():
    back = rollback.Rollback(3, patience=5, forgiven=100)

    def due(streak, overflows, newest=4):
        return back.due(streak, overflows=overflows, n=999, newest=lambda: newest)

    assert not due(2, 0) and due(3, 0) and not due(3, 0, None)
    assert not due(102, 102) and due(103, 103)
    assert not due(50, 48) and due(50, 47)  # three of them NaN
    assert not due(104, 104, None)
    with pytest.raises(UserError, match="none in the last 105 updates"):
        due(105, 105, None)


def test_a_run_that_never_logs_keeps_no_numbers(tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr(loop, "Report", lambda *args, **more: reports.append(Report(*args, **more)) or reports[0])
    assert train(tmp_path, log_every=None).step == 12 and not reports[0]._interval


def test_a_line_of_the_metrics_that_is_none_of_ours_is_left_out(tmp_path):
    odd = [
        b"null",
        b"[1, 2]",
        b"{}",
        b'{"step": null}',
        b'{"step": 1, "a": "b"}',
        b'{"step": 1, "a',
        b"\xff",
        b"9" * 5_000,
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(odd))
    assert train(tmp_path).step == 12 and list(logged(tmp_path, "step")) == [4, 8, 12]


def test_a_tasks_warning_waits_for_the_warm_up_and_is_said_once_until_it_is_gone(tmp_path, capfd):
    bad = iter([True] * 3 + [False] + [True] * 14)
    task = dataclasses.replace(LINE, warn=lambda means: "something collapsed" if next(bad) else None)
    train(tmp_path, task=task, steps=20, log_every=1)
    said = [line for line in capfd.readouterr().err.splitlines() if "collapsed" in line]
    assert said == [f"warning: step {n}: something collapsed" for n in (3, 7)]


def test_a_signal_that_comes_among_skipped_updates_saves_nothing_worse_than_what_is_there(tmp_path):
    def interrupt(n, state):
        if n == 5:
            signal.raise_signal(signal.SIGTERM)

    stopped = train(tmp_path, Numbers(poison=(6, 7)), hooks=[(1, interrupt)])
    assert (stopped.step, stopped.signal) == (4, signal.SIGTERM)
    assert reader.complete_steps(tmp_path) == [4]
