"""Ctrl-C: status 130 whatever a command is doing, what can be saved is saved, and a second one ends it at once."""

import contextlib
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
from safetensors.numpy import save_file

from dalle_jax import signals
from dalle_jax.cli import main
from dalle_jax.cli.inspect import inspect
from dalle_jax.data.sources import features
from tests.support import QUICK, ROOT, until
from tests.support.broken_shards import pack, sample
from tests.support.evaluation import write_inception
from tests.support.inception_weights import state_dict

pytestmark = pytest.mark.usefixtures("interruptible")
MOMENTS = 20
SECONDS = 120  # a process that has not ended by then hangs
# The main thread computes, and hears nothing, for longer than a test may take.
STUCK = """
import hashlib, threading
threading.Timer(0.3, print, ['ready'], {'flush': True}).start()
%s:
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""
IN_GARBAGE_COLLECTION = """
import gc, time
def callback(phase, info):
    gc.callbacks.remove(callback)
    print('ready', flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass
gc.callbacks.append(callback)
try:
    gc.collect()
    time.sleep(60)
except KeyboardInterrupt:
    print('unwound')
    signals.end()
"""


TRAIN = ["--config=configs/dvae.py:demo"] + [
    f"--config.{key}={value}"
    for key, value in {
        "run.validate_every": None, "run.picture_every": None, "batch_size": 8, "data.image_size": 16,
        "optimizer.schedule.warmup_steps": 0, "model.image_size": 16, "model.width": 8, "model.stem": 4,
        "model.vocab": 8, "model.patch": 4,
    }.items()
]  # fmt: skip


@contextlib.contextmanager
def started(*words):
    """A command whose stderr is a terminal, which is given too, from the moment at which it hears Ctrl-C."""
    try:
        terminal, inside = pty.openpty()
    except OSError as error:  # a container without /dev/pts
        pytest.skip(f"needs a pseudo-terminal, whose progress bar says when to interrupt: {error}")
    termios.tcsetwinsize(inside, (24, 80))  # else a progress bar has no column
    command = [sys.executable, "-m", "dalle_jax.cli", *map(str, words)]
    environment = os.environ | {"XLA_FLAGS": QUICK}  # one device compiles faster
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=inside, process_group=0
    ) as running:
        os.close(inside)
        until(lambda: len(os.listdir(f"/proc/{running.pid}/task")) > 1, SECONDS)
        yield running, terminal
    os.close(terminal)


def read(terminal, sign=None):
    """What it says until the pattern of a sign; without one, until its process ends."""
    said = b""
    with contextlib.suppress(OSError):
        while not (sign and re.search(sign, said)) and (more := os.read(terminal, 1 << 16)):
            said += more
    return said.decode(errors="replace")


def interrupted_at(sign, *words):
    """Status and last words of a command that is interrupted when it says the sign, or as soon as it can be."""
    with started(*words) as (running, terminal):
        if sign:
            read(terminal, sign)
        running.send_signal(signal.SIGINT)
        said = read(terminal)
        return running.wait(SECONDS), said


def interrupt(code, times=1, number=signal.SIGINT):
    """Status and answers of Python code that gets a signal when it says that it is ready, and when it has answered."""
    words = [sys.executable, "-c", "from dalle_jax import signals\nsignals.watch()\n" + code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        said = [running.stdout.readline()]
        for _ in range(times):
            running.send_signal(number)
            said.append(running.stdout.readline())
        return running.wait(SECONDS), "".join([*said[1:], running.stdout.read()])


def test_a_main_thread_that_hears_nothing_is_ended():
    assert interrupt(STUCK % ("if True")) == (130, "dalle-jax: interrupted\n")


def test_what_promises_to_end_is_left_to_it_until_the_second():
    code = STUCK % ("with signals.Noted('the step is saved')")
    assert interrupt(code, times=2) == (130, "dalle-jax: SIGINT: the step is saved; Ctrl-C once more ends at once\n")


def test_a_sigterm_that_is_raised_again_ends_nothing():
    """As uvicorn does, when the requests are answered and the process may still take its time."""
    code = """
import os, time
from signal import SIGTERM, signal
with signals.Noted("requests are answered") as noted:
    print("ready", flush=True)
    while not noted.signal:
        time.sleep(0.01)
    time.sleep(0.5)
    signal(SIGTERM, lambda *_: None)
    os.kill(os.getpid(), SIGTERM)
time.sleep(1.5)
print("done")
"""
    status, said = interrupt(code, number=signal.SIGTERM)
    assert (status, said) == (0, "dalle-jax: SIGTERM: requests are answered; Ctrl-C once more ends at once\ndone\n")


def test_an_interrupt_that_garbage_collection_drops_comes_again():
    assert interrupt(IN_GARBAGE_COLLECTION) == (130, "unwound\n")


def test_nothing_is_raised_into_an_import(tmp_path):
    """Extensions in C++ end with an abort or a segmentation fault there, as numpy's and JAX's have."""
    (tmp_path / "long.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\ntry:\n    import long\nfinally:\n    print('raised')\n"
    assert interrupt(code) == (130, "dalle-jax: interrupted\n")


def test_an_error_that_a_library_makes_of_an_interrupt_is_one(monkeypatch, capsys):
    """As sentencepiece does, which reads captions through a function of ours."""

    def parse(argv):
        raise RuntimeError("KeyboardInterrupt: <EMPTY MESSAGE>")

    monkeypatch.setattr(main, "parse", parse)
    monkeypatch.setattr(signals, "ending", lambda: True)
    assert main.main([]) == 130 and capsys.readouterr().err == "dalle-jax: interrupted\n"


@pytest.mark.parametrize("sign", [None, b"records"])
def test_data(sign):
    status, said = interrupted_at(sign, "data", "scenes:train", "--json")
    assert status == 130 and "interrupted" in said and "Traceback" not in said


@pytest.mark.parametrize("sign", [None, b"captions"])
def test_tokenizer(sign, tmp_path):
    status, said = interrupted_at(sign, "tokenizer", "scenes:train", f"--out={tmp_path / 'out'}")
    assert status == 130 and "interrupted" in said and "Traceback" not in said
    assert not [*(tmp_path / "out").glob("*")]  # the folder was tried before the captions were read


@pytest.mark.parametrize("sign", [None, b"64/"])
def test_encode_leaves_whole_shards(sign, model_folder, tmp_path):
    words = ["--image-tokenizer", model_folder / "image_tokenizer", "--shard-records=64", "--batch-size=8"]
    status, said = interrupted_at(sign, "encode", "scenes:train", *words, f"--out={tmp_path / 'out'}")
    assert status == 130 and "interrupted" in said and "Traceback" not in said
    if sign:
        assert f"the shards that are finished stay in {tmp_path / 'out'}" in said
        settings = features.read_settings(tmp_path / "out")
        shards = [features.shard_name(shard) for shard in features.finished(tmp_path / "out", settings)]
        assert shards and {path.name for path in (tmp_path / "out").iterdir()} == {features.SETTINGS, *shards}


@pytest.mark.parametrize("sign", [None, rb" [1-9]\d*/1000"])
def test_train_saves_first(sign, tmp_path):
    status, said = interrupted_at(sign, "train", *TRAIN, f"--workdir={tmp_path}")
    assert status == 130 and "Traceback" not in said
    if sign:
        assert "SIGINT: the running step is finished and saved; Ctrl-C once more ends at once" in said
        (entry,) = inspect(tmp_path)["checkpoints"]
        assert entry["step"] < 1000 and entry["damage"] is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_interrupt_leaves_a_workdir_that_goes_on(tmp_path):
    """Whatever was being written at that moment: every checkpoint that counts is whole."""
    words = ["train", *TRAIN, f"--workdir={tmp_path}", "--config.run.checkpoint_every=5"]
    with started(*words, "--config.run.steps=10") as (running, _):
        assert running.wait(SECONDS) == 0
    for moment in range(3):
        with started(*words) as (running, terminal):
            read(terminal, rb" [1-9][1-9]\d*/1000")
            running.send_signal(signal.SIGINT)
            time.sleep(0.04 * moment)
            running.send_signal(signal.SIGINT)
            said = read(terminal)
            assert running.wait(SECONDS) == 130 and "Traceback" not in said, said
    steps = [entry["step"] for entry in inspect(tmp_path)["checkpoints"] if entry["damage"] is None]
    assert len(steps) == len(inspect(tmp_path)["checkpoints"]) and steps[-1] >= 10
    with started(*words, f"--config.run.steps={steps[-1] + 3}") as (running, _):
        assert running.wait(SECONDS) == 0
    assert inspect(tmp_path)["step"] == steps[-1] + 3


def group_lives(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, 0)
        return True
    return False


def words_of(verb, model, folder):
    """A command of this verb that works for seconds, or serves until it is told to stop."""
    out = folder / "out"
    match verb:
        case "data":
            return ["scenes:val", "--json"]
        case "tokenizer":
            return ["scenes:val", f"--out={out}"]
        case "encode":
            return ["scenes:val", "--image-tokenizer", model / "image_tokenizer", f"--out={out}", "--shard-records=64"]
        case "train":
            return [*TRAIN, f"--workdir={out}", "--config.run.steps=30"]
        case "demo":
            return [f"--workdir={out}", "--minutes=0.1"]
        case "inspect":
            return [model]
        case "export":
            return [model, out]
        case "sample":
            return [model, "a red circle", "a blue square", "-n=64", f"--out={out}"]
        case "evaluate":
            weights = write_inception(folder / "weights")
            return [
                *("--pictures=scenes:val@40", "--reference=scenes:val@32", f"--weights={weights}", f"--out={out}"),
                *("--config.count=64", "--config.reference_count=64"),
            ]
        case "serve":
            return [model, "--port=0"]
        case "index":
            (folder / "shards").mkdir(exist_ok=True)
            for number in range(200):
                (folder / "shards" / f"{number}.tar").write_bytes(pack(sample("a", txt=b"a caption") * 50))
            return [f"wds:{folder}/shards/*.tar"]
        case "convert":
            save_file(state_dict("fid"), folder / "inception.safetensors")
            return ["inception", folder / "inception.safetensors", f"--out={out}"]


def test_a_killed_index_leaves_no_process(tmp_path, monkeypatch):
    """Its workers would wait for more work for ever."""
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "cache"))
    words = words_of("index", None, tmp_path)
    for number in range(200, 5_000):
        os.link(tmp_path / "shards" / "0.tar", tmp_path / "shards" / f"{number}.tar")
    command = [sys.executable, "-m", "dalle_jax.cli", "index", *words, "--processes=2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, process_group=0) as running:
        until(lambda: group_size(running.pid) == 4, SECONDS)  # with two workers and their tracker of resources
        running.kill()
    until(lambda: not group_lives(running.pid))


def group_size(pid):
    """Processes in the group of this one."""
    sizes = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            sizes += int(stat.read_text().rpartition(")")[2].split()[2]) == pid
    return sizes


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("verb", [verb for verb in main.VERBS if verb != "preflight"])  # whose compilers few have
def test_twenty_moments(verb, model_folder, tmp_path, monkeypatch):
    """From the first moment at which the command hears to its end, evenly spread; an end before counts as one.

    No process of it is left.
    """
    cache = tmp_path / "cache"
    monkeypatch.setenv("DALLE_JAX_CACHE", str(cache))
    words, began = words_of(verb, model_folder, tmp_path), time.monotonic()
    with started(verb, *words) as (running, _):
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(10 if verb == "serve" else 60)  # it never ends by itself
        seconds = time.monotonic() - began
        running.kill()
    for moment in range(MOMENTS):
        for path in (tmp_path / "out", cache):
            shutil.rmtree(path, ignore_errors=True)
        with started(verb, *words) as (running, terminal):
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(seconds * moment / MOMENTS)
            running.send_signal(signal.SIGINT)
            said = read(terminal)
            # -SIGINT is what shells call 130: Python's own end, which the work no longer needs, leaves signals to C
            assert running.wait(SECONDS) in (0, 130, -signal.SIGINT), said
            assert "Traceback" not in said and "Fatal" not in said, said
            until(lambda pid=running.pid: not group_lives(pid))
