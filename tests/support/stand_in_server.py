"""A server in a thread over a generator of noise: instant, exact, and it can be held in the middle of a drawing."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
from PIL import Image

from dalle_jax.cli.serve import listen, make_server
from dalle_jax.pictures.picture import Picture
from dalle_jax.sample.autoregressive import OPTIONS
from dalle_jax.sample.batches import Capacity
from dalle_jax.sample.generator import Usage
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Request
from dalle_jax.serve.app import build_app
from dalle_jax.serve.batcher import Batcher
from tests.support import until
from tests.support.tiny_model import BrightIsBest

GRID, SIDE, VOCAB, CAPTION_TOKENS, NAME = 4, 16, 128, 12, "noise"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}


class NoiseGenerator:
    """Images are noise from caption, seed and settings; a draft is the image itself, a step shows a quarter of it."""

    image_size, digest, batch_multiple, decode_batch = SIDE, "0" * 64, 1, 16
    image_tokenizer = None
    images = {False: 16, True: 8}  # in a batch, guided or not

    def __init__(self, *, step_seconds: float = 0.0):
        limits = {"top_k": VOCAB, "keep_rows": GRID}
        self.options = tuple(dataclasses.replace(o, max=limits.get(o.name, o.max)) for o in OPTIONS)
        self.step_seconds = step_seconds
        self.finished_steps = 0  # since it was last set to zero
        self.may_go = threading.Event()
        self.may_go.set()

    def check(self, request):
        pass

    def capacity(self, *, guided):
        return Capacity(self.images[guided], f"{self.images[guided]} images per batch: noise is light")

    def batch_key(self, request):
        return request.options.get("top_k"), request.options.get("top_p")

    def steps(self, request):
        return range(self.kept_rows(request), GRID)

    def start(self, requests, seeds_PM):
        images = [[noise(r, seed) for seed in seeds] for r, seeds in zip(requests, seeds_PM, strict=True)]
        return requests, np.array(images)

    def advance(self, state, first, last):
        self.may_go.wait(30)
        time.sleep(self.step_seconds)
        if any(request.caption == "poison" for request in state[0]):
            raise ZeroDivisionError("drawing a poisoned caption")
        self.finished_steps = max(self.finished_steps, last)
        return state

    def drafts(self, state):
        return state[1]

    def preview(self, drafts, step):
        images = drafts.copy()
        images[:, step * SIDE // GRID :] = 0
        return images

    def finish(self, drafts, request, seeds):
        return drafts

    def settings(self, request):
        return {}

    def usage(self, request):
        kept = self.kept_rows(request) * GRID
        return Usage(len(request.caption.split()), CAPTION_TOKENS, image_tokens=kept, drawn_tokens=GRID * GRID - kept)

    def describe(self):
        return {"grid": GRID, "image_vocab": VOCAB, "caption_tokens": CAPTION_TOKENS}

    @staticmethod
    def kept_rows(request):
        return 0 if request.image is None else request.options.get("keep_rows", GRID // 2)


def noise(request, seed):
    """uint8 [SIDE, SIDE, 3]: the image of a request that has this seed."""
    options = [request.options.get(option.name) for option in OPTIONS if not option.completes]
    words = repr((request.caption, int(seed), options, request.guidance))
    rng = np.random.default_rng(list(hashlib.sha256(words.encode()).digest()))
    pixels = rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    kept = NoiseGenerator.kept_rows(request) * SIDE // GRID
    pixels[:kept] = request.image[:kept] if kept else 0
    return pixels


class NoisePipeline(Pipeline):
    """A pipeline over `NoiseGenerator` that remembers its draws. `hold()` stops it before a step until `release()`."""

    def __init__(self, *, step_seconds: float = 0.0, ranking: bool = True):
        super().__init__(NoiseGenerator(step_seconds=step_seconds), BrightIsBest() if ranking else None)
        self.batches: list[list[Request]] = []  # of every draw
        self.steps_drawn: list[int] = []  # of every draw, until nobody waited for more
        self.threads: set[int] = set()

    def hold(self):
        self.generator.may_go.clear()

    def release(self):
        self.generator.may_go.set()

    def draw(self, requests, *, on_progress=None):
        self.threads.add(threading.get_ident())
        self.batches.append(list(requests))
        self.generator.finished_steps = 0
        try:
            return super().draw(requests, on_progress=on_progress)
        finally:
            self.steps_drawn.append(self.generator.finished_steps)

    def finished(self, request):
        """The images of a request, made without the pipeline."""
        images = [self.picture(request, candidate) for candidate in range(request.candidates)]
        return sorted(images, key=lambda image: -(image.score or 0))[: request.n]

    def picture(self, request, candidate):
        """The image of one candidate, made without the pipeline."""
        pixels, seed = noise(request, request.seed + candidate), request.seed + candidate
        score = float(BrightIsBest().score(pixels[None], "")[0]) if request.best_of else None
        return Picture.from_array(pixels, caption=request.caption, seed=seed, score=score, settings={})


@contextlib.contextmanager
def serving(pipe, *, load=None, token=None, max_batch=16, wait_seconds=0.02, queue=32, deadline_seconds=20.0):
    """Runs the server in a thread; gives its address, its batcher and its port."""
    batcher = Batcher(
        load or (lambda: pipe),
        max_batch=max_batch,
        wait_seconds=wait_seconds,
        queue=queue,
        deadline_seconds=deadline_seconds,
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


def pixels(picture):
    """uint8 [H, W, 3] of a PIL image, of base64 text or of a PNG file."""
    if isinstance(picture, str):
        picture = base64.b64decode(picture)
    return np.asarray(Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture)


def png_of(array, **options):
    """The PNG file of an array uint8 [H, W, 3 or 4]."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


def form(*parts, boundary="b"):
    """A multipart body of (head, content) pairs and its headers."""
    body = b"".join(
        b"--b\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts
    )
    return body + b"--b--\r\n", {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def in_background(server, content):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(post, server, content)
    pool.shutdown(wait=False)
    return future


def metric(server, name):
    _, _, text = post(server, None, "/metrics", {}, "GET")
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text.decode(), re.MULTILINE)[1])
