"""`dalle-jax serve` over a real, tiny model: what goes out is what the pipeline draws, alone and in company."""

import base64
import concurrent.futures
import io

import numpy as np
import openai
import pytest
from PIL import Image

import dalle_jax
from tests.support.stand_in_server import pixels, serving
from tests.support.tiny_model import CAPTION

WISHES = [{"n": 2, "seed": 5}, {"n": 1, "seed": 9}, {"n": 3, "seed": 6, "temperature": 0.8}]


def test_pictures_are_those_of_the_pipeline_alone_and_in_company(model_folder):
    pipe = dalle_jax.Pipeline.load(model_folder)
    with serving(pipe, max_batch=None, wait_seconds=0.2, deadline_seconds=240.0) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0, timeout=240)

        def ask(wish, prompt=CAPTION):
            answer = client.images.generate(prompt=prompt, response_format="b64_json", extra_body=wish)
            return [(picture.seed, picture.b64_json) for picture in answer.data]

        with concurrent.futures.ThreadPoolExecutor(len(WISHES)) as pool:
            together = list(pool.map(ask, WISHES))
        assert [ask(wish) for wish in WISHES] == together
        for wish, answer in zip(WISHES, together, strict=True):
            for picture, (seed, file) in zip(pipe(CAPTION, **wish), answer, strict=True):
                drawn = Image.open(io.BytesIO(base64.b64decode(file)))
                np.testing.assert_array_equal(np.asarray(drawn), np.asarray(picture))
                assert (seed, drawn.info["seed"], drawn.info["caption"]) == (picture.seed, str(picture.seed), CAPTION)

        # A prompt may be as long as OpenAI lets it be, in characters: spaces make no tokens.
        wide = CAPTION.replace(" ", " " * 5000, 6)
        wide += " " * (32_000 - len(wide))
        [(_, file)] = ask({"seed": 1}, wide)
        np.testing.assert_array_equal(pixels(file), np.asarray(pipe(CAPTION, seed=1)[0]))
        with pytest.raises(openai.BadRequestError, match="prompt must be .* at most 32000 characters") as refused:
            ask({}, wide + " ")
        assert refused.value.param == "prompt"
