"""Which pictures show a caption best, by a CLIP: the paper's reranking (section 2.6).

    reranker = Reranker.load("runs/clip")
    scores = reranker.score(images_uint8, "a red circle above a blue square")

The score is the cosine of the two vectors, not times CLIP's scale, so it compares pictures of one caption. Knows a
CLIP, its tokenizer and how a picture is brought to its size; nothing of how pictures were made.

Dimensions: B batch, H height, W width, E embedding.
"""

import collections
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import model_dir
from dalle_jax.checkpoint import digest as digests
from dalle_jax.errors import UserError
from dalle_jax.models import Model, Params
from dalle_jax.models.clip import encode_captions, encode_images
from dalle_jax.text import Tokenizer, load_tokenizer

WAVE = 64  # pictures scored at a time, so that memory does not grow with their number
CACHED_CAPTIONS = 1_024


class Reranker:
    """A trained CLIP with its tokenizer. Make one with `Reranker.load`.

    Attributes:
      model: its definition. digest: sha256 (hex) of parameters and tokenizer.
    """

    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.digest = digests.of_parts({"params": digests.of_tree(params), "tokenizer": tokenizer.digest})
        self._params = jax.device_put(params)
        self._captions: collections.OrderedDict[str, jax.Array] = collections.OrderedDict()

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Reranker":
        """The CLIP of a workdir (its newest complete checkpoint), an exported one or a converted one.

        Raises:
          UserError: a part is missing, damaged, or does not belong to the others, or the folder is of another model.
        """
        folder = pathlib.Path(folder)
        found = model_dir.load(folder, name="clip")
        tokenizer = load_tokenizer(folder)
        text_vocab = found.model.config.text_vocab
        if tokenizer.vocab_size != text_vocab:
            raise UserError(
                f"expected a tokenizer of {text_vocab} entries in {folder}, got {tokenizer.vocab_size}: "
                "put the one back that the model was trained with"
            )
        return cls(found.model, found.params, tokenizer)

    @property
    def image_size(self) -> int:
        """Side in pixels that pictures are brought to."""
        return self.model.config.image_size

    def score(self, images_uint8: np.ndarray, caption: str) -> np.ndarray:
        """Cosine of each picture's vector with the caption's, float32 [B] in [-1, 1]; a picture's own, whatever B.

        images_uint8: [B, H, W, 3] of any size. The shorter side is brought to `image_size` (bicubic), the middle
        square is scored. A caption is cut where the text ends that the model reads.

        Raises:
          UserError: not uint8 pictures, or a caption that is no text.
        """
        images_uint8 = np.asarray(images_uint8)
        if images_uint8.dtype != np.uint8 or images_uint8.ndim != 4 or images_uint8.shape[-1] != 3:
            raise UserError(
                f"expected pictures as uint8 [B, H, W, 3], got {images_uint8.dtype} {list(images_uint8.shape)}: "
                "convert them"
            )
        if 0 in images_uint8.shape[1:3]:
            raise UserError(f"expected pictures with pixels, got {list(images_uint8.shape)}: check their making")
        text_E = self._caption(caption)
        scores = np.zeros(len(images_uint8), np.float32)
        for start in range(0, len(images_uint8), WAVE):
            wave = images_uint8[start : start + WAVE]
            filled = np.concatenate([wave, np.repeat(wave[-1:], WAVE - len(wave), axis=0)])  # one compiled shape
            found = _score(self.model, self._params, filled, text_E)
            scores[start : start + WAVE] = np.asarray(found)[: len(wave)]
        return scores

    def image_vectors(self, images_uint8: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [B, E] of pictures uint8 [B, image_size, image_size, 3], all at a time."""
        return np.asarray(_encode_images(self.model, self._params, images_uint8))

    def caption_vectors(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [N, E] of captions, cut where the text ends that the model reads."""
        slots = self.model.config.layout.text_slots
        found = [np.zeros((0, self.model.config.embed), np.float32)]
        for start in range(0, len(captions), WAVE):
            wave = captions[start : start + WAVE]
            text_BT = np.stack([slots(self.tokenizer.encode(caption)) for caption in wave])
            filled = np.concatenate([text_BT, np.repeat(text_BT[-1:], WAVE - len(wave), axis=0)])  # one compiled shape
            found.append(np.asarray(_encode_caption(self.model, self._params, filled))[: len(wave)])
        return np.concatenate(found)

    def _caption(self, caption: str) -> jax.Array:
        """The caption's vector [E]; the latest CACHED_CAPTIONS are kept."""
        if not isinstance(caption, str):
            raise UserError(f"expected the caption as text, got {caption!r}: give one caption")
        if caption not in self._captions:
            text_BT = self.model.config.layout.text_slots(self.tokenizer.encode(caption))[None]
            self._captions[caption] = _encode_caption(self.model, self._params, text_BT)[0]
            if len(self._captions) > CACHED_CAPTIONS:
                self._captions.popitem(last=False)
        self._captions.move_to_end(caption)
        return self._captions[caption]


_encode_caption = jax.jit(encode_captions, static_argnums=0)
_encode_images = jax.jit(encode_images, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Params, images_uint8, text_E):
    images_uint8 = fitted(images_uint8, model.config.image_size)
    return jnp.einsum("be,e->b", encode_images(model, params, images_uint8), text_E)


def fitted(images_uint8, size: int):
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3]: the shorter side to `size`, bicubic with the kernel widened
    where pictures shrink as Pillow does it, then the middle square."""
    batch, height, width, channels = images_uint8.shape
    scale = size / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    if (tall, wide) != (height, width):
        resized = jax.image.resize(images_uint8.astype(jnp.float32), (batch, tall, wide, channels), "bicubic")
        images_uint8 = resized.round().clip(0, 255).astype(jnp.uint8)
    top, left = (tall - size) // 2, (wide - size) // 2
    return images_uint8[:, top : top + size, left : left + size]
