"""CLIP as a judge: its vectors as features, and how well pictures fit their captions."""

import numpy as np

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, features
from dalle_jax.evaluate.features import Extractor, FeatureSet
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.sample.rerank import Reranker


class ClipExtractor(Extractor):
    """The image side of a CLIP in place of Inception; it has no classes, so there is no Inception score of it."""

    def __init__(self, clip: Reranker):
        self.clip, self.digest, self.batch = clip, clip.digest, features.BATCH
        self.features, self.classes = clip.model.config.embed, 0
        self.network = f"clip-{self.features}"

    def prepared(self, image_uint8: np.ndarray, preprocess: Preprocess) -> np.ndarray:
        return preprocess.for_clip(image_uint8, self.clip.image_size)

    def __call__(self, x_XHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors_XE = sharding.in_batches(self.clip.image_vectors, x_XHWC, size=self.batch)
        return vectors_XE, np.zeros((len(x_XHWC), 0), np.float32)


def caption_scores(
    clip: Reranker, found: FeatureSet, *, candidates: int, seed: int
) -> tuple[dict[str, float], list[str]]:
    """CLIP score and R-precision of pictures with captions, and notes on what is missing.

    found: vectors by this CLIP.

    Raises:
      UserError: vectors that are not finite.
    """
    captioned = [i for i, row in enumerate(found.rows) if row.caption]
    notes = []
    if len(captioned) < len(found):
        missing = len(found) - len(captioned)
        notes.append(f"{missing} of {len(found)} pictures have no caption: CLIP score leaves them out")
    if not captioned:
        return {}, notes
    captions = [found.rows[i].caption for i in captioned]
    different = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(different)}
    vectors_XE = clip.caption_vectors(different)[[place[caption] for caption in captions]]
    images_XE = found.features_XF[captioned]
    scores = {"clip_score": distances.clip_score(images_XE, vectors_XE), "clip_score_captions": len(captioned)}
    try:
        scores["r_precision"] = distances.r_precision(images_XE, vectors_XE, candidates=candidates, seed=seed)
        scores["r_precision_candidates"] = candidates
    except UserError as error:
        notes.append(f"no R-precision: {error}")
    return scores, notes
