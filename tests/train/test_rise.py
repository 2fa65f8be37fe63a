"""A lasting rise of the validation error after an adversary's start: one warning, and the best checkpoint stays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.checkpoint import reader
from dalle_jax.train.monitor.rise import Onset, Rise
from tests.support.line_task import LINE, train

ONSET = Onset(metric="error", start=6, what="the adversary's start", advice="lower its weight")
# By the number of updates made: it falls, rises after the onset, is good once more, and rises for good.
ERRORS = {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.6, 10: 0.7, 12: 0.29, 14: 0.5, 16: 0.5, 18: 0.5, 20: 0.6, 22: 0.1, 24: 0.9}


def curve_loss(params, frozen, batch, *, key, step):
    """Any loss, and as `error` the entry of ERRORS."""
    table = jnp.array([ERRORS.get(n, 0.0) for n in range(26)], jnp.float32)
    value, _ = LINE.loss(params, frozen, batch, key=key, step=step)
    return value, {"error": table[step]}


TASK = dataclasses.replace(LINE, loss=curve_loss, onset=ONSET)


def held_out():
    return iter([{"x": np.ones((8, 8), np.float32)}])


def run(workdir, steps):
    return train(
        workdir,
        task=TASK,
        steps=steps,
        validate_every=2,
        checkpoint_every=2,
        keep_checkpoints=2,
        of_loop={"validation": held_out},
    )


def test_a_run_keeps_its_best_checkpoint_and_says_so_once(tmp_path, capfd):
    run(tmp_path, 16)
    assert "error" not in capfd.readouterr().err  # two bad validations, a good one, two bad ones
    assert reader.complete_steps(tmp_path) == [4, 14, 16]
    run(tmp_path, 20)  # what it saw before it was stopped counts
    warnings = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(warnings) == 1
    assert "is 0.5, and above its best of 0.3 at step 4 in 3 validations in a row" in warnings[0]
    assert "at step 6: the best checkpoint is that of step 4, which stays; lower its weight" in warnings[0]
    assert reader.complete_steps(tmp_path) == [4, 18, 20]
    run(tmp_path, 24)
    assert "error" not in capfd.readouterr().err  # it was said, and then the rise was over
    assert reader.complete_steps(tmp_path) == [4, 22, 24]


def test_without_an_onset_only_the_newest_stay(tmp_path):
    train(tmp_path, task=dataclasses.replace(TASK, onset=None), steps=8, checkpoint_every=2, keep_checkpoints=2)
    assert reader.complete_steps(tmp_path) == [6, 8]


def lines(errors):
    return [{"step": n, "validation/error": error} for n, error in errors.items()] + [{"step": 3, "train/error": 0.0}]


@pytest.mark.parametrize(
    ("steps", "best"),
    [
        ([], None),
        ([1], None),  # nothing was seen by then
        ([2, 4, 6], 4),
        ([3, 5], 5),  # by the last validation before each
        ([2, 6, 8, 12], 6),  # what came after the onset does not count, however good
        ([8, 12], None),
    ],
)
def test_the_best_of_the_checkpoints_that_are_there(steps, best):
    rise = Rise(ONSET)
    rise.recall(lines(ERRORS))
    assert rise.best(steps) == best
    assert Rise(None).best(steps) is None


def test_a_rise_without_a_checkpoint_or_without_a_past():
    rise, seen = Rise(ONSET), []
    rise.recall(lines({4: 0.3}))
    for n in (8, 10, 12, 14):
        seen.append(rise.see(n, {"validation/error": 0.4}, lambda: [10, 12]))
    assert [bool(said) for said in seen] == [False, False, True, False] and "no earlier checkpoint is left" in seen[2]
    rise.recall([])  # with nothing to compare with there is no rise
    assert not any(rise.see(n, {"validation/error": 9.0}, list) for n in (8, 10, 12, 14))
