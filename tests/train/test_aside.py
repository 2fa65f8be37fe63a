"""Hooks decide nothing over a run: neither one that raises, nor one that takes the process with it."""

import signal

import jax
import pytest

from dalle_jax.checkpoint import reader
from dalle_jax.train import aside, loop
from dalle_jax.train.monitor import goodput
from tests.support.line_task import Numbers, digest_of, logged, train


def fails(step, state):
    raise MemoryError(f"no memory at {step}")


def test_a_hook_that_raises_costs_what_it_makes_and_never_a_step(tmp_path, capfd):
    train(tmp_path / "without")
    hooks = [(4, fails), (6, lambda step, state: {"samples/fid": 1.0 * step}), (None, fails)]
    assert train(tmp_path / "run", hooks=hooks).step == 12
    assert digest_of(tmp_path / "run") == digest_of(tmp_path / "without")
    said = [line for line in capfd.readouterr().err.splitlines() if "samples" in line]
    wanted = "warning: no samples or scores of step {0}, training goes on (no memory at {0})"
    assert said == [wanted.format(step) for step in (4, 8, 12)]
    assert logged(tmp_path / "run", "samples/fid") == {6: 6.0, 12: 12.0}
    assert goodput.read(tmp_path / "run")["seconds"]["sample"] > 0 and not (tmp_path / "run" / aside.FILE).exists()


def test_a_step_at_which_a_hook_ended_the_process_comes_without_it_the_next_time(tmp_path, capfd):
    called = []

    def ends(step, state):
        called.append(step)
        raise KeyboardInterrupt  # stands for what lets nothing of Python run, so that the note stays

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=8, hooks=[(6, ends)])
    assert reader.complete_steps(tmp_path) == [4]
    assert train(tmp_path, steps=8, hooks=[(6, ends)]).step == 8 and called == [6]
    assert "no samples or scores of step 6: the run ended while they were made" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=12, hooks=[(6, ends)])
    assert called == [6, 12]


def test_hooks_come_after_the_checkpoint_of_their_step_and_do_not_hold_up_a_stop(tmp_path, monkeypatch):
    order, save = [], loop.Checkpoints.save
    monkeypatch.setattr(loop.Checkpoints, "save", lambda self, n, *args: order.append(-n) or save(self, n, *args))

    def hook(step, state):
        order.append(step)
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    assert train(tmp_path, hooks=[(1, hook)]).step == 7
    assert order == [1, 2, 3, -4, 4, 5, 6, -7]


def test_never_is_never_also_at_the_end(tmp_path):
    def validation():
        raise AssertionError

    values = {"validate_every": None, "picture_every": None, "checkpoint_every": None}
    train(tmp_path, Numbers(), of_loop={"validation": validation}, **values)
    assert not (tmp_path / "pictures").exists() and reader.complete_steps(tmp_path) == [12]


def test_an_array_comes_to_the_first_process_in_16_bits_by_rows():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    for by_rows in (False, True):
        found = aside.distributed.whole_in_first(x, dtype=jax.numpy.bfloat16, by_rows=by_rows)
        assert (found == jax.device_get(x).astype(found.dtype)).all() and found.dtype == jax.numpy.bfloat16
