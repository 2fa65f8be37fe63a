"""`--profile`: the updates that were asked for are in the trace, and no end of a run leaves one open."""

import os
import signal

import jax
import pytest

from dalle_jax.cli import main
from dalle_jax.train.monitor import goodput, tracing
from tests.support.line_task import train


def updates_in(workdir):
    """Numbers of the updates in each trace of a workdir, oldest trace first."""
    found = []
    for path in sorted((workdir / tracing.FOLDER).rglob("*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = (event for plane in planes for line in plane.lines for event in line.events if event.name == "update")
        found.append(sorted({dict(event.stats)["step_num"] for event in events}))
    return found


def traced(workdir, start, stop, **more):
    return train(workdir, of_loop={"profile": range(start, stop)}, **more)


def start_another(folder):
    """Raises if a trace is open."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


WINDOWS = dict.fromkeys(["5", "5:5", "0:3", "7:5", "-1:3", "a:b", "1:2:3", "", ":", "٣:٤"], "100:105 for updates")


@pytest.mark.parametrize("text, message", [*WINDOWS.items(), ("12:14", "at most config.run.steps = 11, got 12")])
def test_a_window_that_is_none_or_beyond_the_run_is_refused_in_one_line(text, message, tmp_path, capsys):
    words = ["train", "--config", "configs/dvae.py:demo", "--workdir", str(tmp_path / "run"), f"--profile={text}"]
    words += ["--config.run.steps=11", "--config.optimizer.schedule.warmup_steps=0"]
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "START" in error and message in error and (repr(text) in error or text == "12:14")
    assert not (tmp_path / "run").exists()


def test_the_updates_asked_for_are_traced(tmp_path):
    result = traced(tmp_path, 5, 7, checkpoint_every=6)
    assert result.step == 12 and updates_in(tmp_path) == [[5, 6]]
    assert goodput.read(tmp_path)["seconds"]["look"] > 0
    again = traced(tmp_path, 5, 7)  # the launcher's command again, when they are past
    assert again.step == 12 and len(updates_in(tmp_path)) == 1


def test_the_first_update_and_the_last_can_be_traced(tmp_path):
    result = traced(tmp_path, 1, 100, steps=4, log_every=2)
    assert updates_in(tmp_path) == [[1, 2, 3, 4]]
    assert result.metrics["train/images_per_second"] > 1


@pytest.mark.parametrize("end", ["signal", "error"])
def test_a_run_that_ends_in_its_trace_writes_it(tmp_path, end):
    def hook(step, state):
        if step == 6 and end == "error":
            raise KeyboardInterrupt
        if step == 5 and end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)

    if end == "error":
        with pytest.raises(KeyboardInterrupt):
            traced(tmp_path, 5, 9, hooks=[(1, hook)])
    else:
        assert traced(tmp_path, 5, 9, hooks=[(1, hook)]).signal == signal.SIGTERM
    assert updates_in(tmp_path) == [[5, 6]]
    start_another(tmp_path / "another")
    jax.profiler.stop_trace()
    if end == "signal":
        traced(tmp_path, 5, 9)  # goes on in the window; within a second a trace takes the place of the one before
        assert updates_in(tmp_path)[-1] == [7, 8]


def test_a_trace_that_cannot_be_taken_or_written_is_a_warning(tmp_path, capfd):
    start_another(tmp_path / "another")
    try:
        assert traced(tmp_path / "taken", 2, 3).step == 12
    finally:
        jax.profiler.stop_trace()
    assert "already been started" in (said := capfd.readouterr().err) and "goes on without a profile" in said
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / tracing.FOLDER).write_text("a file where the folder goes")
    assert traced(tmp_path / "written", 2, 3).step == 12
    assert capfd.readouterr().err.count("training goes on without a profile") == 1
