"""Bodies that nobody meant: whatever comes, the answer is a picture or a refusal, and the server goes on drawing."""

import json
import logging

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dalle_jax.serve import schema
from tests.support.stand_in_server import (
    EDITS,
    GENERATIONS,
    JSON,
    NAME,
    SIDE,
    NoisePipeline,
    form,
    png_of,
    post,
    serving,
)

GOOD = {
    "prompt": "a star", "model": NAME, "n": 2, "size": "auto", "response_format": "b64_json", "user": "me",
    "stream": True, "partial_images": 1, "quality": "auto", "background": "opaque", "output_format": "png", "seed": 5,
    "best_of": 3, "guidance": 1.5, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "keep_rows": 1,
}  # fmt: skip
NAMES = sorted(schema.fields(NoisePipeline(), schema.EDIT))
PNG = png_of(np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))
MASK = png_of(np.repeat([[[255] * 4], [[0] * 4]], SIDE // 2, axis=0).repeat(SIDE, axis=1).astype(np.uint8))

numbers = st.sampled_from([-1, 0, 1, 4, 10**13, 10**400, 1e-9, 1e308]) | st.integers(-5, 12) | st.floats()
text = st.text(st.characters(), max_size=20)  # half surrogate pairs and control characters among them
scalars = st.none() | st.booleans() | numbers | text
nested = st.recursive(scalars, lambda some: st.lists(some, max_size=3) | st.dictionaries(text, some, max_size=3))
good = st.sets(st.sampled_from(sorted(GOOD))).map(lambda names: {"prompt": "a star"} | {n: GOOD[n] for n in names})
odd = st.dictionaries(st.sampled_from(NAMES) | text, nested, max_size=3)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), max_size=3)


def edited(data, edits):
    """Bytes of which some places are cut out and others put in."""
    for place, cut, more in edits:
        at = int(place * len(data))
        data = data[:at] + more + data[at + cut :]
    return data


@st.composite
def json_bodies(draw):
    content = json.dumps(draw(good) | draw(odd), ensure_ascii=draw(st.booleans()))
    return GENERATIONS, edited(content.encode("utf-8", "surrogatepass"), draw(edits)), JSON


@st.composite
def forms(draw):
    def encoded(value):
        return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")

    fields = (draw(good) | draw(odd)).items()
    parts = [(b'name="%s"' % encoded(name).replace(b'"', b"%22"), encoded(value)) for name, value in fields]
    for name in draw(st.lists(st.sampled_from([b"image", b"mask", b"image[]", b"x"]), max_size=3)):
        file = edited(draw(st.sampled_from([PNG, MASK, b""])), draw(edits))
        parts.append((b'name="%s"; filename="i.png"' % name, file))
    parts = [(edited(head, draw(edits)) if draw(st.integers(0, 9)) == 0 else head, data) for head, data in parts]
    body, headers = form(*draw(st.permutations(parts)))
    return EDITS, edited(body, draw(edits)) if draw(st.booleans()) else body, headers


@pytest.mark.parametrize("bodies", [json_bodies(), forms()], ids=["json", "forms"])
@pytest.mark.parametrize("examples", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_body_is_answered(bodies, examples, caplog):
    caplog.set_level(logging.ERROR)
    statuses = set()
    with serving(NoisePipeline(), wait_seconds=0) as server:

        @hypothesis.settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(bodies)
        def check(body):
            path, content, headers = body
            status, _, answer = post(server, content, path, headers)
            assert status == 200 or 400 <= status < 500 and set(answer["error"]) == {"message", "type", "param", "code"}
            statuses.add(status)

        check()
        assert statuses >= {200, 400} and post(server, {"prompt": "a star"})[0] == 200
    assert not caplog.records
