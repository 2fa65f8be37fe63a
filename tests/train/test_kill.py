"""`kill -9` of a training process: the same command goes on and ends with the bits of a run that nobody killed.

Two moments here; `benchmarks/reliability/soak.py` does twenty on the whole command, with several processes if asked.
"""

import os
import signal
import subprocess
import sys
import time

from dalle_jax.checkpoint import reader
from dalle_jax.train.monitor import goodput
from tests.support import ROOT
from tests.support.line_task import digest_of, train

STEPS, EVERY = 80, 10
PROGRAM = (
    "import pathlib, sys; from tests.support import line_task; "
    f"line_task.train(pathlib.Path(sys.argv[1]), steps={STEPS}, checkpoint_every={EVERY})"
)


def start(workdir):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(workdir)], env=os.environ | {"PYTHONPATH": str(ROOT)})


def kill_when(workdir, condition, *, after=0.0, seconds=120):
    process, until = start(workdir), time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, "the run ended before it could be killed"
        time.sleep(0.0005)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_run_that_was_killed_twice_ends_with_the_same_bits(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    train(straight, steps=STEPS, checkpoint_every=EVERY)
    folder = killed / "checkpoints"

    def newest():
        return max(reader.complete_steps(killed), default=0)

    kill_when(killed, lambda: newest() >= 20, after=0.003)
    seen = newest()
    kill_when(killed, lambda: newest() > seen and list(folder.glob("*tmp*")))  # a checkpoint is being written
    assert 0 < newest() < STEPS
    assert start(killed).wait(timeout=120) == 0
    assert digest_of(killed) == digest_of(straight)
    newest_of = [reader.checkpoint_path(workdir) for workdir in (killed, straight)]
    assert {step for step, _ in newest_of} == {STEPS} and len({str(reader.data_position(p)) for _, p in newest_of}) == 1
    ledger = goodput.read(killed)
    assert ledger["starts"] == 3 and ledger["seconds"]["down"] > 0 and ledger["ended"]
