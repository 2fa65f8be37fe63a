"""`dalle-jax serve` as a process: how it starts, what it says when it can't, how it ends."""

import contextlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dalle_jax.cli import main as cli
from dalle_jax.cli import serve
from dalle_jax.errors import UserError
from dalle_jax.sample.request import Request
from tests.support import ROOT, until
from tests.support.stand_in_server import NoisePipeline, in_background, metric, pixels, post, serving


def test_health_says_loading_then_ready_and_failing_when_the_model_is_broken():
    pipe, may_load = NoisePipeline(), threading.Event()

    def load():
        may_load.wait(30)
        return pipe

    with serving(pipe, load=load) as server:
        assert post(server, None, "/health", {}, "GET")[::2] == (503, {"status": "loading"})
        status, headers, refusal = post(server, {"prompt": "a star"})
        assert (status, refusal["error"]["code"]) == (503, "model_loading") and headers["retry-after"]
        may_load.set()
        until(lambda: post(server, None, "/health", {}, "GET")[0] == 200)

    def broken():
        raise UserError("expected a model")

    with serving(pipe, load=broken) as server:
        until(lambda: post(server, None, "/health", {}, "GET")[2] == {"status": "failing"})
        assert post(server, {"prompt": "a star"})[0] == 503


COMMAND = """
import sys
from tests.support.stand_in_server import NoisePipeline
from dalle_jax.cli import main, serve
serve.load = lambda args: NoisePipeline(step_seconds=0.3)
sys.argv[1:] = ["serve", "runs/noise", "--port", "0"]
main.command()
"""


FINISHING = "dalle-jax: SIGTERM: requests that were accepted are answered; Ctrl-C once more ends at once\n"


def test_sigterm_finishes_what_runs():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ready = process.stdout.readline()
        found = re.fullmatch(r"dalle-jax serves noise on http://127\.0\.0\.1:(\d+)\n", ready)
        assert found, ready + process.stderr.read()
        assert [process.stdout.readline() for _ in range(2)] == [
            "draws up to 16 images together: 16 images per batch: noise is light\n",
            "draws up to 8 images with guidance together: 8 images per batch: noise is light\n",
        ]
        server = SimpleNamespace(port=int(found[1]))
        answer = in_background(server, {"prompt": "a star", "seed": 1, "response_format": "b64_json"})
        until(lambda: metric(server, "dalle_jax_batch_requests_count") == 1)
        process.send_signal(signal.SIGTERM)
        status, _, made = answer.result(timeout=30)
        assert status == 200
        drawn = pixels(made["data"][0]["b64_json"])
        np.testing.assert_array_equal(drawn, np.asarray(NoisePipeline().picture(Request("a star", seed=1), 0)))
        assert process.wait(30) == 0 and process.stderr.read() == FINISHING
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_2000_slow_connections_keep_nobody_out():
    """Each with half a head, at a server that may open no more than the 1,024 files of most shells."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2500:
        pytest.skip(f"needs 2,500 open files, of which the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2500), hard))
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
    command = [sys.executable, "-c", few + COMMAND]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            server = SimpleNamespace(port=int(process.stdout.readline().rsplit(":", 1)[1]))
            with contextlib.ExitStack() as lines:
                for number in range(2000):
                    line = lines.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                    line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
                    if number % 100 == 99:
                        assert post(server, None, "/health", {}, "GET")[0] == 200
                assert post(server, {"prompt": "a star"})[0] == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0 and process.stderr.read() == FINISHING
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "70000"], "--port"),
        (["--max-batch", "0"], "--max-batch"),
        (["--deadline-s", "nan"], "--deadline-s"),
        (["--host", "203.0.113.7"], "203.0.113.7"),
        (["--token-file", "/nowhere"], "--token-file"),
        (["--port", "0"], "config.json"),  # the folder holds no model
    ],
)
def test_the_command_says_what_is_wrong(words, says, tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "warned"),
    [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--token-file", "token"], False)],
)
def test_only_who_asks_for_it_is_open_to_the_network(words, warned, tmp_path, monkeypatch, capsys):
    """Without --host it listens on this machine's own address; on another it warns, unless there is a token."""
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("s3cret")
    places, listen = [], serve.listen
    monkeypatch.setattr(serve, "listen", lambda host, port: places.append(host) or listen(host, port))
    assert cli.main(["serve", str(tmp_path), "--port", "0", *words]) == 2  # the folder holds no model
    assert places == ["0.0.0.0" if words else "127.0.0.1"]
    assert ("is open to the network without a token" in capsys.readouterr().err) == warned


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    assert serve.read_token(None) is None
    file = tmp_path / "token"
    file.write_text("from-file\n")
    monkeypatch.setenv(serve.TOKEN_VARIABLE, "from-environment")
    assert (serve.read_token(None), serve.read_token(file)) == ("from-environment", "from-file")
    for text in ("", "two words", "\u00fcmlaut"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="one word"):
            serve.read_token(file)
    with pytest.raises(UserError, match="--token-file"):
        serve.read_token(tmp_path / "nothing")
