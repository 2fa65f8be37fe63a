"""`dalle-jax serve` under load and abuse: batches, bounds, deadlines, clients that leave, bodies that are no requests."""

import base64
import concurrent.futures
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in_server import GRID, SIDE, NoisePipeline, serving, until

from dalle_jax import cli
from dalle_jax.errors import UserError
from dalle_jax.sample.request import Request
from dalle_jax.serve import body, main
from dalle_jax.serve.store import LIFE_SECONDS, PictureStore

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}


def post(server, content, path=GENERATIONS, headers=JSON, method="POST"):
    """Status, headers and body (parsed where it is JSON) of one request; content: bytes or what becomes JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return answer.status, answer.headers, json.loads(text) if is_json else text


def in_background(server, content):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(post, server, content)
    pool.shutdown(wait=False)
    return future


def leave(server, content):
    """Sends a request and returns the open socket; closing it is a client that went away."""
    data = json.dumps(content).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    line = socket.create_connection(("127.0.0.1", server.port))
    line.sendall(head.encode() + data)
    return line


def metric(server, name):
    _, _, text = post(server, None, "/metrics", {}, "GET")
    return float(re.search(rf"^{name} (\S+)$", text.decode(), re.MULTILINE)[1])


def waiting(server):
    return lambda: metric(server, "dalle_jax_queue_depth")


@pytest.fixture(scope="module")
def robust():
    """A server for requests that must not hurt it: the test fails if it does not draw afterwards."""
    with serving(NoisePipeline()) as server:
        yield server


# -- batches ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_alone_and_in_company():
    wishes = [
        {"prompt": f"star {i % 5}", "n": 1 + i % 3, "seed": i, "response_format": "b64_json"}
        | ({"top_k": 3} if i % 2 else {})
        | ({"best_of": 4} if i % 3 == 0 else {})
        for i in range(24)
    ]
    pipe = NoisePipeline(row_seconds=0.002)
    with serving(pipe, max_batch=12, wait_seconds=0.05) as server:
        alone = [post(server, wish)[2]["data"] for wish in wishes]
        quiet = len(pipe.batches)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            together = [answer[2]["data"] for answer in pool.map(lambda wish: post(server, wish), wishes)]
        assert together == alone
        batches = pipe.batches[quiet:]
        assert sum(map(len, batches)) == len(wishes) and len(batches) < len(wishes) / 2
        for batch in batches:
            assert len({request.top_k for request in batch}) == 1  # one wave_key a batch
            assert len(batch) == 1 or sum(request.best_of or request.n for request in batch) <= 12
        assert metric(server, "dalle_jax_images_total") == 2 * sum(wish["n"] for wish in wishes)
        assert metric(server, "dalle_jax_batch_requests_sum") == 2 * len(wishes)


def test_one_bad_request_does_not_take_its_neighbours_down():
    pipe = NoisePipeline()
    with serving(pipe, wait_seconds=0.3) as server:
        answers = [in_background(server, {"prompt": prompt}) for prompt in ("a star", "poison", "a cross")]
        statuses = [answer.result()[0] for answer in answers]
        assert statuses == [200, 500, 200]
        status, _, refusal = answers[1].result()
        assert refusal["error"]["code"] == "draw_failed" and "poison" not in json.dumps(refusal)
        assert post(server, None, "/health", {}, "GET")[::2] == (200, {"status": "ready"})
        for _ in range(3):
            assert post(server, {"prompt": "poison"})[0] == 500
        assert post(server, None, "/health", {}, "GET")[::2] == (503, {"status": "failing"})
        assert post(server, {"prompt": "a star"})[0] == 200
        assert post(server, None, "/health", {}, "GET")[0] == 200


def test_a_full_batch_does_not_wait_and_a_lone_request_waits_no_longer_than_told():
    pipe = NoisePipeline()
    with serving(pipe, max_batch=4, wait_seconds=5) as server:
        start = time.monotonic()
        answers = [in_background(server, {"prompt": "a star", "n": 2}) for _ in range(2)]
        assert [answer.result()[0] for answer in answers] == [200, 200]
        assert time.monotonic() - start < 4 and len(pipe.batches) == 1 + 1  # the first is the server's own, at the start
    with serving(pipe, wait_seconds=0.4) as server:
        start = time.monotonic()
        assert post(server, {"prompt": "a star"})[0] == 200
        assert 0.4 <= time.monotonic() - start < 4


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again():
    pipe = NoisePipeline()
    with serving(pipe, queue=2, max_batch=1, wait_seconds=0) as server:
        pipe.hold()
        answers = [in_background(server, {"prompt": "a star"})]
        until(lambda: len(pipe.batches) == 2 and not waiting(server)())
        answers += [in_background(server, {"prompt": "a star"}) for _ in range(2)]
        until(lambda: waiting(server)() == 2)
        status, headers, refusal = post(server, {"prompt": "a star"})
        assert (status, refusal["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(headers["retry-after"]) <= 600
        pipe.release()
        assert [answer.result()[0] for answer in answers] == [200] * 3
        text = post(server, None, "/metrics", {}, "GET")[2].decode()
        assert 'dalle_jax_rejected_total{code="queue_full"} 1.0' in text
        assert 'dalle_jax_requests_total{endpoint="generations",status="429"} 1.0' in text


def test_a_deadline_ends_the_answer_and_the_work():
    pipe = NoisePipeline(row_seconds=0.3)
    with serving(pipe, deadline_seconds=0.5, wait_seconds=0) as server:
        status, _, refusal = post(server, {"prompt": "a star"})
        assert (status, refusal["error"]["code"]) == (504, "deadline_exceeded")
        status, _, text = post(server, {"prompt": "a star", "stream": True, "partial_images": 3})
        events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]
        assert status == 200 and events[0]["type"] == "image_generation.partial_image"
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        until(lambda: metric(server, "dalle_jax_cancelled_total") == 2)
    assert all(rows < GRID for rows in pipe.rows_drawn[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_work_of_a_client_that_left_is_dropped(stream):
    pipe = NoisePipeline(row_seconds=0.05)
    with serving(pipe, max_batch=1, wait_seconds=0) as server:
        pipe.hold()
        drawn = leave(server, {"prompt": "a star", "stream": stream})
        until(lambda: len(pipe.batches) == 2)
        queued = leave(server, {"prompt": "a cross", "stream": stream})
        until(lambda: waiting(server)() == 1)
        queued.close()
        until(lambda: waiting(server)() == 0)
        drawn.close()
        until(lambda: metric(server, "dalle_jax_cancelled_total") == 2)
        pipe.release()
        assert post(server, {"prompt": "a circle"})[0] == 200
    assert [batch[0].caption for batch in pipe.batches] == ["", "a star", "a circle"]
    assert pipe.rows_drawn[1] < GRID  # given up at the next row


def test_pictures_behind_urls_are_bounded_and_expire():
    now = 0.0
    store = PictureStore(max_bytes=10, clock=lambda: now)
    first, second = store.add(b"12345"), store.add(b"67890")
    assert (store.get(first), store.get(second), len({first, second})) == (b"12345", b"67890", 2)
    third = store.add(b"x")
    assert (store.get(first), store.get(second), store.get(third)) == (None, b"67890", b"x")
    now = LIFE_SECONDS - 1.0
    assert store.get(second) == b"67890"
    now = LIFE_SECONDS + 0.0
    assert store.get(second) is None and store.get("nobody") is None


# -- who may ask ------------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_before_anything_is_read():
    with serving(NoisePipeline(), token="s3cret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"},
                        {"Authorization": "Bearer \xff"}):  # fmt: skip
            for path, method in ((GENERATIONS, "POST"), ("/v1/models", "GET"), ("/metrics", "GET")):
                status, answered, refusal = post(server, b"no json", path, {**JSON, **headers}, method)
                assert (status, refusal["error"]["code"]) == (401, "invalid_api_key")
                assert answered["www-authenticate"] == "Bearer"
        known = {**JSON, "Authorization": "Bearer s3cret"}
        status, _, made = post(server, {"prompt": "a star"}, headers=known)
        assert status == 200
        assert urllib.request.urlopen(made["data"][0]["url"]).status == 200  # its name is the secret
        assert post(server, None, "/health", {}, "GET")[0] == post(server, None, "/", {}, "GET")[0] == 200


def test_pages_of_other_sites_are_refused(robust):
    for origin, status in (("http://evil.example", 403), ("null", 403), (robust.address, 200)):
        assert post(robust, {"prompt": "a star"}, headers={**JSON, "Origin": origin})[0] == status


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(main.TOKEN_VARIABLE, raising=False)
    assert main.read_token(None) is None
    file = tmp_path / "token"
    file.write_text("from-file\n")
    monkeypatch.setenv(main.TOKEN_VARIABLE, "from-environment")
    assert (main.read_token(None), main.read_token(file)) == ("from-environment", "from-file")
    for text in ("", "two words", "\u00fcmlaut"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="one word"):
            main.read_token(file)
    with pytest.raises(UserError, match="--token-file"):
        main.read_token(tmp_path / "nothing")


# -- bodies that are no requests --------------------------------------------------------------------------------------

BODIES = {
    "empty": b"",
    "cut": b'{"prompt": "a star"',
    "no object": b'["a star"]',
    "null": b"null",
    "no utf-8": b'{"prompt": "\xff\xfe"}',
    "utf-16": '{"prompt": "a star"}'.encode("utf-16"),
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 40_000,
    "nan": b'{"prompt": "a star", "temperature": NaN}',
    "infinity": b'{"prompt": "a star", "temperature": -Infinity}',
    "huge float": b'{"prompt": "a star", "temperature": 1e999}',
    "huge integer": b'{"prompt": "a star", "seed": ' + b"9" * 4000 + b"}",
    "huger integer": b'{"prompt": "a star", "seed": ' + b"9" * 40_000 + b"}",
    "huge integer as a number": b'{"prompt": "a star", "temperature": ' + b"9" * 4000 + b"}",
    "twice": b'{"prompt": "a star", "prompt": "a cross"}',
    "half a surrogate": b'{"prompt": "a star \\ud800"}',
    "half a surrogate as a name": b'{"prompt": "a star", "\\udfff": 1}',
    "long prompt": b'{"prompt": "' + b"a" * 40_000 + b'"}',
    "number as prompt": b'{"prompt": 3}',
    "list as n": b'{"prompt": "a star", "n": [1]}',
    "object as model": b'{"prompt": "a star", "model": {"a": 1}}',
    "negative n": b'{"prompt": "a star", "n": -1}',
    "text as stream": b'{"prompt": "a star", "stream": "yes"}',
    "null prompt": b'{"prompt": null}',
}


@pytest.mark.parametrize("case", BODIES)
def test_malformed_bodies_get_400(robust, case):
    status, _, refusal = post(robust, BODIES[case])
    assert status == 400
    assert set(refusal["error"]) == {"message", "type", "param", "code"} and len(refusal["error"]["message"]) < 500
    assert post(robust, {"prompt": "a star"})[0] == 200


def form(*parts, boundary="b"):
    """A multipart body of (head, content) pairs and its headers."""
    body = b"".join(b"--b\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + b"--b--\r\n", {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def png(width=SIDE, height=SIDE, *, noise=False):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256 if noise else 1, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb():
    """A PNG of some bytes that says it is 60,000 pixels wide and high."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + png()[33:]


PROMPT, IMAGE = (b'name="prompt"', b"a star"), b'name="image"; filename="i.png"'
FORMS = {
    "nothing": form(),
    "no image": form(PROMPT),
    "no picture": form(PROMPT, (IMAGE, b"hello")),
    "cut picture": form(PROMPT, (IMAGE, png(noise=True)[:400])),
    "bomb": form(PROMPT, (IMAGE, bomb())),
    "not square": form(PROMPT, (IMAGE, png(16, 8))),
    "two images": form(PROMPT, (IMAGE, png()), (IMAGE, png())),
    "image as text": form(PROMPT, (b'name="image"', b"abc")),
    "other file": form(PROMPT, (IMAGE, png()), (b'name="video"; filename="v"', b"abc")),
    "mask of another size": form(PROMPT, (IMAGE, png()), (b'name="mask"; filename="m.png"', png(32, 32))),
    "field twice": form(PROMPT, PROMPT, (IMAGE, png())),
    "many fields": form(*[(b'name="f%d"' % i, b"") for i in range(100)]),
    "text as n": form(PROMPT, (IMAGE, png()), (b'name="n"', b"two")),
    "nan": form(PROMPT, (IMAGE, png()), (b'name="temperature"', b"nan")),
    "no such row": form(PROMPT, (IMAGE, png()), (b'name="keep_rows"', b"99")),
    "no name": form((b"a=b", b"x")),
    "no boundary": (form(PROMPT)[0], {"Content-Type": "multipart/form-data"}),
    "another boundary": form(PROMPT, (IMAGE, png()), boundary="c"),
    "half": (form(PROMPT, (IMAGE, png()))[0][:90], form()[1]),
}


@pytest.mark.parametrize("case", FORMS)
def test_malformed_forms_get_400(robust, case):
    content, headers = FORMS[case]
    status, _, refusal = post(robust, content, EDITS, headers)
    assert status == 400 and set(refusal["error"]) == {"message", "type", "param", "code"}
    content, headers = form(PROMPT, (IMAGE, png()))
    assert post(robust, content, EDITS, headers)[0] == 200


def test_oversized_bodies_get_413(robust):
    json_limit, form_limit = body.MAX_JSON_BYTES, body.MAX_FORM_BYTES
    long = b'{"prompt": "' + b"a" * json_limit + b'"}'
    assert post(robust, long)[0] == 413
    big, headers = form(PROMPT, (IMAGE, bytes(form_limit)))
    assert post(robust, big, EDITS, headers)[0] == 413
    for path, kind, data in ((GENERATIONS, JSON, long), (EDITS, headers, big)):  # without announcing a length
        connection = http.client.HTTPConnection("127.0.0.1", robust.port, timeout=30)
        chunks = (data[i : i + 2**16] for i in range(0, len(data), 2**16))
        try:
            connection.request("POST", path, chunks, kind, encode_chunked=True)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer came before the end of the body
        assert connection.getresponse().status == 413
        connection.close()


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        (GENERATIONS, "POST", {"Content-Type": "text/plain"}, 415),
        (GENERATIONS, "POST", {}, 415),
        (GENERATIONS, "POST", {"Content-Type": ";;;"}, 415),
        (EDITS, "POST", JSON, 415),
        (GENERATIONS, "GET", {}, 405),
        ("/v1/images", "POST", JSON, 404),
        ("/v1/images/files/..%2f..%2fetc%2fpasswd", "GET", {}, 404),
        ("/v1/models/a/b", "GET", {}, 404),
        ("/v1/models", "DELETE", {}, 405),
    ],
)
def test_wrong_places_and_types(robust, path, method, headers, status):
    got, _, refusal = post(robust, b'{"prompt": "a star"}', path, headers, method)
    assert got == status and set(refusal["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_does_not_come_is_not_waited_for(robust, monkeypatch):
    monkeypatch.setattr(body, "MAX_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", robust.port), timeout=10) as line:
        line.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     "Content-Length: 100\r\n\r\n{".encode())  # fmt: skip
        assert b" 408 " in line.recv(1000)
    with socket.create_connection(("127.0.0.1", robust.port), timeout=10) as line:
        line.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b" 400 " in line.recv(1000)
    assert post(robust, {"prompt": "a star"})[0] == 200


# -- start and end ----------------------------------------------------------------------------------------------------


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
import sys, types
from stand_in_server import NoisePipeline
from dalle_jax import cli
from dalle_jax.serve import main
main.Pipeline = types.SimpleNamespace(load=lambda folder: NoisePipeline(row_seconds=0.3))
sys.exit(cli.main(["serve", "runs/noise", "--port", "0"]))
"""


def test_sigterm_finishes_what_runs():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        ready = process.stdout.readline()
        found = re.fullmatch(r"dalle-jax serves noise on http://127\.0\.0\.1:(\d+)\n", ready)
        assert found, ready + process.stderr.read()
        port = type("Address", (), {"port": int(found[1])})
        answer = in_background(port, {"prompt": "a star", "seed": 1, "response_format": "b64_json"})
        until(lambda: metric(port, "dalle_jax_batch_requests_count") == 1)
        process.send_signal(signal.SIGTERM)
        status, _, made = answer.result(timeout=30)
        assert status == 200
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"]))))
        np.testing.assert_array_equal(drawn, np.asarray(NoisePipeline().picture(Request("a star", seed=1), 0)))
        assert process.wait(30) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


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
