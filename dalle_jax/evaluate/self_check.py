"""`dalle-jax evaluate --self-check`: does the whole way from pictures to a distance behave as it must, here and now?

Takes built-in scenes and, where no weights are given, a small network of random weights: what is checked are
properties that hold for any network, not published numbers.
"""

import dataclasses

import jax
import numpy as np

from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import distances, moments
from dalle_jax.evaluate.features import Extractor, Preparation
from dalle_jax.models import inception

PICTURES = 48
BLURS = (0, 1, 2, 4, 8)  # the paper's radii
NOISES = (0, 8, 32, 128)  # deviations, of 255
ROUNDING = 1e-4  # of the trace of a covariance: square roots of what float64 leaves of a zero


@dataclasses.dataclass(frozen=True)
class Check:
    """name: what must hold. ok: whether it does. found: the numbers."""

    name: str
    ok: bool
    found: str


@dataclasses.dataclass(frozen=True)
class Noised:
    """A source whose pictures are disturbed by normal noise of a deviation; the same picture always in the same way."""

    source: object
    deviation: float
    name: str = "noised"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        record = self.source[index]
        noise = self.deviation * np.random.default_rng(index).standard_normal(record.image.shape)
        return dataclasses.replace(record, image=(record.image + noise).clip(0, 255).round().astype(np.uint8))


def random_network(*, narrow: int = 16) -> Extractor:
    """A network of random weights, 1 / narrow of the published channels."""
    model = inception.model(inception.InceptionConfig(narrow=narrow))
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if leaf.ndim > 1:
            fan_in = int(np.prod(leaf.shape[:-1]))
            return (rng.standard_normal(leaf.shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        # Biases above 0, so that no channel of so few is silent for every picture.
        return np.full(leaf.shape, {"bias": 0.5, "mean": 0}.get(path[-1].key, 1), np.float32)

    return Extractor(model, jax.tree_util.tree_map_with_path(value, model.abstract))


def run(extractor: Extractor) -> list[Check]:
    """All checks, in the order in which they are told."""
    source = open_source("scenes:val@64")

    def features(rows, blur: float = 0.0, noise: float = 0.0):
        prepare = Preparation(blur=blur)
        return extractor.of_source(Noised(source, noise), prepare=prepare, rows=rows).features_NF

    first, second = range(PICTURES), range(PICTURES, 2 * PICTURES)
    clean_NF = features(first)
    reference = moments.of(clean_NF)
    scale = float(np.trace(reference[1]))
    itself = distances.fid(*reference, *reference)
    halves = distances.fid(*reference, *moments.of(features(second)))
    blurs = [distances.fid(*reference, *moments.of(features(first, blur=radius))) for radius in BLURS[1:]]
    noises = [distances.fid(*reference, *moments.of(features(first, noise=deviation))) for deviation in NOISES[1:]]
    reversed_ = distances.fid(*reference, *moments.of(clean_NF[::-1]))
    rng = np.random.default_rng(0)
    mean, other_mean, deviation, other_deviation = rng.uniform(0.5, 2, (4, 64))
    known = float(((mean - other_mean) ** 2 + (deviation - other_deviation) ** 2).sum())
    basis, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    got = distances.fid(
        basis @ mean, basis * deviation**2 @ basis.T, basis @ other_mean, basis * other_deviation**2 @ basis.T
    )
    return [
        Check("a set and itself: 0", abs(itself) <= ROUNDING * scale, f"{itself:.2g}"),
        Check("a set and itself in another order: 0", abs(reversed_) <= ROUNDING * scale, f"{reversed_:.2g}"),
        Check("two halves of a set: above 0, below the strongest blur", 0 < halves < blurs[-1], f"{halves:.6g}"),
        Check("two Gaussians: the closed form", abs(got - known) < 1e-6, f"{got:.9g}, {known:.9g}"),
        Check(f"blurred by {BLURS}: rising", _rises(blurs), _listed(blurs)),
        Check(f"with noise of {NOISES} / 255: rising", _rises(noises), _listed(noises)),
    ]


def _rises(values: list[float]) -> bool:
    return bool((np.diff([0.0, *values]) > 0).all())


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in [0.0, *values])
