"""Any image tokenizer, of any stride and size, through encode, train, sample, serve, evaluate and preflight.

Nothing is said to any of them about grid, stride or size but in the transformer's config, where a contradiction is
refused in one sentence.
"""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

import dalle_jax
from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.data.sources import open_source
from dalle_jax.data.transforms import center_crop
from dalle_jax.errors import UserError
from dalle_jax.evaluate import features
from dalle_jax.models import build, image_tokenizer
from dalle_jax.preflight import flops, hardware
from dalle_jax.preflight.job import Job
from dalle_jax.preflight.topology import Topology
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.train import run
from tests.support.demo_settings import demo_settings
from tests.support.evaluation import write_inception
from tests.support.parameters import random_parameters
from tests.support.stand_in_server import pixels, post, serving

PICTURES, VOCAB = 12, 9
DVAE_8 = {"image_size": 64, "vocab": VOCAB, "width": 4, "groups": 4, "blocks_per_group": 1, "stem": 4}
VQVAE_16 = {
    "image_size": 96, "vocab": VOCAB, "code_dim": 4, "network": "vqvae", "width": 4, "multipliers": (1, 1, 1, 1),
    "blocks": 1, "pixel_range": "centered",
}  # fmt: skip
VQGAN_4 = {
    "image_size": 48, "vocab": VOCAB, "code_dim": 4, "width": 32, "multipliers": (1, 1, 1), "blocks": 1,
    "attention_levels": (), "latent": 4, "unit_codes": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures that are not square, with captions."""
    path, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(PICTURES):
        pixels = rng.integers(0, 256, 3) + rng.normal(0, 60, (100, 130, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / f"{index:02d}.png")
        (path / f"{index:02d}.txt").write_text(f"picture number {index} of many")
    return path


def settings_of(trained, folder, text, *, grid, size, source):
    """A transformer that takes one step on the tokens of this image tokenizer."""
    values = {
        "batch_size": 8, "run.log_every": 1, "run.picture_every": None, "run.checkpoint_every": None,
        "model.num_layers": 2, "model.width": 16, "model.heads": 2, "model.head_size": 8, "model.text_len": 24,
        "model.grid": grid, "model.image_vocab": VOCAB, "model.text_vocab": text.vocab_size, "data.image_size": size,
        "data.augment": "center", "run.data.threads": 0, "optimizer.name": "adamw",
        "frozen.image_tokenizer": trained, "run.data.train": source, "run.data.validation": f"folder:{folder}",
        "tokenizer": text.folder, "run.mesh.fsdp": 1, "run.mesh.replica": None,
    }  # fmt: skip
    return demo_settings("transformer", values, steps=1, validate_every=1)


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    found = BPETokenizer.train([path.read_text() for path in sorted(folder.glob("*.txt"))], vocab_size=300)
    found.save(place)
    return Text(place, found.vocab_size)


@dataclasses.dataclass
class Text:
    folder: os.PathLike
    vocab_size: int


@pytest.fixture(scope="module", params=["f16 at 96", "f8 at 64", "f4 at 48"])
def any_tokenizer(request, tmp_path_factory):
    """Its folder, its definition, its stride."""
    name, sizes, stride = {"f16 at 96": ("vq", VQVAE_16, 16), "f8 at 64": ("dvae", DVAE_8, 8)}.get(
        request.param, ("vq", VQGAN_4, 4)
    )
    folder, model = tmp_path_factory.mktemp("tokenizer"), build(name, sizes)
    model_dir.save(folder, {"name": name, "model": sizes}, random_parameters(model))
    return folder, model, stride


def test_grid_stride_and_size_are_the_tokenizers(any_tokenizer, folder, text, tmp_path, capsys):
    trained, model, stride = any_tokenizer
    size, tokens = model.config.image_size, tmp_path / "tokens"
    grid = size // stride
    tokenizer = dalle_jax.ImageTokenizer.load(trained)
    assert (tokenizer.image_size, tokenizer.stride, tokenizer.grid) == (size, stride, (grid, grid))

    words = ["encode", f"folder:{folder}", f"--image-tokenizer={trained}", f"--out={tokens}", "--augment=center"]
    assert main.main([*words, "--batch-size=12", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["settings"]
    assert (made["grid"], made["image_size"], made["vocab"]) == (grid, size, VOCAB)
    records = open_source(f"tokens:{tokens}", pictures_required=False)
    crops = [center_crop(np.asarray(Image.open(path)), size) for path in sorted(folder.glob("*.png"))]
    found = np.stack([records[index].tokens_AI[0] for index in range(PICTURES)])
    np.testing.assert_array_equal(found, tokenizer.encode(np.stack(crops)).reshape(PICTURES, grid**2))

    settings = settings_of(trained, folder, text, grid=grid, size=size, source=f"folder:{folder}")
    with pytest.raises(UserError, match=rf"expected config.model.grid = {grid} as the image tokenizer in .*, got 5: "):
        run.train(settings.changed({"model.grid": 5}), tmp_path / "other", progress=False)

    pod = Topology(hardware.find_chip("gpu", "h100"), (1, 8))
    named = Job(settings, pod, tuple(jax.devices()))
    unnamed = settings.changed({"frozen.image_tokenizer": None})
    unnamed = dataclasses.replace(named, settings=unnamed, image_tokenizers=(model.config,))
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    encoding = flops.traced(functools.partial(image_tokenizer.encode, model), model.abstract, image)
    for job in (named, unnamed):
        assert job.image_tokenizer.config == model.config and job.batch["image"].shape == (8, size, size, 3)
        assert job.work.executed_flops - flops.transformer(job.task.model.config) == encoding > 0


@pytest.mark.slow
def test_any_tokenizer_is_trained_on_drawn_with_served_and_scored(any_tokenizer, folder, text, tmp_path, monkeypatch):
    trained, model, stride = any_tokenizer
    size, workdir, out = model.config.image_size, tmp_path / "transformer", tmp_path / "out"
    grid = size // stride
    settings = settings_of(trained, folder, text, grid=grid, size=size, source=f"folder:{folder}")
    run.train(settings, workdir, progress=False)

    assert main.main(["sample", str(workdir), "picture number 3", "-n=1", "--seed=3", f"--out={out}"]) == 0
    pipe = dalle_jax.Pipeline.load(workdir)
    picture = pipe("picture number 3", seed=3)[0]
    assert picture.size == (size, size) and picture.tokens.shape == (grid, grid)
    (drawn,) = [image for image in map(Image.open, out.glob("*.png")) if image.info.get("seed") == "3"]
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(picture))
    np.testing.assert_array_equal(pipe.decode(picture.tokens[None])[0], np.asarray(picture))

    with serving(pipe, deadline_seconds=240.0) as server:
        wish = {"prompt": "picture number 3", "seed": 3, "response_format": "b64_json"}
        np.testing.assert_array_equal(pixels(post(server, wish)[2]["data"][0]["b64_json"]), np.asarray(picture))
        about = post(server, None, "/v1/models", {}, "GET")[2]["data"][0]
        assert (about["grid"], about["image_size"], about["image_vocab"]) == (grid, size, VOCAB)

    weights = write_inception(tmp_path / "inception")
    monkeypatch.setattr(features, "BATCH", 1)
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "cache"))
    values = {
        "source": f"folder:{folder}", "weights": weights, "clip": None, "draw.count": 8, "draw.best_of": None,
        "draw.shard_size": 4, "reference_exactly": PICTURES, "measure.pools": "fid", "measure.side": 32,
        "measure.blur": "(0.0,)", "measure.splits": 2,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in values.items()]
    words = ["evaluate", str(workdir), "--config=configs/evaluate.py:coco", *words, f"--out={tmp_path / 'scores'}"]
    assert main.main(words) == 0
    assert json.loads((tmp_path / "scores" / "report.json").read_text())["pictures"]["sizes"] == {f"{size}x{size}": 8}


def test_a_transformer_is_square():
    with pytest.raises(UserError, match=r"possible config.model, got one where grid must be .* whole, got \(4, 8\)"):
        demo_settings("transformer", {"model.grid": (4, 8)})


def test_more_image_tokens_than_16_bits_can_name_are_not_written(folder, tmp_path, capsys):
    sizes = {"image_size": 4, "vocab": 65_537, "width": 4, "groups": 1, "blocks_per_group": 1, "stem": 1, "patch": 4}
    model_dir.save(tmp_path / "large", {"name": "dvae", "model": sizes}, random_parameters(build("dvae", sizes)))
    words = ["encode", f"folder:{folder}", f"--image-tokenizer={tmp_path / 'large'}", f"--out={tmp_path / 'tokens'}"]
    assert main.main(words) == 2 and not (tmp_path / "tokens").exists()
    assert "at most 65,536 different tokens, which 16 bits can name, got one of 65,537 in" in capsys.readouterr().err
