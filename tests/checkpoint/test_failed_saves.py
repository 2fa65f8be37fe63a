"""Saves that fail, of checkpoints and of logs: training goes on. And which checkpoints are kept."""

import errno
import json
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest

from dalle_jax.checkpoint import digest, manager, reader
from dalle_jax.errors import UserError
from dalle_jax.train.monitor import metrics
from tests.support import ROOT
from tests.support.line_task import digest_of, train


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    """In a process of its own: the limit is the process's, and pytest writes files too."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    whole.mkdir()
    full.mkdir()
    train(whole)
    command = [sys.executable, "-m", "tests.support.full_disk_driver", full]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: the checkpoint of step 8 could not be written (File too large)") == 1
    assert "the newest complete one is that of step 4" in done.stderr
    assert "warning: metrics.jsonl could not be written" in done.stderr
    assert reader.complete_steps(full) == [4, 12]
    assert digest_of(full) == digest_of(whole)
    assert not list((full / "checkpoints").glob("8*"))
    assert {4, 12} <= {line["step"] for line in metrics.read(full / "metrics.jsonl")}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_that_ends_tensorboards_thread_blocks_nobody(tmp_path):
    log = metrics.MetricsLog(tmp_path, step=0)
    (writer,) = log._writers
    log._board.file_writer.event_writer._ev_writer.write_event = no_space
    log.write(1, {"train/loss": 1.0})
    writer.join(timeout=60)
    for n in range(2, 100):  # its queue holds ten
        log.write(n, {"train/loss": 1.0})
    log.close()
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 99


def test_a_run_whose_last_checkpoint_fails_does_not_end_well(tmp_path, monkeypatch):
    whole = digest.write_manifest

    def full(folder, **options):
        if folder.name.startswith("12"):
            no_space()
        whole(folder, **options)

    monkeypatch.setattr(digest, "write_manifest", full)
    with pytest.raises(UserError, match="that of step 12, to be written, which failed: .* goes on from step 8"):
        train(tmp_path)


def test_an_error_at_the_start_of_a_save_is_a_warning(tmp_path, monkeypatch):
    said = []
    saver = manager.Checkpoints(tmp_path, keep=1, warn=said.append)
    saver.save(1, {"a": jnp.ones(4)}, {})
    saver.latest()
    with monkeypatch.context() as patched:
        patched.setattr(saver._manager, "save", no_space)
        saver.save(2, {"a": jnp.ones(4)}, {})
        assert saver.latest() == 1
    (line,) = said
    assert "step 2" in line and "No space left" in line
    saver.save(3, {"a": jnp.ones(4)}, {})
    saver.close()
    assert reader.complete_steps(tmp_path) == [3]
    assert len(said) == 1


@pytest.mark.parametrize("writer_ends_well", [False, True])
def test_a_failed_save_is_over_only_when_its_writer_is(tmp_path, monkeypatch, writer_ends_well):
    """Orbax reports that its metadata failed while its other thread still writes the arrays."""
    said, reported, whole = [], threading.Event(), digest.write_manifest
    saver = manager.Checkpoints(tmp_path, keep=1, warn=said.append)
    saver.save(1, {"a": jnp.ones(4)}, {})
    assert saver.latest() == 1

    def late(folder, **options):
        assert reported.wait(60)
        time.sleep(0.5)
        if not writer_ends_well:
            no_space()
        whole(folder, **options)

    def failed():
        reported.set()
        raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patched:
        patched.setattr(digest, "write_manifest", late)
        saver.save(2, {"a": jnp.ones(4)}, {})
        saver._started.result()
        patched.setattr(saver._manager, "wait_until_finished", failed)
        assert saver.latest() == (2 if writer_ends_well else 1)
    (line,) = said
    assert ("step 2 is complete" if writer_ends_well else "step 2 could not be written") in line
    assert "File too large" in line and not list(tmp_path.glob("checkpoints/2.*"))
    saver.save(3, {"a": jnp.ones(4)}, {})
    saver.close()
    assert reader.complete_steps(tmp_path) == [3]
    assert len(said) == 1


def test_checkpoints_are_kept_by_number_and_by_age(tmp_path):
    for number in range(1, 8):
        saver = manager.Checkpoints(tmp_path, keep=1, keep_every_hours=1)
        saver.save(number, {"a": jnp.ones(2)}, {})
        saver.close()
        for path in tmp_path.glob("checkpoints/*/_CHECKPOINT_METADATA"):  # as if 25 minutes had passed
            metadata = json.loads(path.read_text())
            metadata["commit_timestamp_nsecs"] -= 25 * 60 * 10**9
            path.write_text(json.dumps(metadata))
    assert reader.complete_steps(tmp_path) == [1, 4, 7]  # minutes 0, 75 and 150
