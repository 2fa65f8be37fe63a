"""A miniature MS-COCO, a narrow random Inception, random features, and the command that evaluates."""

import json
import pathlib

import jax
import numpy as np
from PIL import Image

from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.data.sources import scenes
from dalle_jax.models import inception

IMAGES, CAPTIONS = 12, 2  # of the miniature MS-COCO: pictures, and captions of each
NARROW = 16  # the random network has a sixteenth of the published channels


def run(*words) -> int:
    return main.main(["evaluate", *map(str, words)])


def make_coco(place: pathlib.Path, *, captions_too: bool = True) -> pathlib.Path:
    """The official layout with pictures of built-in scenes, of two sizes."""
    (place / "annotations").mkdir(parents=True)
    (place / "val2014").mkdir()
    source, images, annotations = scenes.open_scenes("val@40"), [], []
    for i in range(IMAGES):
        record, name = source[i], f"COCO_val2014_{i + 7:012d}.jpg"
        pixels = np.pad(record.image, ((0, 0), (0, 8 * (i % 2)), (0, 0)), constant_values=255)
        Image.fromarray(pixels).save(place / "val2014" / name, quality=95)
        images.append({"id": i + 7, "file_name": name, "height": 40, "width": pixels.shape[1], "license": 1})
        for number in range(CAPTIONS):
            text = f"{record.captions[0]} {number}" if captions_too else " "
            annotations.append({"id": len(annotations), "image_id": i + 7, "caption": text})
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (place / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return place


def write_inception(folder: pathlib.Path) -> pathlib.Path:
    """Model directory of a narrow random network in which no channel is silent for every picture."""
    model = inception.model(inception.InceptionConfig(narrow=NARROW))
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if leaf.ndim > 1:
            fan_in = int(np.prod(leaf.shape[:-1]))
            return (rng.standard_normal(leaf.shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        return np.full(leaf.shape, {"bias": 0.5, "mean": 0}.get(path[-1].key, 1), np.float32)

    params = jax.tree_util.tree_map_with_path(value, model.abstract)
    model_dir.save(folder, {"name": "inception", "model": {"narrow": NARROW}}, params)
    return folder


def noise_image(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def relu_features(seed: int, count: int, features: int, *, shift: float = 0.0) -> np.ndarray:
    """float32 [count, features] like those of a network: correlated, not negative, a third of them 0."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((features // 4, features)) / (features // 4) ** 0.5
    return np.maximum(rng.standard_normal((count, features // 4)) @ mix + 0.4 + shift, 0).astype(np.float32)
