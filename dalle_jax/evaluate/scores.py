"""All scores of one set of pictures against a reference, from vectors or from statistics, and notes on doubts."""

import numpy as np

from dalle_jax.evaluate import distances, moments
from dalle_jax.evaluate.features import Found
from dalle_jax.evaluate.statistics import Statistics


def statistics_of(found: Found, about: dict[str, str]) -> Statistics:
    """Raises UserError for fewer than two pictures or features that are not finite."""
    return Statistics(*moments.of(found.features_NF), len(found), about)


def compare(
    found: Found, theirs: Statistics, reference: Found | None, *, splits: int, seed: int
) -> tuple[dict[str, float], list[str]]:
    """fid, inception_score, kid, precision, recall and more, as far as the sets allow, and notes on the rest.

    theirs: statistics of the reference. reference: its vectors; None where there are only statistics.

    Raises:
      UserError: fewer than two pictures, or features that are not finite.
    """
    ours = statistics_of(found, {})
    scores, notes = {}, []
    scores["fid"] = distances.fid(ours.mean_F, ours.covariance_FF, theirs.mean_F, theirs.covariance_FF)
    for name, count in (("pictures", ours.count), ("reference pictures", theirs.count)):
        if 0 < count < len(ours.mean_F):
            notes.append(f"{count} {name} are fewer than {len(ours.mean_F)} features: FID of so few is much too high")
    if found.logits_NV.shape[1] and len(found) >= splits:
        order = np.random.default_rng(seed).permutation(len(found))
        mean, deviation = distances.inception_score(found.logits_NV[order], splits=splits)
        scores |= {"inception_score": mean, "inception_score_deviation": deviation}
    elif found.logits_NV.shape[1]:
        notes.append(f"no Inception score: {len(found)} pictures for {splits} splits")
    if reference is not None:
        more, more_notes = _of_vectors(found, reference, seed=seed)
        scores, notes = scores | more, notes + more_notes
    return scores, notes


def _of_vectors(found: Found, reference: Found, *, seed: int) -> tuple[dict[str, float], list[str]]:
    """KID, precision and recall, which take the vectors of both sets."""
    notes = []
    smaller = min(len(found), len(reference))
    size = min(distances.KID_SUBSET_SIZE, smaller)
    if size < distances.KID_SUBSET_SIZE:
        notes.append(f"KID of subsets of {size}, as a set has no more, instead of {distances.KID_SUBSET_SIZE}")
    mean, deviation = distances.kid(found.features_NF, reference.features_NF, subset_size=size, seed=seed)
    scores = {"kid": mean, "kid_deviation": deviation, "kid_subset_size": size}
    if smaller > distances.NEIGHBOURS:
        precision, recall = distances.precision_recall(found.features_NF, reference.features_NF)
        scores |= {"precision": precision, "recall": recall}
    else:
        notes.append(f"no precision and recall: {smaller} pictures for {distances.NEIGHBOURS} neighbours")
    return scores, notes
