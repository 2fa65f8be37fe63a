"""The Python API of image tokenizers: images to image tokens and back.

    tokenizer = dalle_jax.ImageTokenizer.load("runs/dvae")
    tokens = tokenizer.encode(images)
    images = tokenizer.decode(tokens)

What a model does is in `models/image_tokenizer.py`; here are the checks, the devices and the batches.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax import model_dir, sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import local_mesh
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import image_tokenizer
from dalle_jax.sample.batches import bucket

PER_DEVICE = 16  # images of `image_size` at a time on a device, so that memory does not grow with their number
ROLE = "image_tokenizer"  # of the frozen model in a transformer's folder

# Compiled once per model and shape, however many objects are made of it.
_encode = jax.jit(image_tokenizer.encode, static_argnums=0)
_decode = jax.jit(image_tokenizer.decode, static_argnums=0)


class ImageTokenizer:
    """A trained image tokenizer, of whatever model. Make one with `ImageTokenizer.load`.

    An image of height H and width W has H / stride rows of W / stride image tokens. Images may have any size that is a
    multiple of the stride; nothing is cropped or resized.

    Attributes:
      model: its definition.
      image_size: pixels per side of the images that it was trained on. grid: their rows and columns of image tokens.
      stride: pixels per side of an image token. vocab_size: number of different image tokens.
    """

    def __init__(self, found: ModelDir, *, mesh: Mesh | None = None):
        """mesh: default: all devices of this process, each of which takes a part of the images."""
        mesh = mesh or local_mesh()
        self.model, config = found.model, found.model.config
        self.image_size, self.stride, self.vocab_size = config.image_size, config.stride, config.vocab
        self.grid = config.grid, config.grid
        self.batch_size = PER_DEVICE * sharding.batch_ways(mesh)  # images of `image_size` at a time
        self._params = jax.device_put(found.params, sharding.replicated(mesh))
        self._mesh = mesh

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ImageTokenizer":
        """The image tokenizer of a folder: an image tokenizer's workdir (its newest complete checkpoint), an exported
        one, or a transformer's folder, which holds the one that it was trained with.

        Raises:
          UserError: there is none, or it is damaged.
        """
        return cls(load_model(folder))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, 3] -> image tokens int32 [B, H / stride, W / stride], rows from the top; no noise.

        Raises:
          UserError: another shape or dtype, or a height or width that is no multiple of the stride.
        """
        image_BHWC = _array("images", images)
        if image_BHWC.dtype != np.uint8 or image_BHWC.ndim != 4 or image_BHWC.shape[-1] != 3:
            raise UserError(
                f"expected images as uint8 [B, H, W, 3], got {_form(image_BHWC)}: {_how_to_give(image_BHWC)}"
            )
        height, width = image_BHWC.shape[1:3]
        if height % self.stride or width % self.stride or not height or not width:
            near = " x ".join(str(max(1, side // self.stride) * self.stride) for side in (height, width))
            raise UserError(
                f"expected images whose height and width are multiples of {self.stride}, the stride of this image "
                f"tokenizer, got {height} x {width}: crop or resize them, for example to {near}"
            )
        empty = np.empty((0, height // self.stride, width // self.stride), np.int32)
        return self._in_batches(_encode, image_BHWC, pixels=height * width, empty=empty)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Image tokens, integers [B, rows, columns] -> images uint8 [B, rows * stride, columns * stride, 3].

        Raises:
          UserError: another shape or dtype, or a number that is no image token.
        """
        tokens_BRC = _array("tokens", tokens)
        if tokens_BRC.dtype.kind not in "iu" or tokens_BRC.ndim != 3 or 0 in tokens_BRC.shape[1:]:
            hint = "give tokens[None] for a single image" if tokens_BRC.ndim == 2 else "give what `encode` returns"
            raise UserError(f"expected tokens as integers [B, rows, columns], got {_form(tokens_BRC)}: {hint}")
        if tokens_BRC.size and (tokens_BRC.min() < 0 or tokens_BRC.max() >= self.vocab_size):
            raise UserError(
                f"expected tokens in 0 .. {self.vocab_size - 1}, got {tokens_BRC.min()} .. {tokens_BRC.max()}: take "
                "those of this image tokenizer"
            )
        height, width = (self.stride * side for side in tokens_BRC.shape[1:])
        empty = np.empty((0, height, width, 3), np.uint8)
        return self._in_batches(_decode, tokens_BRC.astype(np.int32), pixels=height * width, empty=empty)

    def _in_batches(self, function: Any, array: np.ndarray, *, pixels: int, empty: np.ndarray) -> np.ndarray:
        """function(model, params, array), a few rows at a time. pixels: of an image. empty: the result of no rows."""
        if not len(array):
            return empty
        ways, place = sharding.batch_ways(self._mesh), sharding.batch_sharding(self._mesh)

        def of_batch(rows: np.ndarray):
            return function(self.model, self._params, jax.device_put(rows, place))

        limit = max(1, PER_DEVICE * self.image_size**2 // pixels)  # of a device
        size = min(limit, bucket(-(-len(array) // ways))) * ways
        return sharding.in_batches(of_batch, array, size=size)


def load_model(folder: str | os.PathLike) -> ModelDir:
    """The model that `ImageTokenizer.load` finds in a folder.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if model_dir.read_config(folder)["name"] not in image_tokenizer.NAMES and model_dir.has_frozen(folder, ROLE):
        return model_dir.load_frozen(folder, ROLE)
    return model_dir.load(folder, image_tokenizer.NAMES)


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise UserError(
            f"expected {name} as one array, got arrays of different shapes: give them one by one"
        ) from error


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _how_to_give(array: np.ndarray) -> str:
    """The advice for an array that is no uint8 [B, H, W, 3]."""
    if array.dtype.kind == "f":
        return "multiply values in 0 .. 1 by 255, round them and convert them to uint8"
    if array.dtype != np.uint8:
        return "give 8 bits a channel"
    if array.shape[-1:] == (3,):
        return "give image[None] for a single image" if array.ndim == 3 else "give one batch"
    return "give three channels, red, green and blue, last (PIL: image.convert('RGB'))"
