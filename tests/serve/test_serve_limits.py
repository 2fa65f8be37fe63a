"""`dalle-jax serve` under load: batches, bounds, deadlines, clients that leave, tokens."""

import asyncio
import contextlib
import json
import socket
import time
import urllib.request

import numpy as np
import openai
import pytest

from benchmarks.reliability import serve
from dalle_jax.cli import serve as serve_command
from dalle_jax.serve import connection, parsing, responses
from dalle_jax.serve.image_store import LIFE_SECONDS, ImageStore
from tests.support import until
from tests.support.stand_in_server import (
    GENERATIONS,
    GRID,
    JSON,
    SIDE,
    NoisePipeline,
    in_background,
    metric,
    png_of,
    post,
    serving,
)


def leave(server, content):
    """Sends a request and returns the open socket; closing it is a client that went away."""
    data = json.dumps(content).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    line = socket.create_connection(("127.0.0.1", server.port))
    line.sendall(head.encode() + data)
    return line


def waiting(server):
    return lambda: metric(server, "dalle_jax_queue_depth")


# -- batches ----------------------------------------------------------------------------------------------------------


def test_200_mixed_requests_on_a_short_queue():
    """The load of `benchmarks.reliability.serve`: nothing is lost, and an image does not depend on its company."""
    image = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    pipe = NoisePipeline(step_seconds=0.005)
    with serving(pipe, queue=24, max_batch=32) as server:
        client = serve.Client(server.port, image=png_of(image))
        (model,) = json.loads(client.get("/v1/models"))["data"]
        bodies = serve.mixed_requests(200, first_seed=7, model=model)
        went = serve.load(client, bodies, clients=48)
        assert went["lost"] == [] and went["refused"] > 0
        assert went["images"] == sum(body["n"] for body in bodies)
        assert went["candidates"] == sum(body.get("best_of", body["n"]) for body in bodies)
        assert went["batches"] < 100 and 0.3 < went["fill"] <= 1
        assert 0 < went["p50"] <= went["p95"] <= went["seconds"]
        for batch in pipe.batches:
            assert len({pipe.batch_key(request) for request in batch}) == 1
            assert len(batch) == 1 or sum(request.candidates for request in batch) <= 32
        alone = [client.ask(body).files for body in bodies[::9]]
        assert alone == [answer.files for answer in went["answers"][::9]]
    header, _, row = serve.rows({"first": went}, requests=200)
    assert "| 0 of 200 |" in row and row.count("|") == header.count("|")


def test_one_bad_request_does_not_take_its_neighbors_down():
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


def test_a_full_batch_does_not_wait_and_a_lone_request_waits_no_longer_than_it_must():
    pipe = NoisePipeline()
    with serving(pipe, max_batch=4, wait_seconds=5) as server:
        start = time.monotonic()
        answers = [in_background(server, {"prompt": "a star", "n": 2}) for _ in range(2)]
        assert [answer.result()[0] for answer in answers] == [200, 200]
        assert time.monotonic() - start < 4 and len(pipe.batches) == 1 + 1  # the first is drawn at the start
    with serving(pipe, wait_seconds=0.4) as server:
        start = time.monotonic()
        assert post(server, {"prompt": "a star"})[0] == 200
        assert 0.4 <= time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("max_batch", "settings", "sizes"),
    [(None, {}, [16, 8]), (None, {"guidance": 2.0}, [8, 8, 8]), (12, {"guidance": 2.0}, [12, 12])],
)
def test_batches_are_as_large_as_what_fits_unless_max_batch_says_otherwise(max_batch, settings, sizes):
    """A guided picture takes twice the room, so fewer of them share a batch."""
    pipe = NoisePipeline()
    with serving(pipe, max_batch=max_batch, queue=64) as server:
        pipe.hold()
        answers = [in_background(server, {"prompt": "a star", **settings})]
        until(lambda: len(pipe.batches) == 2)
        answers += [in_background(server, {"prompt": "a star", "n": 2, **settings}) for _ in range(12)]
        until(lambda: waiting(server)() == 12)
        before = metric(server, "dalle_jax_batch_fill_sum")
        pipe.release()
        assert [answer.result()[0] for answer in answers] == [200] * 13
        assert [sum(request.n for request in batch) for batch in pipe.batches[2:]] == sizes
        shares = [size / sizes[0] for size in sizes]
        assert metric(server, "dalle_jax_batch_fill_sum") - before == pytest.approx(sum(shares))


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
    pipe = NoisePipeline(step_seconds=0.3)
    with serving(pipe, deadline_seconds=0.5, wait_seconds=0) as server:
        status, _, refusal = post(server, {"prompt": "a star"})
        assert (status, refusal["error"]["code"]) == (504, "deadline_exceeded")
        status, _, text = post(server, {"prompt": "a star", "stream": True, "partial_images": 3})
        events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]
        assert status == 200 and events[0]["type"] == "image_generation.partial_image"
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        until(lambda: metric(server, "dalle_jax_cancelled_total") == 2)
        assert metric(server, 'dalle_jax_rejected_total{code="deadline_exceeded"}') == 2
    assert all(steps < GRID for steps in pipe.steps_drawn[1:])


def test_a_deadline_passes_in_the_queue_too_and_nobody_asks_again():
    """OpenAI's client by itself sends a 504 twice more."""
    pipe = NoisePipeline()
    with serving(pipe, deadline_seconds=0.5, max_batch=1, wait_seconds=0) as server:
        pipe.hold()
        first = in_background(server, {"prompt": "a star"})
        until(lambda: len(pipe.batches) == 2)
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="any")
        with pytest.raises(openai.APIStatusError, match="deadline") as late:
            client.images.generate(prompt="a cross")
        assert (late.value.status_code, waiting(server)(), first.result()[0]) == (504, 0, 504)
        assert metric(server, 'dalle_jax_requests_total{endpoint="generations",status="504"}') == 2
        pipe.release()
    assert [batch[0].caption for batch in pipe.batches] == ["", "a star"]


@pytest.mark.parametrize("stream", [False, True])
def test_work_of_a_client_that_left_is_dropped(stream, monkeypatch):
    """While it is drawn, while it waits, and before its answer began."""
    read_json = parsing.read_json

    async def slow(request):
        values = await read_json(request)
        await asyncio.sleep(0.3 if values["prompt"] == "slow" else 0)
        return values

    monkeypatch.setattr(parsing, "read_json", slow)
    pipe = NoisePipeline(step_seconds=0.05)
    with serving(pipe, max_batch=1, wait_seconds=0) as server:
        pipe.hold()
        drawn = leave(server, {"prompt": "a star", "stream": stream})
        until(lambda: len(pipe.batches) == 2)
        queued = leave(server, {"prompt": "a cross", "stream": stream})
        until(lambda: waiting(server)() == 1)
        leave(server, {"prompt": "slow", "stream": stream}).close()
        until(lambda: metric(server, "dalle_jax_cancelled_total") == 1)
        queued.close()
        until(lambda: waiting(server)() == 0)
        drawn.close()
        until(lambda: metric(server, "dalle_jax_cancelled_total") == 3)
        pipe.release()
        assert post(server, {"prompt": "a circle"})[0] == 200
    assert [batch[0].caption for batch in pipe.batches] == ["", "a star", "a circle"]
    assert pipe.steps_drawn[1] < GRID  # given up at the next step


def test_a_silent_stream_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr(responses, "HEARTBEAT_SECONDS", 0.05)
    with serving(pipe := NoisePipeline()) as server:
        pipe.hold()
        reading = in_background(server, {"prompt": "a star", "stream": True})
        until(lambda: len(pipe.batches) == 2)
        time.sleep(0.3)
        pipe.release()
        frames = reading.result()[2].decode().split("\n\n")
    assert frames[0] == ": waiting" and frames[-2].startswith("event: image_generation.completed\ndata: {")


def test_pictures_behind_urls_are_bounded_and_expire():
    now = 0.0
    store = ImageStore(max_bytes=10, clock=lambda: now)
    first, second = store.add(b"12345"), store.add(b"67890")
    assert (store.get(first), store.get(second), len({first, second})) == (b"12345", b"67890", 2)
    third = store.add(b"x")
    assert (store.get(first), store.get(second), store.get(third)) == (None, b"67890", b"x")
    now = LIFE_SECONDS - 1.0
    assert store.get(second) == b"67890"
    now = LIFE_SECONDS + 0.0
    assert store.get(second) is None and store.get("nobody") is None


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def healthy(line):
    """Whether a whole answer of /health comes."""
    data = b""
    while not data.endswith(b"}") and (more := line.recv(1000)):
        data += more
    return data.startswith(b"HTTP/1.1 200")


def closes(line, seconds=5.0):
    """Whether the server closes the connection in time, whatever it sends before."""
    line.settimeout(seconds)
    try:
        while line.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\nhalf"], ids=["nothing", "head", "body"])
def test_what_a_client_owes_is_waited_for_in_bounded_time(sent, monkeypatch):
    """Half a head, also after a whole request, and the rest of a body that nobody needs for the answer; every byte that
    comes meanwhile gives no more time."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serving(NoisePipeline()) as server:
        for first in (b"", HEAD + b"\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
                line.sendall(first)
                assert not first or healthy(line)
                line.sendall(sent)
                if sent.endswith(b"half"):
                    assert healthy(line)
                elif sent:
                    time.sleep(0.2)
                    line.sendall(b"X-")
                assert closes(line)
        assert not server.server.server_state.connections


def test_who_does_not_read_an_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)
    with serving(NoisePipeline()) as server, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", server.port))
        line.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(1000):  # 18 MB of pages
                line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        connections = server.server.server_state.connections
        until(lambda: connections)
        until(lambda: not connections)


@pytest.mark.parametrize("body", [False, True])
def test_silent_connections_keep_nobody_out(body, monkeypatch):
    """Twice as many as may be, each with half a head or half a body: the oldest go, whoever asks is answered."""
    half = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nContent-Type: application/json\r\n\r\n{{"
    monkeypatch.setattr(serve_command, "MAX_CONNECTIONS", 100)
    with serving(NoisePipeline()) as server, contextlib.ExitStack() as lines:
        slow = []
        for number in range(200):
            slow.append(lines.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)))
            slow[-1].sendall(half.encode() if body else HEAD)
            if number % 25 == 24:
                assert post(server, None, "/health", {}, "GET")[0] == 200
        assert post(server, {"prompt": "a star"})[0] == 200
        assert closes(slow[0]) and len(server.server.server_state.connections) <= 100
        slow[-1].sendall(b"1234567}" if body else b"\r\n")  # a late one may still finish its request
        assert b" 400 " in slow[-1].recv(1000) if body else healthy(slow[-1])


def test_heads_have_the_size_that_is_documented():
    with serving(NoisePipeline()) as server:
        for size, status in ((30_000, 200), (33_000, 431), (70_000, 431)):
            assert post(server, None, "/health", {"X-Long": "x" * size}, "GET")[0] == status
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
            line.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # as load balancers ask, without a host
            assert healthy(line)


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


def test_pages_of_other_sites_are_refused():
    with serving(NoisePipeline()) as server:
        for origin, status in (("http://evil.example", 403), ("null", 403), (server.address, 200)):
            assert post(server, {"prompt": "a star"}, headers={**JSON, "Origin": origin})[0] == status
