"""What the tests of evaluation share: a model that draws, a network, a reference, and batches of few pictures."""

import dataclasses

import pytest

from dalle_jax import model_dir
from dalle_jax.evaluate import features
from dalle_jax.models import clip
from dalle_jax.text import load_tokenizer
from tests.support import tiny_model
from tests.support.evaluation import make_coco, write_inception
from tests.support.parameters import random_parameters
from tests.support.tiny_clip import TINY


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Model directory of a narrow random Inception."""
    return write_inception(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The tiny transformer with a tiny CLIP of random weights beside it."""
    place = tmp_path_factory.mktemp("run") / "transformer"
    place.mkdir()
    tiny_model.write(place)
    tokenizer = load_tokenizer(place)
    config = dataclasses.replace(TINY, text_vocab=tokenizer.vocab_size, text_len=16)
    params = random_parameters(clip.model(config), deviation=0.25)
    model_dir.save(place / "clip", {"name": "clip", "model": dataclasses.asdict(config)}, params)
    tokenizer.save(place / "clip")
    return place


@pytest.fixture(scope="session", autouse=True)
def small_batches():
    """One picture a device, as there are eight of them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "BATCH", 1)
        yield
