"""A server in a thread over a pipeline that draws noise: instant, exact, and it can be held in the middle of a row."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
from PIL import Image

from dalle_jax.cli.serve import listen, make_server
from dalle_jax.errors import UserError
from dalle_jax.layout import Layout
from dalle_jax.sample.request import Request
from dalle_jax.serve.app import build_app
from dalle_jax.serve.batcher import Batcher
from dalle_jax.serve.metrics import Metrics

GRID, SIDE, VOCAB, NAME = 4, 16, 128, "noise"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}


class NoisePipeline:
    """Pictures are noise from caption, seed and settings. `hold()` stops it before a row until `release()`."""

    image_size, digest, max_candidates = SIDE, "0" * 64, 64

    def __init__(self, *, row_seconds: float = 0.0, ranking: bool = True):
        layout = Layout(text_len=13, text_vocab=400, grid=GRID, image_vocab=VOCAB)
        self.model = SimpleNamespace(config=SimpleNamespace(layout=layout))
        self.tokenizer = SimpleNamespace(encode=str.split)
        self.ranking, self.row_seconds = ranking, row_seconds
        self.batches: list[list[Request]] = []  # of every draw
        self.rows_drawn: list[int] = []  # of every draw, until nobody wanted more
        self.threads: set[int] = set()
        self.fits = {False: 16, True: 8}  # pictures, guided or not
        self._may_go = threading.Event()
        self._may_go.set()

    def hold(self):
        self._may_go.clear()

    def release(self):
        self._may_go.set()

    def check(self, request):
        if not 1 <= request.n <= self.max_candidates:
            raise UserError(f"n must be 1 .. {self.max_candidates}, got {request.n}")
        if request.best_of is not None and not self.ranking:
            raise UserError("best_of needs a CLIP beside the model: train one or leave best_of out")
        if request.best_of is not None and not request.n <= request.best_of <= self.max_candidates:
            raise UserError(f"best_of must be n .. {self.max_candidates}, got {request.best_of}")
        if not 0 < request.temperature < 100:
            raise UserError(f"temperature must be above 0 and below 100, got {request.temperature}")
        if request.top_k is not None and not 1 <= request.top_k <= VOCAB:
            raise UserError(f"top_k must be 1 .. {VOCAB}, got {request.top_k}")
        if request.top_p is not None and not 0 < request.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {request.top_p}")
        if not 0 <= request.guidance <= 20:
            raise UserError(f"guidance must be 0 .. 20, got {request.guidance}")
        if request.keep_rows is not None and not 0 <= request.keep_rows <= GRID:
            raise UserError(f"keep_rows must be 0 .. {GRID}, got {request.keep_rows}")

    def wave_key(self, request):
        return request.top_k, request.top_p

    def wave(self, *, guided=False):
        return self.fits[guided], f"{self.fits[guided]} images a wave: noise is light"

    def draw(self, requests, on_rows=None):
        self.threads.add(threading.get_ident())
        self.batches.append(list(requests))
        self.rows_drawn.append(0)
        wanted = set(range(len(requests)))
        for rows in range(1, GRID + 1):
            self._may_go.wait(30)
            time.sleep(self.row_seconds)
            if any(request.caption == "poison" for request in requests):
                raise ZeroDivisionError("drawing a poisoned caption")
            for i in sorted(wanted) if on_rows else ():
                shown = SimpleNamespace(request=i, rows=rows, grid=GRID)
                shown.pictures = lambda i=i, rows=rows: [
                    self.picture(requests[i], m, rows=rows) for m in range(requests[i].n)
                ]
                if on_rows(shown) is False:
                    wanted.discard(i)
            if not wanted:
                break
            self.rows_drawn[-1] = rows
        return [self.finished(request) if i in wanted else [] for i, request in enumerate(requests)]

    def finished(self, request):
        drawn = [self.picture(request, m) for m in range(request.best_of or request.n)]
        return sorted(drawn, key=lambda picture: -(picture.score or 0))[: request.n]

    def picture(self, request, candidate, *, rows=GRID):
        seed = request.seed + candidate
        words = repr((request.caption, seed, request.temperature, request.top_k, request.top_p, request.guidance))
        rng = np.random.default_rng(list(hashlib.sha256(words.encode()).digest()))
        pixels = rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        if request.image is not None:
            kept = (GRID // 2 if request.keep_rows is None else request.keep_rows) * SIDE // GRID
            pixels[:kept] = request.image[:kept]
        pixels[rows * SIDE // GRID :] = 0
        picture = Image.fromarray(pixels)
        picture.caption, picture.seed, picture.settings = request.caption, seed, {}
        picture.score = float(rng.random()) if request.best_of else None
        return picture


@contextlib.contextmanager
def serving(pipe, *, load=None, token=None, max_batch=16, wait_seconds=0.02, queue=32, deadline_seconds=20.0):
    """Runs the server in a thread; gives its address, its batcher and its port."""
    batcher = Batcher(
        load or (lambda: pipe),
        max_batch=max_batch,
        wait_seconds=wait_seconds,
        queue=queue,
        deadline_seconds=deadline_seconds,
        metrics=Metrics(),
    )
    server = make_server(build_app(batcher, model=NAME, token=token), deadline_seconds=deadline_seconds)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started and (load or batcher.state == "ready"))
    try:
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", port=port, batcher=batcher, server=server)
    finally:
        if isinstance(pipe, NoisePipeline):
            pipe.release()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition, seconds: float = 10.0):
    """Waits until it is true; fails if it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


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


def metric(server, name):
    _, _, text = post(server, None, "/metrics", {}, "GET")
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text.decode(), re.MULTILINE)[1])
