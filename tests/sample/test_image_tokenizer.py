"""`dalle_jax.ImageTokenizer` and `Pipeline.encode/decode`: shapes, sizes, batches, pixel values, refusals."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

import dalle_jax
from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.models import build
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.sample import image_tokenizer
from dalle_jax.sample.image_tokenizer import ImageTokenizer
from dalle_jax.train.codebook import Codebook
from dalle_jax.train.objectives import dvae as dvae_objective
from dalle_jax.train.objectives import vq as vq_objective
from dalle_jax.train.settings import DVAEObjective, VQObjective
from tests.support.parameters import random_parameters
from tests.support.stand_in_server import NoisePipeline
from tests.support.tiny_model import CAPTION

STRIDE, GRID, SIZE, VOCAB = 4, 4, 16, 12  # of `tiny_model.DVAE`


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return dalle_jax.ImageTokenizer.load(model_folder / "image_tokenizer")


def some_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)


def test_a_folder_of_either_kind_is_loaded(model_folder, tokenizer, tmp_path):
    """An image tokenizer's own, or a transformer's, which is the one that it was trained with."""
    images = some_images(2, SIZE, SIZE)
    of_transformer = ImageTokenizer.load(str(model_folder))
    np.testing.assert_array_equal(of_transformer.encode(images), tokenizer.encode(images))
    for one in (tokenizer, of_transformer):
        assert (one.image_size, one.grid, one.stride, one.vocab_size) == (SIZE, (GRID, GRID), STRIDE, VOCAB)
    (tmp_path / "alone").mkdir()
    for name in ("config.json", "params.safetensors"):
        (tmp_path / "alone" / name).write_bytes((model_folder / name).read_bytes())
    for folder, message in (
        (tmp_path / "alone", "expected a dvae.* in .*alone, got a transformer: give the folder of a dvae"),
        (tmp_path, "config.json: check the path"),
    ):
        with pytest.raises(UserError, match=message):
            ImageTokenizer.load(folder)


def test_tokens_are_the_most_likely_ones_of_each_image_alone(model_folder, tokenizer):
    """In batches of any size on eight devices; decoding gives an image of each."""
    images = some_images(image_tokenizer.PER_DEVICE * jax.device_count() + 3, 8, 12)
    tokens = tokenizer.encode(images)
    assert tokens.dtype == np.int32 and tokens.shape == (len(images), 2, 3) and len(np.unique(tokens)) > 1
    found = model_dir.load(model_folder / "image_tokenizer")
    apply = jax.jit(found.model.apply, static_argnames="method")
    for row in (0, 1, len(images) - 1):
        logits = apply(found.params, 0.8 * (images[row : row + 1] / np.float32(255)) + 0.1, method="encode")
        np.testing.assert_array_equal(tokens[row], np.asarray(logits)[0].argmax(-1))
        means = np.asarray(apply(found.params, tokens[row : row + 1], method="decode_tokens"), np.float64)[0, ..., :3]
        unit = np.clip((1 / (1 + np.exp(-means)) - 0.1) / 0.8, 0, 1)
        assert np.abs(tokenizer.decode(tokens)[row] - 255 * unit).max() < 0.51
    for dtype in (np.uint8, np.uint16, np.int64):
        again = tokenizer.decode(tokens[:2].astype(dtype))
        assert again.dtype == np.uint8 and again.shape == (2, 8, 12, 3)
        np.testing.assert_array_equal(again, tokenizer.decode(tokens)[:2])


def test_no_images_are_no_tokens(tokenizer):
    tokens = tokenizer.encode(np.zeros((0, 8, 16, 3), np.uint8))
    assert tokens.shape == (0, 2, 4) and tokens.dtype == np.int32
    images = tokenizer.decode(tokens)
    assert images.shape == (0, 8, 16, 3) and images.dtype == np.uint8


@pytest.mark.parametrize(
    ("height", "width", "near"),
    [(250, 250, "248 x 248"), (257, 384, "256 x 384"), (4, 8, "8 x 8"), (1, 1, "8 x 8"), (0, 8, "8 x 8")],
)
def test_a_size_is_refused_with_the_multiple_before_any_work(height, width, near, monkeypatch):
    sizes = {"image_size": 256, "vocab": 9, "width": 4, "groups": 4, "blocks_per_group": 1, "stem": 4}
    model = build("dvae", sizes)
    tokenizer = ImageTokenizer(model_dir.ModelDir({}, model, random_parameters(model)))
    for shape, rows_columns in (((256, 384), (32, 48)), ((8, 8), (1, 1)), ((4096, 64), (512, 8))):
        assert tokenizer.encode(np.zeros((0, *shape, 3), np.uint8)).shape == (0, *rows_columns)
    monkeypatch.setattr(image_tokenizer, "_encode", None)
    message = rf"height and width are multiples of 8, .* got {height} x {width}: crop or resize them, .* to {near}"
    with pytest.raises(UserError, match=message) as refused:
        tokenizer.encode(np.zeros((2, height, width, 3), np.uint8))
    assert "\n" not in str(refused.value)


def test_pictures_much_larger_than_those_of_training_are_encoded_one_by_one(tokenizer, monkeypatch):
    sizes, encode = [], image_tokenizer._encode
    monkeypatch.setattr(image_tokenizer, "_encode", lambda *args: sizes.append(len(args[-1])) or encode(*args))
    tall = some_images(9, 256, 20)  # 20 images of 16 x 16
    tokens = tokenizer.encode(tall)
    assert tokens.shape == (9, 64, 5) and sizes == [8, 8]  # one a device


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), r"got float32 \[2, 16, 16, 3\]: multiply values in 0 .. 1 by 255"),
        (np.zeros((2, 16, 16, 3), np.uint16), r"got uint16 \[2, 16, 16, 3\]: give 8 bits a channel"),
        (np.zeros((2, 16, 16, 4), np.uint8), r"got uint8 \[2, 16, 16, 4\]: give three channels"),
        (np.zeros((2, 3, 16, 16), np.uint8), r"got uint8 \[2, 3, 16, 16\]: give three channels"),
        (np.zeros((16, 16, 3), np.uint8), r"got uint8 \[16, 16, 3\]: give image\[None\] for a single image"),
        (np.zeros((16, 16), np.uint8), r"got uint8 \[16, 16\]: give three channels"),
        (np.zeros((1, 1, 16, 16, 3), np.uint8), r"got uint8 \[1, 1, 16, 16, 3\]: give one batch"),
        ([], r"got float64 \[0\]"),
        ("photo.png", "got <U9"),
        (None, "got object"),
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((16, 20, 3), np.uint8)], "as one array, got arrays of different"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(tokenizer, images, message):
    with pytest.raises(UserError, match=message) as refused:
        tokenizer.encode(images)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((1, 4, 4), VOCAB), r"expected tokens in 0 \.\. 11, got 12 \.\. 12: take those of this"),
        (np.arange(16).reshape(1, 4, 4) - 1, r"expected tokens in 0 \.\. 11, got -1 \.\. 14"),
        (np.full((1, 4, 4), 2**40), r"got 1099511627776 \.\."),
        (np.zeros((4, 4), int), r"got int64 \[4, 4\]: give tokens\[None\] for a single image"),
        (np.zeros(16, int), r"expected tokens as integers \[B, rows, columns\], got int64 \[16\]"),
        (np.zeros((2, 4, 4, 1), int), r"got int64 \[2, 4, 4, 1\]"),
        (np.zeros((2, 0, 4), int), r"got int64 \[2, 0, 4\]"),
        (np.zeros((2, 4, 4)), r"got float64 \[2, 4, 4\]"),
        (np.zeros((2, 4, 4), bool), r"got bool \[2, 4, 4\]"),
    ],
)
def test_what_are_no_image_tokens_is_refused(tokenizer, tokens, message):
    with pytest.raises(UserError, match=message) as refused:
        tokenizer.decode(tokens)
    assert "\n" not in str(refused.value)


# Pixel values, by a dVAE made by hand whose image tokens are four grays.

GRAYS = np.array([0, 85, 170, 255])
GRAY = {"image_size": 16, "vocab": 4, "width": 4, "groups": 1, "blocks_per_group": 1, "stem": 4, "patch": 4}
TOKENS = np.array([[3, 3, 0, 0], [3, 3, 0, 0], [1, 1, 2, 2], [1, 2, 1, 3]])
CARD = np.repeat(GRAYS[TOKENS].repeat(4, 0).repeat(4, 1)[..., None], 3, -1).astype(np.uint8)


def gray_dvae() -> model_dir.ModelDir:
    """The nearest gray of a patch's mean, by the likelihood's range [0.1, 0.9] (appendix A.3), and back."""
    config = GRAY | {"stem_kernel": 1}
    model = build("dvae", config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract)
    levels = 0.1 + 0.8 * GRAYS / 255
    encoder, decoder = params["encoder"], params["decoder"]
    encoder["stem"]["weight"][0, 0, :, 0] = 1 / 48  # the mean of 4 x 4 x 3 values
    encoder["head"]["weight"][0, 0, 0], encoder["head"]["bias"][:] = 2 * levels, -(levels**2)  # - (mean - level)^2
    logits = np.log(levels / (1 - levels))
    decoder["stem"]["weight"][0, 0, :, :2] = np.stack([logits.clip(0), (-logits).clip(0)], 1)
    by_color = decoder["head"]["weight"][0, 0].reshape(4, 16, 6)  # a view
    by_color[0, :, :3], by_color[1, :, :3] = 1, -1
    return model_dir.ModelDir({"name": "dvae", "model": config}, model, params)


@pytest.fixture(scope="module")
def gray_folder(model_folder, tmp_path_factory):
    """A transformer's folder with that dVAE."""
    folder, transformer = tmp_path_factory.mktemp("gray"), model_dir.load(model_folder)
    model = build("transformer", transformer.config["model"] | {"image_vocab": len(GRAYS)})
    config = {"name": "transformer", "model": transformer.config["model"] | {"image_vocab": len(GRAYS)}}
    model_dir.save(folder, config, random_parameters(model))
    gray = gray_dvae()
    model_dir.save_frozen(folder, {"image_tokenizer": gray})
    for file in model_folder.glob("*.model"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_black_is_black_and_white_is_white_at_every_boundary(gray_folder, tmp_path):
    """In Python, in the training's sheet, in encoded shards and in the file of a picture."""
    gray, tokenizer = gray_dvae(), ImageTokenizer.load(gray_folder)
    np.testing.assert_array_equal(tokenizer.encode(CARD[None])[0], TOKENS)
    np.testing.assert_array_equal(tokenizer.decode(TOKENS[None])[0], CARD)

    settings = types.SimpleNamespace(model=DVAEConfig(**gray.config["model"]), objective=DVAEObjective())
    sheet = dvae_objective.build(settings, {}).pictures(gray.params, {}, {"image": CARD[None]}, jax.random.key(0))
    np.testing.assert_array_equal(sheet[:, 0], [CARD, CARD])

    (tmp_path / "cards").mkdir()
    Image.fromarray(CARD).save(tmp_path / "cards" / "card.png")
    (tmp_path / "cards" / "card.txt").write_text("a card")
    out = tmp_path / "tokens"
    words = ["encode", f"folder:{tmp_path / 'cards'}", f"--image-tokenizer={gray_folder / 'image_tokenizer'}"]
    assert main.main([*words, f"--out={out}", "--augment=center", "--json"]) == 0
    (record,) = open_source(f"tokens:{out}", pictures_required=False)
    np.testing.assert_array_equal(record.tokens_AI[0], TOKENS.ravel())

    picture = dalle_jax.Pipeline.load(gray_folder, devices=jax.devices()[:1])(CAPTION, image=CARD, keep_rows=GRID)[0]
    picture.save(tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), CARD)
    np.testing.assert_array_equal(picture.tokens, TOKENS)


@pytest.mark.parametrize(
    ("pixel_range", "black", "white"), [("symmetric", -1, 1), ("unit", 0, 1), ("centered", -0.5, 0.5)]
)
def test_black_and_white_of_every_pixel_range(pixel_range, black, white):
    """By a network made by hand, whose codes are the four grays in its range."""
    config = {
        "image_size": 8, "vocab": 4, "code_dim": 1, "network": "patches", "width": 1, "multipliers": (1,), "blocks": 1,
        "patch": 2, "pixel_range": pixel_range,
    }  # fmt: skip
    model = build("vq", config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.abstract)
    params["encoder"]["conv_in"]["weight"][1, 1] = 1 / 12  # the mean of 2 x 2 x 3 values
    params["decoder"]["conv_out"]["weight"][1, 1] = 1
    for conv in (params["quant_conv"], params["decoder"]["conv_in"]):
        conv["weight"][:] = 1
    params["quantizer"]["codebook"][:, 0] = black + (white - black) * GRAYS / 255
    tokenizer, card = ImageTokenizer(model_dir.ModelDir({}, model, params)), CARD[::2, ::2]
    np.testing.assert_array_equal(tokenizer.encode(card[None])[0], TOKENS)
    np.testing.assert_array_equal(tokenizer.decode(TOKENS[None])[0], card)
    settings = types.SimpleNamespace(
        model=model.config, objective=VQObjective(codebook=Codebook()), batch_size=1, accumulate=1
    )
    sheet = vq_objective.build(settings, {}).pictures(params, {}, {"image": card[None]}, jax.random.key(0))
    np.testing.assert_array_equal(sheet[:, 0], [card, card])


def test_a_model_that_draws_no_tokens_has_none():
    pipe = NoisePipeline()
    assert pipe(CAPTION)[0].tokens is None
    for use in (pipe.encode, pipe.decode):
        with pytest.raises(UserError, match="expected a model that draws image tokens, got one without"):
            use(np.zeros((1, 4, 4, 3), np.uint8))
