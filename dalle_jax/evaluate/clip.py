"""CLIP as a judge: its vectors as features, how well pictures fit their captions, and which two pictures are the same.

Dimensions: N pictures of one set, M of the other, E embedding.
"""

import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, features, preprocess
from dalle_jax.evaluate.features import Extractor, Found, Preparation
from dalle_jax.sample.rerank import Reranker

RESIZE = "clip"  # its own and only one


class ClipExtractor(Extractor):
    """The picture side of a CLIP in place of Inception; it has no classes, so there is no Inception score of it."""

    def __init__(self, clip: Reranker, *, batch: int | None = None):
        """batch: pictures of one call; default: `features.BATCH`."""
        self.clip, self.digest, self.batch = clip, clip.digest, batch or features.BATCH
        self.features, self.classes = clip.model.config.embed, 0
        self.network = f"clip-{self.features}"

    def prepared(self, image_uint8: np.ndarray, prepare: Preparation) -> np.ndarray:
        return preprocess.clip(prepare.framed(image_uint8), self.clip.image_size)

    def __call__(self, x_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(x_NHWC)
        filled = np.concatenate([x_NHWC, np.zeros((self.batch - count, *x_NHWC.shape[1:]), np.uint8)])
        return self.clip.image_vectors(filled)[:count], np.zeros((count, 0), np.float32)


def caption_scores(clip: Reranker, found: Found, *, candidates: int, seed: int) -> tuple[dict[str, float], list[str]]:
    """CLIP score and R-precision of pictures with captions, and notes on what is missing.

    found: vectors by this CLIP.

    Raises:
      UserError: vectors that are not finite.
    """
    told = [i for i, caption in enumerate(found.captions) if caption]
    notes = []
    if len(told) < len(found):
        notes.append(f"{len(found) - len(told)} of {len(found)} pictures have no caption: CLIP score leaves them out")
    if not told:
        return {}, notes
    captions = [found.captions[i] for i in told]
    different = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(different)}
    vectors_NE = clip.caption_vectors(different)[[place[caption] for caption in captions]]
    images_NE = found.features_NF[told]
    scores = {"clip_score": distances.clip_score(images_NE, vectors_NE), "clip_score_captions": len(told)}
    try:
        scores["r_precision"] = distances.r_precision(images_NE, vectors_NE, candidates=candidates, seed=seed)
        scores["r_precision_candidates"] = candidates
    except UserError as error:
        notes.append(f"no R-precision: {error}")
    return scores, notes
