"""`Reranker`: how well images show a caption, by a CLIP; the paper's reranking (section 2.6).

    reranker = Reranker.load("runs/clip")
    scores = reranker.score(images_uint8, "a red circle above a blue square")

The score is the cosine of the two vectors without CLIP's scale, so it compares images of one caption. Knows a CLIP, its
tokenizer and how an image is brought to its size; nothing of how images were made.
"""

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import model_dir, sharding
from dalle_jax.checkpoint.digest import of_parts, of_tree
from dalle_jax.data.transforms import clip_crop
from dalle_jax.errors import UserError
from dalle_jax.models import Model, Params
from dalle_jax.models.clip import encode_captions, encode_images
from dalle_jax.text import Tokenizer, load_tokenizer

BATCH = 64  # images or captions encoded at a time, so that memory does not grow with their number
CACHED_CAPTIONS = 1_024


class Reranker:
    """A trained CLIP with its tokenizer. Make one with `Reranker.load`.

    Attributes:
      model: its definition. params: its parameters. digest: sha256 (hex) of parameters and tokenizer.
    """

    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.digest = of_parts({"params": of_tree(params), "tokenizer": tokenizer.digest})
        self.params = jax.device_put(params)
        self._caption = functools.lru_cache(CACHED_CAPTIONS)(self._encode_caption)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Reranker":
        """The CLIP of a workdir (its newest complete checkpoint), an exported one or a converted one.

        Raises:
          UserError: a part is missing, damaged, or does not belong to the others, or the folder is of another model.
        """
        clip = model_dir.load(folder, "clip")
        return cls(clip.model, clip.params, load_tokenizer(folder, layout=clip.model.config.layout))

    @property
    def image_size(self) -> int:
        """Height and width in pixels that images are brought to."""
        return self.model.config.image_size

    def score(self, images_uint8: np.ndarray, caption: str) -> np.ndarray:
        """Cosine of each image's vector with the caption's, float32 [B] in [-1, 1], whatever the other images are.

        images_uint8: [B, H, W, 3] of any size. The shorter side is brought to `image_size` (bicubic), the center
        square is scored. A caption is cut where the text ends that the model reads.

        Raises:
          UserError: not uint8 images, or a caption that is no text.
        """
        images_uint8 = np.asarray(images_uint8)
        if images_uint8.dtype != np.uint8 or images_uint8.ndim != 4 or images_uint8.shape[-1] != 3:
            got = f"{images_uint8.dtype} {list(images_uint8.shape)}"
            raise UserError(f"expected images as uint8 [B, H, W, 3], got {got}: convert them")
        if 0 in images_uint8.shape[1:3]:
            raise UserError(f"expected images with pixels, got {list(images_uint8.shape)}: check how they were made")
        if not isinstance(caption, str):
            raise UserError(f"expected the caption as text, got {caption!r}: give one caption")
        text_E = self._caption(caption)

        size = self.image_size
        images_uint8 = np.array([clip_crop(image, size) for image in images_uint8], np.uint8).reshape(-1, size, size, 3)

        def score(images_uint8):
            return _score(self.model, self.params, images_uint8, text_E)

        return sharding.in_batches(score, images_uint8, size=BATCH)

    def caption_vectors(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [P, E] of captions, cut where the text ends that the model reads."""
        if not captions:
            return np.zeros((0, self.model.config.embed), np.float32)
        text_PT = np.stack([self._text(caption) for caption in captions])
        return sharding.in_batches(functools.partial(_encode_captions, self.model, self.params), text_PT, size=BATCH)

    def _text(self, caption: str) -> np.ndarray:
        return self.model.config.layout.caption_ids(self.tokenizer.encode(caption))

    def _encode_caption(self, caption: str) -> jax.Array:
        return _encode_captions(self.model, self.params, self._text(caption)[None])[0]


_encode_captions = jax.jit(encode_captions, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Params, images_uint8, text_E):
    return jnp.einsum("be,e->b", encode_images(model, params, images_uint8), text_E)
