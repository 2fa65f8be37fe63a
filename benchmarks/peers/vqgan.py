"""Our side of `compare.py --peer vqgan`: VQGANs that encode, decode and train, which taming-transformers has in torch.

Both sides have the same random weights, a formula of their names, and the same pictures; every run says how many image
tokens are equal. Networks are whole: f16 with 16,384 nearest codes, f8 with 8,192 of Gumbel's. A training step is L1
and the codebook's loss, gradients and Adam, without LPIPS and an adversary; ours is the training's own, which also
keeps the moving average and counts the codes. JAX is imported inside functions alone: the peer's script takes constants
and weights from here. `vqgan_cost.py` measures memory, and what the time goes into.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import harness

# Of both sides, in our names: taming's `vqgan_imagenet_f16_16384` and `vqgan_gumbel_f8`.
SHAPES: dict[str, dict[str, Any]] = {
    "f16": dict(vocab=16_384, multipliers=(1, 1, 2, 2, 4), attention_levels=(4,), quantizer="nearest"),
    "f8": dict(vocab=8_192, multipliers=(1, 1, 2, 4), attention_levels=(3,), quantizer="gumbel"),
}
SIDE = 256  # pixels per side that the levels with attention belong to
PIXELS = SIDE * SIDE  # in a batch of every work: one picture of 256 x 256, four of 128 x 128
CHECKED = ("f16", 64)  # network and side of the pictures that both sides encode to be compared
COMMITMENT, LEARNING_RATE = 0.25, 4.5e-6
WORKS = (
    *(f"{verb}_{sizes}" for sizes in ("f16_256", "f8_256", "f16_128") for verb in ("encode", "decode")),
    "train_f16_128",
)
TITLE = "VQGAN next to taming-transformers 0.0.6 in torch"


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict in taming's names: weights with variance 1 / fan-in, gains near 1, normal codes, small biases."""
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(0.1) * x + np.float32("norm" in name and name.endswith("weight"))
    return x if "embed" in name else x * np.float32(math.prod(shape[1:]) ** -0.5)


def pictures(side: int) -> np.ndarray:
    """uint8 [PIXELS / side^2, side, side, 3]: squares of color with some noise."""
    rng = np.random.default_rng(side)
    coarse = rng.integers(20, 236, (PIXELS // side**2, 8, 8, 3)).repeat(side // 8, 1).repeat(side // 8, 2)
    return (coarse + rng.integers(-20, 20, coarse.shape)).astype(np.uint8)


def in_range(image_uint8: np.ndarray) -> np.ndarray:
    """float32, within -1 to 1."""
    return image_uint8.astype(np.float32) / np.float32(127.5) - np.float32(1)


def tokens(network: str, side: int) -> np.ndarray:
    """int64 [B, R, C], for the decoders."""
    shape = SHAPES[network]
    grid = side // 2 ** (len(shape["multipliers"]) - 1)
    return np.random.default_rng(side).integers(shape["vocab"], size=(PIXELS // side**2, grid, grid))


def build_work(work: str) -> Callable[[], Any]:
    """The function that does one of our works once."""
    verb, network, side = work.split("_")
    return {"train": trainer, "encode": encoder, "decode": decoder}[verb](network, int(side))


@functools.cache
def tokenizer(network: str):
    """Model and parameters."""
    import jax

    from dalle_jax.convert import vqgan
    from dalle_jax.models.vq.config import VQConfig
    from dalle_jax.models.vq.model import model

    config = VQConfig(image_size=SIDE, **SHAPES[network])
    found, params = vqgan.convert(weights(torch_shapes(config)), "taming", image_size=SIDE)
    assert found == config
    return model(config), jax.device_put(params)


def torch_shapes(config) -> dict[str, tuple[int, ...]]:
    """taming's name -> shape in torch."""
    from dalle_jax.convert import vqgan
    from dalle_jax.models.vq.model import model

    shapes = {}
    for path, name in vqgan.names(config, "taming").items():
        shape = functools.reduce(lambda tree, key: tree[key], path, model(config).abstract).shape
        shapes[name] = tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape
    return shapes


def encoder(network: str, side: int) -> Callable[[], Any]:
    """A function that makes image tokens of a batch of pictures."""
    import jax

    (model, params), x_BHWC = tokenizer(network), in_range(pictures(side))
    encode = jax.jit(functools.partial(model.apply, method="encode_tokens"))
    return lambda: encode(params, x_BHWC)


def decoder(network: str, side: int) -> Callable[[], Any]:
    """A function that makes pictures of a batch of image tokens."""
    import jax

    (model, params), tokens_BRC = tokenizer(network), tokens(network, side).astype(np.int32)
    decode = jax.jit(functools.partial(model.apply, method="decode_tokens"))
    return lambda: decode(params, tokens_BRC)


def trainer(network: str, side: int) -> Callable[[], Any]:
    """A function that does one training step."""
    from dalle_jax.train.settings import load_settings

    image = pictures(side)
    values = {
        "model.image_size": side,
        "data.image_size": side,
        "model.precision": "fp32",
        "batch_size": len(image),
        "objective.adversary": None,
        "objective.perceptual": 0.0,
        "objective.codebook.commitment": COMMITMENT,
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.name": "adamw",
        "frozen": {},
    }
    return harness.training_step(load_settings(f"configs/vq.py:{network}").changed(values), {"image": image})


def notes(about: Mapping[str, Any]) -> list[str]:
    """What both sides do, and whether it is the same. about: the peer's last answer."""
    ours = np.asarray(encoder(*CHECKED)())
    equal = (ours.ravel() == np.array(about["tokens"])).mean()
    network, side = CHECKED
    return [
        f"Random weights, the same on both sides, float32. Of {ours.size:,} image tokens of pictures of {side} x "
        f"{side} by {network}, {equal:.2%} are equal. A work is named by network and pixels per side; it has "
        f"{PIXELS:,} pixels, one picture of 256 x 256 or four of 128 x 128."
    ]
