"""A tiny random model in a folder, and a stand-in for the CLIP that ranks its images."""

import pathlib

import numpy as np

from dalle_jax import model_dir
from dalle_jax.data.sources import scenes
from dalle_jax.models import build
from dalle_jax.text.bpe import BPETokenizer
from tests.support.parameters import random_parameters

CAPTION = "a red circle above a blue square"
DVAE = {"image_size": 16, "vocab": 12, "width": 8, "groups": 2, "blocks_per_group": 1, "stem": 8, "patch": 2}
TRANSFORMER = {
    "num_layers": 2,
    "width": 16,
    "heads": 2,
    "head_size": 8,
    "text_len": 16,
    "grid": 4,
    "image_vocab": 12,
    "remat": "none",
    "precision": "fp32",
}


def write(folder: pathlib.Path) -> pathlib.Path:
    """An exported model with random parameters, output heads included."""
    source = scenes.open_scenes("train")
    tokenizer = BPETokenizer.train((source[i].captions[0] for i in range(300)), vocab_size=384)
    tokenizer.save(folder)
    transformer = TRANSFORMER | {"text_vocab": tokenizer.vocab_size}
    for name, config, path in (("transformer", transformer, folder), ("dvae", DVAE, folder / "image_tokenizer")):
        model_dir.save(path, {"name": name, "model": config}, random_parameters(build(name, config)))
    return folder


class BrightIsBest:
    """Scores an image by its mean brightness, and remembers how many it was given at a time."""

    digest = "bright"

    def __init__(self):
        self.given = []

    def score(self, images_uint8, caption):
        assert images_uint8.dtype == np.uint8 and isinstance(caption, str)
        self.given.append(len(images_uint8))
        return images_uint8.reshape(len(images_uint8), -1).mean(1).astype(np.float32) / 255


def pixels_of(images):
    """uint8 [B, H, W, 3] of PIL images."""
    return np.stack([np.asarray(image) for image in images])
