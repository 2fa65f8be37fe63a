"""`dalle-jax serve` as OpenAI's own Python client sees it: pictures, completion, streams, errors, models."""

import re
import shlex
import urllib.request

import numpy as np
import openai
import pytest
from PIL import Image

from dalle_jax.sample.request import Request
from tests.support import ROOT
from tests.support.stand_in_server import (
    EDITS,
    GRID,
    NAME,
    SIDE,
    NoisePipeline,
    form,
    metric,
    pixels,
    png_of,
    post,
    serving,
)

COMMON, OPTIONS = {"seed": 11, "best_of": 6, "guidance": 1.5}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
KNOBS = COMMON | OPTIONS


@pytest.fixture(scope="module")
def pipe():
    return NoisePipeline()


@pytest.fixture(scope="module")
def server(pipe):
    with serving(pipe) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0)


def file_of(array, **options):
    return "picture.png", png_of(array, **options), "image/png"


def test_pictures_are_those_of_the_pipeline_best_first(client, pipe):
    answer = client.images.generate(
        prompt="a star", n=3, size=f"{SIDE}x{SIDE}", response_format="b64_json", user="me", model=NAME, extra_body=KNOBS
    )
    expected = pipe.finished(Request("a star", n=3, **COMMON, options=OPTIONS))
    assert [picture.seed for picture in answer.data] == [picture.seed for picture in expected]
    assert [picture.score for picture in answer.data] == sorted((p.score for p in expected), reverse=True)
    for got, picture in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(got.b64_json), pixels(picture))
        assert got.url is None
    assert (answer.size, answer.output_format, answer.candidates) == (f"{SIDE}x{SIDE}", "png", 6)
    tokens = answer.usage
    assert (tokens.input_tokens, tokens.output_tokens) == (2, 6 * GRID**2)
    assert tokens.total_tokens == tokens.input_tokens + tokens.output_tokens


def test_a_url_holds_the_picture(client, pipe):
    (picture,) = client.images.generate(prompt="a star", extra_body={"seed": 3}).data
    assert picture.b64_json is None and picture.score is None
    with urllib.request.urlopen(picture.url) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"  # pages of other sites may show it
        np.testing.assert_array_equal(pixels(answer.read()), pixels(pipe.picture(Request("a star", seed=3), 0)))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(picture.url.replace(".png", "0.png"))


def test_without_a_seed_every_call_draws_something_else_and_says_what(client):
    first, second = (client.images.generate(prompt="a star", response_format="b64_json").data[0] for _ in range(2))
    assert first.seed != second.seed and first.b64_json != second.b64_json
    again = client.images.generate(prompt="a star", response_format="b64_json", extra_body={"seed": first.seed})
    assert again.data[0].b64_json == first.b64_json


def test_a_stream_shows_rows_and_ends_with_what_one_answer_holds(client):
    knobs = {"seed": 4, "best_of": 3}
    whole = client.images.generate(prompt="a star", n=2, response_format="b64_json", extra_body=knobs)
    events = list(client.images.generate(prompt="a star", n=2, stream=True, partial_images=3, extra_body=knobs))
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [(event.partial_image_index, event.index, event.rows) for event in partial] == [
        (i, index, i + 1) for i in range(3) for index in range(2)
    ]
    for event in partial:
        edge = event.rows * SIDE // GRID
        assert pixels(event.b64_json)[:edge].any() and not pixels(event.b64_json)[edge:].any()
    completed = events[len(partial) :]
    assert {event.type for event in completed} == {"image_generation.completed"}
    for event, picture in zip(completed, whole.data, strict=True):
        assert (event.b64_json, event.seed, event.score) == (picture.b64_json, picture.seed, picture.score)
    assert completed[0].usage.output_tokens == 3 * GRID**2
    for asked, rows in ((0, []), (1, [2]), (2, [1, 2])):  # spread
        events = list(client.images.generate(prompt="a star", stream=True, partial_images=asked))
        assert [event.rows for event in events[:-1]] == rows


def test_a_stream_that_fails_raises_at_the_client(client, server):
    with pytest.raises(openai.APIError, match="could not be drawn") as failed:
        list(client.images.generate(prompt="poison", stream=True, partial_images=1))
    assert failed.value.code == "draw_failed"
    assert metric(server, 'dalle_jax_rejected_total{code="draw_failed"}') == 1


def test_completion_keeps_the_rows_that_the_mask_keeps(client, pipe):
    image = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.full((SIDE, SIDE, 4), 255, np.uint8)
    mask[SIDE // 4 :, :, 3] = 0
    seed = {"seed": 2}

    def edit(**more):
        answer = client.images.edit(image=file_of(image), prompt="a star", response_format="b64_json", **more)
        assert answer.usage.input_tokens_details.image_tokens in (GRID, 2 * GRID, 3 * GRID)
        return pixels(answer.data[0].b64_json)

    for rows, drawn in (
        (1, edit(mask=file_of(mask), extra_body=seed)),
        (1, edit(extra_body={**seed, "keep_rows": 1})),
        (3, edit(extra_body={**seed, "keep_rows": 3})),
        (2, edit(extra_body=seed)),
    ):
        np.testing.assert_array_equal(drawn[: rows * SIDE // GRID], image[: rows * SIDE // GRID])
        np.testing.assert_array_equal(
            drawn, pixels(pipe.picture(Request("a star", image=image, options={"keep_rows": rows}, **seed), 0))
        )
    transparent = np.concatenate([image, mask[..., 3:]], axis=-1)  # the picture's own transparency is a mask too
    own = client.images.edit(image=[file_of(transparent)], prompt="a star", response_format="b64_json", extra_body=seed)
    np.testing.assert_array_equal(pixels(own.data[0].b64_json), edit(mask=file_of(mask), extra_body=seed))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # as cameras write it
    turned = client.images.edit(image=file_of(image[::-1, ::-1], exif=upside_down), prompt="a star",
                                response_format="b64_json", extra_body={**seed, "keep_rows": 3})  # fmt: skip
    three = pipe.picture(Request("a star", image=image, options={"keep_rows": 3}, **seed), 0)
    np.testing.assert_array_equal(pixels(turned.data[0].b64_json), pixels(three))
    events = client.images.edit(image=file_of(image), prompt="a star", stream=True, partial_images=1)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_variation_needs_its_caption(client):
    image = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)
    answer = client.images.create_variation(image=file_of(image), n=2, extra_body={"prompt": "a star"})
    assert len(answer.data) == 2
    cut_out = np.concatenate([image, np.zeros_like(image[..., :1])], axis=-1)  # its transparency is no mask here
    knobs = {"prompt": "a star", "seed": 1}
    answer = client.images.create_variation(image=file_of(cut_out), response_format="b64_json", extra_body=knobs)
    drawn = pixels(answer.data[0].b64_json)
    assert (drawn[: SIDE // 2] == 255).all() and not (drawn[SIDE // 2 :] == 255).all()
    with pytest.raises(openai.BadRequestError, match="draws from captions") as refused:
        client.images.create_variation(image=file_of(image))
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((0, 4), (0, 16)), ((4, 8), (4, 8)), ((6, 16), (0, 16)), ((8, 16), (0, 15)), ((0, 0), (0, 0))],
    ids=["above", "a hole", "between two rows of image tokens", "not the whole width", "nowhere"],
)
def test_masks_that_the_model_cannot_follow_are_refused(client, rows, columns):
    mask = np.full((SIDE, SIDE, 4), 255, np.uint8)
    mask[slice(*rows), slice(*columns)] = 0
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=file_of(np.zeros((SIDE, SIDE, 3), np.uint8)), mask=file_of(mask), prompt="a star")
    assert refused.value.param == "mask" and ("row" in str(refused.value) or rows == (0, 0))


@pytest.mark.parametrize("bits", [np.uint8, np.uint16])
def test_a_mask_without_transparency_is_refused(client, bits):
    """Black and white, as other programs write masks: it would keep everything."""
    mask = np.full((SIDE, SIDE), np.iinfo(bits).max, bits)
    mask[SIDE // 2 :] = 0
    with pytest.raises(openai.BadRequestError, match="mask must be transparent where something is drawn") as refused:
        client.images.edit(image=file_of(np.zeros((SIDE, SIDE, 3), np.uint8)), mask=file_of(mask), prompt="a star")
    assert refused.value.param == "mask"


@pytest.mark.parametrize(
    ("arguments", "param", "says"),
    [
        ({"size": "1024x1024"}, "size", "'16x16'"),
        ({"n": 11}, "n", "at most 10"),
        ({"prompt": " "}, "prompt", "required"),
        ({"prompt": "\u200b \u2060\x07\ufeff"}, "prompt", "required"),
        ({"prompt": "word " * 13}, "prompt", "12 tokens"),
        ({"quality": "hd"}, "quality", "'auto'"),
        ({"style": "vivid"}, "style", "unknown parameter"),
        ({"output_format": "webp"}, "output_format", "'png'"),
        ({"extra_body": {"negative_prompt": "blue"}}, "negative_prompt", "allowed are"),
        ({"extra_body": {"keep_rows": 1}}, "keep_rows", "unknown parameter"),
        ({"extra_body": {"best_of": 4097}}, "best_of", "4,096"),
        ({"n": 3, "extra_body": {"best_of": 2}}, "best_of", "at least n = 3"),
        ({"extra_body": {"temperature": -1}}, "temperature", "at least 0"),
        ({"extra_body": {"top_k": 1.5}}, "top_k", "integer"),
        ({"extra_body": {"top_p": "0.9"}}, "top_p", "number"),
        ({"extra_body": {"seed": 2**32}}, "seed", "4,294,967,295"),
        ({"extra_body": {"seed": True}}, "seed", "integer"),
        ({"stream": True, "partial_images": GRID}, "partial_images", "0 .. 3"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
    ],
)
def test_impossible_requests_are_refused_never_ignored(client, pipe, arguments, param, says):
    before = len(pipe.batches)
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "a star", **arguments})
    error = refused.value
    assert (error.param, error.type) == (param, "invalid_request_error") and error.code
    assert says in error.body["message"]
    assert len(pipe.batches) == before


def test_models(client, pipe):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.digest) == (NAME, "model", pipe.digest)
    assert (model.image_size, model.grid, model.ranking, model.guidance) == (SIDE, GRID, True, True)
    assert client.models.retrieve(NAME) == model
    for call in (lambda: client.models.retrieve("dall-e-2"),
                 lambda: client.images.generate(prompt="a star", model="dall-e-2")):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="'noise'"):
            call()


def test_the_examples_of_the_docs_work(server, pipe, capsys):
    text = (ROOT / "docs" / "serving.md").read_text().replace("http://127.0.0.1:8000", server.address)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/serving.md", "exec"), {})
    asked = pipe.batches[-1][0]
    assert (asked.n, asked.best_of, asked.seed, asked.options["top_k"]) == (2, 32, 0, 64)
    best = pipe.finished(asked)[0]
    assert capsys.readouterr().out == f"{best.seed} {best.score}\n"
    bodies = re.findall(r"curl .*?(http\S+/generations).*?-d '(.*?)'", text, re.DOTALL)
    assert len(bodies) == 2
    for address, body in bodies:
        request = urllib.request.Request(address, body.encode(), {"Content-Type": "application/json"})
        assert b"b64_json" in (answer := urllib.request.urlopen(request).read()) or b"url" in answer
    (words,) = [shlex.split(line) for line in text.splitlines() if line.startswith("curl") and " -F " in line]
    assert words[1].endswith("/v1/images/edits")
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    assert fields.pop("image") == "@picture.png"
    parts = [(f'name="{name}"'.encode(), value.encode()) for name, value in fields.items()]
    parts.append((b'name="image"; filename="picture.png"', file_of(np.full((SIDE, SIDE, 3), 7, np.uint8))[1]))
    content, headers = form(*parts)
    status, _, made = post(server, content, EDITS, headers)
    assert status == 200 and len(made["data"]) == 1
    asked = pipe.batches[-1][0]
    assert (asked.caption, asked.options["keep_rows"], asked.image.mean()) == ("a small star", 4, 7.0)


def test_one_thread_draws(client, pipe):
    assert len(pipe.threads) == 1
