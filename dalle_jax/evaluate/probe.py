"""A small evaluation of pictures that are still in memory: while a model trains, and at the end of the demo.

The same features and distances as everywhere else, of few pictures: good for a curve over the updates of one run, much
too high next to a published number.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dalle_jax.data.record import Record, Source
from dalle_jax.evaluate import distances
from dalle_jax.evaluate.features import ClipExtractor, Extractor, FeatureSet, caption_scores
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.sample.rerank import Reranker

CANDIDATES = 10  # of R-precision: so few pictures have few different captions
NOTE = (
    "features of this demo's own CLIP, trained on its scenes: not Inception numbers, and comparable with no published "
    "FID or CLIP score"
)


@dataclasses.dataclass
class InMemory:
    """Pictures uint8 [H, W, 3] with a caption each, as a source."""

    images: Sequence[np.ndarray]
    captions: Sequence[str]
    name: str = "pictures in memory"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return Record(f"{index:06d}", np.asarray(self.images[index]), (self.captions[index],))


class Probe:
    """Scores small sets against one reference, whose features are computed once."""

    def __init__(
        self,
        reference: Source,
        *,
        rows: Sequence[int],
        side: int,
        inception: Extractor | None = None,
        clip: Reranker | None = None,
    ):
        """rows: of the reference. side: pixels of the pictures that are scored; the reference is brought to it."""
        self._preprocess = Preprocess(crop="center", side=side)
        networks = {"fid": inception, "clip_fid": None if clip is None else ClipExtractor(clip)}
        self._networks = {name: network for name, network in networks.items() if network is not None}
        self._reference = {
            name: distances.mean_and_covariance(self._features(network, reference, rows).features_XF)
            for name, network in self._networks.items()
        }

    def scores(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float]:
        """fid by Inception, if there is one; by CLIP clip_fid, which no published number compares with, clip_score and
        r_precision among CANDIDATES captions.

        Raises:
          UserError: features that are not finite, or fewer than two pictures.
        """
        scores = {}
        for name, network in self._networks.items():
            found = self._features(network, InMemory(images, captions))
            statistics = distances.mean_and_covariance(found.features_XF)
            scores[name] = distances.fid(*statistics, *self._reference[name])
            if isinstance(network, ClipExtractor):
                more, _ = caption_scores(network.clip, found, candidates=CANDIDATES, seed=0)
                scores |= {key: more[key] for key in ("clip_score", "r_precision") if key in more}
        return scores

    def _features(self, network: Extractor, source: Source, rows: Sequence[int] | None = None) -> FeatureSet:
        return network.of_source(source, preprocess=self._preprocess, rows=rows)


def by_clip(clip: Reranker, images: Sequence[np.ndarray], captions: Sequence[str], real: Sequence[np.ndarray]) -> dict:
    """clip_fid and more of pictures against real ones, with a note on what such numbers mean."""
    probe = Probe(InMemory(real, captions), rows=range(len(real)), side=len(real[0]), clip=clip)
    about = {"pictures": len(images), "reference": len(real), "clip": clip.digest}
    return {**probe.scores(images, captions), **about, "note": NOTE}
