"""Reranking: order on trivial cases, independence of batch and picture size, and what is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from dalle_jax import model_dir
from dalle_jax.data.transforms import clip_crop
from dalle_jax.errors import UserError
from dalle_jax.models import clip
from dalle_jax.sample import rerank
from dalle_jax.sample.rerank import Reranker
from dalle_jax.text.bpe import BPETokenizer
from tests.support.tiny_clip import TINY, apply, encode_images

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def plain(colour, height=8, width=8):
    return np.broadcast_to(np.array(COLOURS[colour], np.uint8), (height, width, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP fitted to say which of three colours a plain picture has: the text projection by least squares."""
    tokenizer = BPETokenizer.train(COLOURS, vocab_size=290)
    config = dataclasses.replace(TINY, text_vocab=tokenizer.vocab_size, text_len=16)
    model = clip.model(config)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    images = np.stack([plain(colour) for colour in COLOURS])
    vectors = np.asarray(encode_images(model, params, images))
    wanted = np.linalg.pinv(vectors).T  # its dot product is 1 with the colour's picture and 0 with the others
    text = np.stack([config.layout.caption_ids(tokenizer.encode(colour)) for colour in COLOURS])
    states = params | {"text": params["text"] | {"projection": np.eye(16, dtype=np.float32)}}
    wide = clip.model(dataclasses.replace(config, embed=16))
    read = np.asarray(apply(wide, states, text, method="encode_text")) * 4.0  # of layer-normed states: length sqrt(16)
    params["text"]["projection"] = (np.linalg.pinv(read) @ wanted).astype(np.float32)
    folder = tmp_path_factory.mktemp("model")
    model_dir.save(folder, {"name": "clip", "model": dataclasses.asdict(config)}, params)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def reranker(folder):
    return Reranker.load(folder)


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (20, 16), (5, 5)])
def test_the_picture_of_the_caption_scores_best(reranker, size):
    images = np.stack([plain(colour, *size) for colour in COLOURS])
    for index, colour in enumerate(COLOURS):
        scores = reranker.score(images, colour)
        assert scores.dtype == np.float32 and scores.shape == (3,)
        assert np.argmax(scores) == index and np.abs(scores).max() <= 1 + 1e-6


def test_a_score_does_not_depend_on_the_other_pictures(reranker, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    scores = reranker.score(images, "red")
    np.testing.assert_array_equal(scores, [reranker.score(images[i : i + 1], "red")[0] for i in range(7)])
    monkeypatch.setattr(rerank, "BATCH", 3)
    np.testing.assert_allclose(reranker.score(images, "red"), scores, atol=1e-6)
    assert reranker.score(images[:0], "red").shape == (0,)


def test_a_caption_is_encoded_once(folder, monkeypatch):
    images, calls = np.zeros((1, 8, 8, 3), np.uint8), []
    encode = rerank._encode_captions
    monkeypatch.setattr(rerank, "_encode_captions", lambda *a: calls.append(1) or encode(*a))
    monkeypatch.setattr(rerank, "CACHED_CAPTIONS", 2)
    reranker = Reranker.load(folder)
    for caption in ("red star", "red star", "green star", "red star"):
        reranker.score(images, caption)
    assert len(calls) == 2
    for caption in ("blue star", "red star", "green star"):  # green was used longest ago and had to go
        reranker.score(images, caption)
    assert len(calls) == 4


def test_pictures_are_brought_to_size_as_for_clip_score(reranker):
    """`data.transforms.clip_crop`, which tests/evaluate holds to torchvision; one by one or together."""
    images = np.random.default_rng(0).integers(0, 256, (3, 11, 20, 3), np.uint8)
    cropped = np.stack([clip_crop(image, 8) for image in images])
    np.testing.assert_array_equal(reranker.score(images, "red"), reranker.score(cropped, "red"))


def test_the_digest_tells_models_apart(folder, reranker, tmp_path):
    assert Reranker.load(folder).digest == reranker.digest
    found = model_dir.load(folder)
    config, params = found.config, found.params
    params["log_scale"] = params["log_scale"] + 1
    model_dir.save(tmp_path, config, params)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert Reranker.load(tmp_path).digest != reranker.digest


@pytest.mark.parametrize(
    ("images", "caption", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), "red", "expected images as uint8"),
        (np.zeros((8, 8, 3), np.uint8), "red", r"got uint8 \[8, 8, 3\]"),
        (np.zeros((1, 0, 8, 3), np.uint8), "red", "with pixels"),
        (np.zeros((1, 8, 8, 3), np.uint8), ["red"], "caption as text"),
    ],
)
def test_wrong_arguments_are_refused(reranker, images, caption, message):
    with pytest.raises(UserError, match=message):
        reranker.score(images, caption)


def test_wrong_folders_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="expected a tokenizer"):
        Reranker.load(other)
    BPETokenizer.train(["many other words here"], vocab_size=280).save(other)
    with pytest.raises(UserError, match="expected a tokenizer of"):
        Reranker.load(other)
    found = model_dir.load(folder)
    model_dir.save(other, {**found.config, "name": "dvae"}, found.params)
    with pytest.raises(UserError, match="expected a clip in"):
        Reranker.load(other)
