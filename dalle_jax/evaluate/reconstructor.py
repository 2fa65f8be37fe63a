"""One image tokenizer that encodes and decodes pictures, and the sums from which its scores are made.

Of whatever number of pictures only sums are kept, and the covariance of their Inception features. Also the network that
says how far two pictures look apart.
"""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from dalle_jax import model_dir, pixels, sharding
from dalle_jax.errors import UserError
from dalle_jax.evaluate import fidelity
from dalle_jax.evaluate.distances import Moments, fid
from dalle_jax.mesh import local_mesh
from dalle_jax.models import Model, Params, lpips
from dalle_jax.sample.image_tokenizer import ImageTokenizer, load_model
from dalle_jax.train.objectives.code_health import health

BATCH = 8  # pairs of pictures that a device compares at once


@functools.partial(jax.jit, static_argnums=0)
def _lpips(model: Model, params: Params, image_BHWC, other_BHWC):
    return lpips.distance(model, params, pixels.to_unit(image_BHWC), pixels.to_unit(other_BHWC))


@jax.jit
def _edge_error(image_BHWC, other_BHWC):
    return lpips.edge_error(pixels.to_unit(image_BHWC), pixels.to_unit(other_BHWC))


class Perceptual:
    """LPIPS by the weights of a model directory; without one, the edge error of `models.lpips`.

    Attributes:
      name: 'lpips' or 'edge_error'. digest: sha256 (hex) of the weights, None without. min_size: pixels per side that
        images must have.
    """

    def __init__(self, folder: str | None):
        mesh = local_mesh()
        self._batch, self._place = BATCH * sharding.batch_ways(mesh), sharding.batch_sharding(mesh)
        self.name, self.min_size = "edge_error", 1
        self.digest: str | None = None
        self._distance: Callable = _edge_error
        if folder is not None:
            found = model_dir.load(folder, name="lpips")
            self.name, self.digest, self.min_size = "lpips", found.digest, lpips.MIN_SIZE
            self._distance = functools.partial(
                _lpips, found.model, jax.device_put(found.params, sharding.replicated(mesh))
            )

    def __call__(self, image_BHWC: np.ndarray, other_BHWC: np.ndarray) -> np.ndarray:
        """Distance float32 [B] of pairs of uint8 images.

        Raises:
          UserError: one that is not finite.
        """

        def of_batch(*pair):
            return self._distance(*(jax.device_put(side, self._place) for side in pair))

        found_B = sharding.in_batches(of_batch, image_BHWC, other_BHWC, size=self._batch)
        if not np.isfinite(found_B).all():
            raise UserError("expected finite distances by LPIPS, got NaN or infinity: check its weights")
        return found_B


class Reconstructor:
    """An image tokenizer on all devices of this process, and the sums over what it has reconstructed.

    Attributes:
      folder: it was loaded from. size: pixels per side of its pictures. moments: of Inception's features of the
        reconstructions, None without Inception.
    """

    def __init__(self, folder: str, *, size: int | None, features: int | None):
        """size: None for the one that it was trained at. features: length of Inception's vectors, None without.

        Raises:
          UserError: no image tokenizer there, or one whose stride does not divide the size.
        """
        self.folder, self._found = folder, load_model(folder)
        self._tokenizer = ImageTokenizer(self._found)
        stride, vocab = self._tokenizer.stride, self._tokenizer.vocab_size
        self.size = size or self._tokenizer.image_size
        self.moments = None if features is None else Moments(features)
        if self.size % stride:
            raise UserError(
                f"expected config.size to be a multiple of {stride}, the stride of {folder}, got {size}: "
                "choose one, or None for the size that it was trained at"
            )
        self._codes_V = np.zeros(vocab, np.int64)
        self._sums = dict.fromkeys(("squared_error", "psnr", "ssim", "distance"), 0.0)
        self.pictures = self.exact = 0

    def __call__(self, image_BHWC: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, 3] through image tokens and back; counts the codes."""
        tokens_BRC = self._tokenizer.encode(image_BHWC)
        self._codes_V += np.bincount(tokens_BRC.ravel(), minlength=len(self._codes_V))
        return self._tokenizer.decode(tokens_BRC)

    def compare(
        self, image_BHWC: np.ndarray, again_BHWC: np.ndarray, *, perceptual: Perceptual, pool: futures.Executor
    ) -> Sequence[float]:
        """Add how far reconstructions are from their originals to the sums. Returns: PSNR of each in dB."""
        errors = list(pool.map(fidelity.squared_error, image_BHWC, again_BHWC))
        ratios = [fidelity.psnr(error) for error in errors]
        self.pictures += len(errors)
        self.exact += errors.count(0.0)
        self._sums["squared_error"] += sum(errors)
        self._sums["psnr"] += sum(ratio for ratio, error in zip(ratios, errors, strict=True) if error)
        if self.size >= perceptual.min_size:
            self._sums["distance"] += float(perceptual(image_BHWC, again_BHWC).sum(dtype=np.float64))
        if self.size >= fidelity.WINDOW:
            self._sums["ssim"] += sum(pool.map(fidelity.ssim, image_BHWC, again_BHWC))
        return ratios

    def scores(self, originals: Moments | None, *, perceptual: Perceptual) -> dict[str, Any]:
        """Its sizes and scores by their names in a report. originals: moments of the features of the originals.

        An infinite PSNR is None, as JSON has no such number.
        """
        side, codes = self.size // self._tokenizer.stride, health(self._codes_V)
        differing = self.pictures - self.exact
        found: dict[str, Any] = {
            "tokenizer": self.folder,
            "model": self._found.config["name"],
            "digest": self._found.digest,
            "parameters": self._found.model.num_params,
            "size": self.size,
            "grid": [side, side],
            "tokens": side**2,
            "vocab": len(self._codes_V),
            "bits": side**2 * math.log2(len(self._codes_V)),
            "entropy_bits": side**2 * math.log2(codes["code_perplexity"]),
            "codes_used": int(codes["codes_used"]),
            "perplexity": codes["code_perplexity"],
        }
        if originals is not None and self.moments is not None:
            found["rfid"] = fid(*self.moments.result(), *originals.result())
        found |= {
            "psnr": self._sums["psnr"] / differing if differing else None,
            "psnr_pooled": fidelity.psnr(self._sums["squared_error"] / self.pictures) if differing else None,
            "exact": self.exact,
        }
        if self.size >= fidelity.WINDOW:
            found["ssim"] = self._sums["ssim"] / self.pictures
        if self.size >= perceptual.min_size:
            found[perceptual.name] = self._sums["distance"] / self.pictures
        return found
