"""What `sampling.py` samples with and holds its speed against: models with random weights, and the roofline of a step.

The roofline counts what a step must read and compute, from the shapes of the engine's own arrays: all weights once for
all images, of every image's cache what its layers' windows reach, the text once a caption; and two operations for each
weight and each number of the keys and values read. It leaves out sampling, launches and the one reading of the text,
and is the time of the slower of the two, as if they overlapped perfectly.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp

from dalle_jax import attention_pattern
from dalle_jax.models import build, decoding
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight.hardware import Chip
from dalle_jax.sample.engine import Engine

MODELS = {
    "0.4B": {"num_layers": 24, "width": 1152, "heads": 18},
    "1.3B": {"num_layers": 24, "width": 2048, "heads": 32},
    "12B": {"num_layers": 64, "width": 3968, "heads": 62},  # the paper's
}
GAIN = 3.0  # of the logits: of their standard deviation, which is small before training and of this order after it


def model(name: str):
    return build("transformer", MODELS[name])


class RandomLayers:
    """Stands for one stacked parameter [L, ...]: each layer is drawn on the device when it is asked for."""

    def __init__(self, key, shape: tuple[int, ...], mean: float, deviation: float):
        self.shape, self._key, self._scale = shape, key, (mean, deviation)

    def __getitem__(self, layer: int):
        return _normal(jax.random.fold_in(self._key, layer), self.shape[1:], *self._scale)


def _normal(key, shape, mean, deviation):
    return mean + deviation * jax.random.normal(key, shape, jnp.float32)


def random_params(model, key):
    """Parameters of a scale like that of trained ones, for `Engine`; never more than one layer of them at once.

    Matrices keep the size of what they multiply (deviation 1 / sqrt(inputs)), those that write to the residual stream
    are smaller by sqrt(2 layers), gains are about 1, and the head gives logits of deviation GAIN.
    """
    config = model.config
    width, residual = config.width, (2 * config.num_layers) ** -0.5
    layers = {"qkv": width**-0.5, "up": width**-0.5, "down": (4 * width) ** -0.5 * residual}
    layers["out"] = (config.heads * config.head_size) ** -0.5 * residual
    ends = {"image_head": GAIN * width**-0.5, "norm_gain": 0.1, "norm_bias": 0.1}

    def random(path, leaf):
        name, of_layers = path[-1].key, len(path) > 1
        deviation = layers.get(name, 0.1) if of_layers else ends.get(name, 0.5)
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return (RandomLayers if of_layers else _normal)(own, leaf.shape, float(name.endswith("gain")), deviation)

    return jax.tree_util.tree_map_with_path(random, model.abstract)


@dataclasses.dataclass(frozen=True)
class Step:
    """Bytes that one position of a wave reads, and operations that it takes; all images together."""

    weights: int
    text: int
    windows: int
    products: int  # operations, with weights
    attention: int  # operations

    @property
    def operations(self) -> int:
        return self.products + self.attention

    def seconds(self, chip: Chip, precision: str = "bf16") -> float:
        reading = (self.weights + self.text + self.windows) / chip.memory_bandwidth
        return max(reading, self.operations / chip.peak_flops[precision])


def step(engine: Engine, captions: int, candidates: int) -> Step:
    """Of an engine, which may be abstract. Embeddings are looked up, so their tables are not read."""
    config, images = engine.config, captions * candidates
    layers, ends = engine._weights
    read = jax.tree.leaves((layers, ends["head"], ends["head_bias"]))
    matrices = [layer[name] for layer in layers for name in ("qkv", "out", "up", "down")] + [ends["head"]]
    numbers = sum(x["int8"].size if isinstance(x, dict) else x.size for x in matrices)
    stores = jax.eval_shape(lambda: decoding.empty_cache(config, images))
    item = stores[0]["k"].dtype.itemsize
    position = 2 * config.heads * config.head_size  # numbers: a key and a value
    windows = sum(attention_pattern.read_slots(kind, grid=config.grid) for kind in config.kinds) * position * images
    text = config.num_layers * config.text_len * position
    return Step(
        weights=sum(leaf.size * leaf.dtype.itemsize for leaf in read),
        text=text * captions * item,
        windows=windows * item,
        products=2 * numbers * images,
        attention=2 * (windows + text * images),
    )


def seconds(engine: Engine, plans, chip: Chip) -> float:
    """The least time that all batches of `plans` can take."""
    one = step(engine, plans[0].prompts, plans[0].candidates)
    return engine.config.layout.image_len * one.seconds(chip) * len(plans)


def cache_bytes(config: TransformerConfig) -> int:
    """Stored of one candidate, all layers."""
    stores = jax.eval_shape(lambda: decoding.empty_cache(config, 1))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stores))
