"""The Python API: captions in, pictures out.

    pipe = dalle_jax.Pipeline.load("runs/transformer")
    pictures = pipe("a red circle above a blue square", n=4, seed=0)

Ties a trained transformer, its tokenizer and its frozen dVAE together and checks every argument. The sampling itself
is `engine.py`; this file turns words into ids before it and ids into pixels after it.
"""

import hashlib
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dalle_jax import checkpoint
from dalle_jax.data.transforms import centre
from dalle_jax.errors import UserError
from dalle_jax.models import Model, Params, build
from dalle_jax.models.dvae import decode_images, encode_images
from dalle_jax.sample import engine
from dalle_jax.sample.picture import Picture
from dalle_jax.tokenizer import Tokenizer

WAVE = 64  # images sampled at a time; more are split, so that memory does not grow with n
MAX_SEED = 2**32

# Compiled once a model, however many pipelines are made of it.
_encode = jax.jit(encode_images, static_argnums=0)
_decode = jax.jit(decode_images, static_argnums=0)


class Pipeline:
    """A trained DALL-E. Make one with `Pipeline.load`; call it with captions."""

    def __init__(
        self, transformer: Model, params: Params, dvae: Model, dvae_params: Params, tokenizer: Tokenizer, *, digest: str
    ):
        self.model, self.dvae, self.tokenizer, self.digest = transformer, dvae, tokenizer, digest
        self._params, self._dvae_params = jax.device_put((params, dvae_params))

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Pipeline":
        """The model of a transformer's workdir: newest complete checkpoint, tokenizer and dVAE.

        Raises:
          UserError: a part is missing, damaged, or does not belong to the others.
        """
        folder = pathlib.Path(folder)
        config, params = checkpoint.load_model_dir(folder, name="transformer")
        dvae_config, dvae_params = checkpoint.load_model_dir(folder / "dvae", name="dvae")
        model, dvae = build("transformer", config["model"]), build("dvae", dvae_config["model"])
        checkpoint.check_params(params, model.abstract, where=str(folder))
        checkpoint.check_params(dvae_params, dvae.abstract, where=str(folder / "dvae"))
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size != model.config.text_vocab:
            raise UserError(
                f"expected a tokenizer of {model.config.text_vocab} entries in {folder}, got {tokenizer.vocab_size}: "
                "put the one back that the model was trained with"
            )
        digest = hashlib.sha256()
        for tree in (params, dvae_params):
            for leaf in jax.tree.leaves(tree):
                digest.update(np.ascontiguousarray(leaf))
        digest.update(tokenizer.digest.encode())
        return cls(model, params, dvae, dvae_params, tokenizer, digest=digest.hexdigest())

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.dvae.config.image_size

    def __call__(
        self,
        captions: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        image: Image.Image | np.ndarray | None = None,
        keep_rows: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Picture] | list[list[Picture]]:
        """Draw n pictures for each caption.

        captions: one caption or several; they are normalised and cut as in training.
        seed: picture i of a caption has seed + i, and a picture depends on its own seed and caption only. A list gives
          each caption a first seed of its own.
        temperature: above 0; 1 is the paper's, lower is safer and less varied. top_k, top_p: draw only among the k
          most likely codes, or the most likely ones that reach probability p.
        image, keep_rows: complete this picture: the top keep_rows of the grid's rows of codes stay as they are
          (default: half of them).
        on_progress: called with the number of pictures finished so far.

        Returns: a list of n pictures for one caption, a list of such lists for several.
        Raises:
          UserError: an argument out of range.
        """
        words = [captions] if isinstance(captions, str) else list(captions)
        seeds_CM = self._check(words, n, seed, temperature, top_k, top_p, image, keep_rows)
        keep_rows = 0 if image is None else self.model.config.grid // 2 if keep_rows is None else keep_rows
        settings = {
            "temperature": float(temperature),
            "top_k": top_k,
            "top_p": top_p,
            "keep_rows": keep_rows,
            "checkpoint": self.digest,
        }
        given_I = None if image is None else self.encode(image)
        text_CT = np.stack([self.model.config.layout.text_slots(self.tokenizer.encode(word)) for word in words])
        ids_CMI = self._sample(
            text_CT,
            seeds_CM,
            given_I=given_I,
            num_given=keep_rows * self.model.config.grid,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            on_progress=on_progress or (lambda finished: None),
        )
        pictures = [
            [
                Picture.from_array(self.decode(ids_I), caption=word, seed=int(seed), settings=settings)
                for ids_I, seed in zip(ids_MI, seeds_M, strict=True)
            ]
            for word, ids_MI, seeds_M in zip(words, ids_CMI, seeds_CM, strict=True)
        ]
        return pictures[0] if isinstance(captions, str) else pictures

    def encode(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A picture, its centre crop at `image_size`, as int32 codes [grid * grid] in raster order."""
        array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise UserError(f"image must be a PIL image or uint8 [H, W, 3], got {array.dtype} {array.shape}")
        return np.asarray(_encode(self.dvae, self._dvae_params, centre(array, self.image_size)[None]))[0]

    def decode(self, ids_I: np.ndarray) -> np.ndarray:
        """Codes [grid * grid] in raster order -> uint8 [image_size, image_size, 3]."""
        return np.asarray(_decode(self.dvae, self._dvae_params, np.asarray(ids_I)[None]))[0]

    def _sample(self, text_CT, seeds_CM, *, given_I, num_given, on_progress, **settings) -> np.ndarray:
        """int32 [C, M, I], in waves of at most WAVE images; a last, smaller wave is filled up, not recompiled."""
        captions, candidates = seeds_CM.shape
        width = min(candidates, WAVE)
        height = min(captions, max(1, WAVE // width))
        ids_CMI = np.zeros((captions, candidates, self.model.config.layout.image_len), np.int32)
        finished = 0
        for c in range(0, captions, height):
            for m in range(0, candidates, width):
                rows, columns = np.arange(c, c + height) % captions, np.arange(m, m + width) % candidates
                given = None
                if given_I is not None:
                    given = jnp.broadcast_to(jnp.asarray(given_I), (height, width, len(given_I)))
                wave = engine.generate(
                    self.model,
                    self._params,
                    text_CT[rows],
                    engine.image_keys(seeds_CM[np.ix_(rows, columns)]),
                    given,
                    num_given=num_given,
                    **settings,
                )
                new = ids_CMI[c : c + height, m : m + width]
                new[:] = np.asarray(wave)[: new.shape[0], : new.shape[1]]
                finished += new.shape[0] * new.shape[1]
                on_progress(finished)
        return ids_CMI

    def _check(self, words, n, seed, temperature, top_k, top_p, image, keep_rows) -> np.ndarray:
        """Seeds [C, M] if every argument is in range."""
        grid, vocab = self.model.config.grid, self.model.config.image_vocab
        if not words or not all(isinstance(word, str) for word in words):
            raise UserError(f"captions must be a text or a list of at least one text, got {words!r}")
        if n < 1:
            raise UserError(f"n must be at least 1, got {n}")
        if not 0 < temperature < np.inf:
            raise UserError(f"temperature must be above 0, got {temperature}")
        if top_k is not None and not 1 <= top_k <= vocab:
            raise UserError(f"top_k must be 1 .. {vocab}, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {top_p}")
        if keep_rows is not None and (image is None or not 0 <= keep_rows <= grid):
            raise UserError(f"keep_rows must be 0 .. {grid} and needs an image, got {keep_rows}")
        first = [seed] * len(words) if isinstance(seed, int | np.integer) else list(seed)
        if len(first) != len(words) or not all(0 <= s <= MAX_SEED - n for s in first):
            raise UserError(f"seed must be 0 .. 2**32 - n, one or one a caption, got {seed}")
        return np.asarray(first, np.int64)[:, None] + np.arange(n)
