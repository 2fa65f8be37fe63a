"""The load of `benchmarks.reliability.serve` on a server that draws noise: nothing is lost or depends on company."""

import io
import json

import numpy as np
from PIL import Image

from benchmarks.reliability import serve
from tests.support.stand_in_server import SIDE, NoisePipeline, serving


def test_200_mixed_requests_on_a_short_queue():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
    pipe = NoisePipeline(step_seconds=0.005)
    with serving(pipe, queue=24, max_batch=32) as server:
        client = serve.Client(server.port, image=file.getvalue())
        (model,) = json.loads(client.get("/v1/models"))["data"]
        bodies = serve.wishes(200, first_seed=7, model=model)
        went = serve.load(client, bodies, clients=48)
        assert went["lost"] == [] and went["refused"] > 0
        assert went["images"] == sum(body["n"] for body in bodies)
        assert went["candidates"] == sum(body.get("best_of", body["n"]) for body in bodies)
        assert went["batches"] < 100 and 0.3 < went["fill"] <= 1
        assert 0 < went["p50"] <= went["p95"] <= went["seconds"]
        alone = [client.ask(body).files for body in bodies[::9]]
        assert alone == [answer.files for answer in went["answers"][::9]]
    header, _, row = serve.rows({"first": went}, requests=200)
    assert "| 0 of 200 |" in row and row.count("|") == header.count("|")
