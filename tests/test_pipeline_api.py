"""`dalle_jax.Pipeline` and `dalle-jax sample`: pictures that say how they were made, arguments that are checked."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import dalle_jax
from dalle_jax import checkpoint, cli
from dalle_jax.data import scenes
from dalle_jax.errors import UserError
from dalle_jax.models import build
from dalle_jax.sample import pipeline as pipeline_module
from dalle_jax.tokenizer import Tokenizer

CAPTION = "a red circle above a blue square"
DVAE = {"image_size": 16, "vocab": 12, "width": 8, "groups": 2, "blocks_per_group": 1, "stem": 8, "patch": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model with random parameters, output heads included."""
    folder = tmp_path_factory.mktemp("model")
    source = scenes.open_scenes("train")
    tokenizer = Tokenizer.train((source[i].captions[0] for i in range(300)), vocab_size=384)
    tokenizer.save(folder)
    model = {
        "num_layers": 2,
        "width": 16,
        "heads": 2,
        "head_size": 8,
        "text_len": 16,
        "text_vocab": tokenizer.vocab_size,
        "grid": 4,
        "image_vocab": 12,
        "remat": "none",
        "precision": "fp32",
    }
    for name, config, path in (("transformer", model, folder), ("dvae", DVAE, folder / "dvae")):
        params = jax.jit(build(name, config).init)(jax.random.key(1))
        noise = jax.random.normal(jax.random.key(2), (max(x.size for x in jax.tree.leaves(params)),))
        params = jax.tree.map(lambda x, noise=noise: x + 0.3 * noise[: x.size].reshape(x.shape), params)
        checkpoint.save_params(path, {"name": name, "model": config}, jax.device_get(params))
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return dalle_jax.Pipeline.load(folder)


def pixels_of(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def test_pictures_carry_how_they_were_made_into_the_png(pipe, tmp_path):
    picture = pipe(CAPTION, n=2, seed=7, temperature=0.9, top_k=5)[1]
    assert (picture.size, picture.mode, picture.caption, picture.seed) == ((16, 16), "RGB", CAPTION, 8)
    picture.save(tmp_path / "picture.png")
    read = Image.open(tmp_path / "picture.png")
    np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))
    assert (read.info["caption"], read.info["seed"]) == (CAPTION, "8")
    assert json.loads(read.info["settings"]) == {
        "checkpoint": pipe.digest,
        "keep_rows": 0,
        "temperature": 0.9,
        "top_k": 5,
        "top_p": None,
    }
    picture.save(tmp_path / "picture.jpg")  # other formats are saved as by any PIL image


def test_one_caption_gives_a_list_and_several_give_lists(pipe):
    alone = pipe(CAPTION, n=2)
    both = pipe([CAPTION, "a small star"], n=2)
    assert [len(row) for row in both] == [2, 2]
    np.testing.assert_array_equal(pixels_of(alone), pixels_of(both[0]))
    assert not np.array_equal(pixels_of(both[0]), pixels_of(both[1]))


def test_a_picture_depends_on_its_own_seed_only(pipe, monkeypatch):
    together = pixels_of(pipe(CAPTION, n=5, seed=10))
    np.testing.assert_array_equal(pixels_of(pipe(CAPTION, n=1, seed=13))[0], together[3])
    np.testing.assert_array_equal(
        pixels_of(row[0] for row in pipe([CAPTION] * 3, seed=[14, 10, 12])), together[[4, 0, 2]]
    )
    monkeypatch.setattr(pipeline_module, "WAVE", 2)  # split into waves, the last of them filled up
    finished = []
    np.testing.assert_array_equal(pixels_of(pipe(CAPTION, n=5, seed=10, on_progress=finished.append)), together)
    assert finished == [2, 4, 5]
    waves = pipe([CAPTION, "a small star", CAPTION], n=1, seed=[10, 0, 11])
    np.testing.assert_array_equal(pixels_of(row[0] for row in waves)[[0, 2]], together[:2])


def test_completion_keeps_the_top_rows(pipe):
    image = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    given = pipe.encode(image)
    completed = pipe(CAPTION, n=3, image=Image.fromarray(image), keep_rows=2)
    whole = pipe(CAPTION, n=1, image=image, keep_rows=4)[0]
    np.testing.assert_array_equal(np.asarray(whole), pipe.decode(given))
    assert completed[0].settings["keep_rows"] == 2
    assert len({np.asarray(picture).tobytes() for picture in completed}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"top_k": 13}, r"top_k must be 1 .. 12, got 13"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"seed": -1}, "seed must be 0"),
        ({"seed": [1, 2]}, "one or one a caption"),
        ({"keep_rows": 2}, "needs an image"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"uint8 \[H, W, 3\]"),
    ],
)
def test_arguments_out_of_range_are_refused(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe(CAPTION, **arguments)


@pytest.mark.parametrize("captions", [[], [3], ""])
def test_captions_must_be_texts(pipe, captions):
    if captions == "":  # an empty caption is a caption: all padding
        assert len(pipe(captions)) == 1
        return
    with pytest.raises(UserError, match="captions must be"):
        pipe(captions)


def test_command_writes_pictures_and_a_sheet(folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", str(folder), CAPTION, "a star", "-n", "2", "--seed", "3", "--out", str(out), "--json"]
    assert cli.main(words) == 0
    made = json.loads(capsys.readouterr().out)
    names = [f"{slug}-{seed}.png" for slug in ("a-red-circle-above-a-blue-square", "a-star") for seed in (3, 4)]
    assert [picture["file"] for picture in made["pictures"]] == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "sheet.png"])
    assert Image.open(out / names[3]).info["seed"] == "4"


def test_missing_and_foreign_parts_are_named(folder, tmp_path, capsys):
    for words, told in (
        (["sample", str(tmp_path / "nothing"), "a star"], "config.json"),
        (["sample", str(folder / "dvae"), "a star"], "expected a transformer"),
        (["sample", str(folder), "a star", "--image", str(tmp_path / "no.png")], "expected a picture to complete"),
    ):
        assert cli.main(words) == 2
        error = capsys.readouterr().err.strip()
        assert told in error and "\n" not in error
