"""Scores of a set of pictures against a reference, from the vectors that a network makes of them. numpy, float64.

FID (Heusel et al. 2017), Inception score (Salimans et al. 2016), KID (Binkowski et al. 2018), precision and recall
(Kynkaanniemi et al. 2019), and for captions CLIP score (Hessel et al. 2021) and R-precision (Xu et al. 2018). Nothing
is added to a covariance, no number depends on a global random state, and a set that is too small is refused.
"""

import numpy as np
import scipy.linalg

from dalle_jax.errors import UserError
from dalle_jax.evaluate.statistics import Statistics

BLOCK = 8_192  # vectors that are summed at once: 0.13 GB of 2,048 features
CLIP_SCORE_WEIGHT = 2.5  # Hessel et al. 2021, section 3
IS_SPLITS = 10  # Salimans et al. 2016
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000  # of the reference code of Binkowski et al.
NEIGHBORS = 3  # Kynkaanniemi et al. 2019, section 3
ROWS = 1_024  # of a matrix of distances that are held at a time: 0.3 GB of 40,000 vectors


def compare(
    features_XF: np.ndarray,
    logits_XV: np.ndarray,
    reference: Statistics,
    reference_YF: np.ndarray | None,
    *,
    splits: int = IS_SPLITS,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """All scores by their names in a report, as far as the sets allow, and notes on the rest.

    logits_XV: V = 0 for a network without classes. reference_YF: vectors of the reference, None where there are only
    statistics.

    Raises:
      UserError: fewer than two pictures, or features that are not finite.
    """
    count, features = features_XF.shape
    notes = []
    mean_F, covariance_FF = mean_and_covariance(features_XF)
    scores = {"fid": fid(mean_F, covariance_FF, reference.mean_F, reference.covariance_FF)}
    for name, number in (("pictures", count), ("reference pictures", reference.count)):
        if number is not None and number < features:
            notes.append(f"{number} {name} are fewer than {features} features: FID of so few is much too high")
    if logits_XV.shape[1] and count >= splits:
        order = np.random.default_rng(seed).permutation(count)
        mean, std = inception_score(logits_XV[order], splits=splits)
        scores |= {"inception_score": mean, "inception_score_deviation": std}
    elif logits_XV.shape[1]:
        notes.append(f"no Inception score: {count} pictures for {splits} splits")
    if reference_YF is None:
        return scores, notes
    smaller = min(count, len(reference_YF))
    size = min(KID_SUBSET_SIZE, smaller)
    if size < KID_SUBSET_SIZE:
        notes.append(f"KID of subsets of {size}, as a set has no more, instead of {KID_SUBSET_SIZE}")
    mean, std = kid(features_XF, reference_YF, subset_size=size, seed=seed)
    scores |= {"kid": mean, "kid_deviation": std, "kid_subset_size": size}
    if smaller > NEIGHBORS:
        precision, recall = precision_recall(features_XF, reference_YF)
        scores |= {"precision": precision, "recall": recall}
    else:
        notes.append(f"no precision and recall: {smaller} pictures for {NEIGHBORS} neighbors")
    return scores, notes


class Moments:
    """Mean and covariance of vectors that come in pieces, of which no more than a block is kept.

    Blocks of fixed size are summed about their means and joined in their order (Chan et al. 1979), so that the
    result depends on nothing but the vectors.
    """

    def __init__(self, features: int):
        self.count = 0
        self._mean_F, self._scatter_FF = np.zeros(features), np.zeros((features, features))
        self._waiting: list[np.ndarray] = []

    def add(self, features_XF: np.ndarray) -> None:
        """Take more vectors.

        Raises:
          UserError: some that are not finite, or of another length.
        """
        self._waiting.append(check_features(features_XF, features=len(self._mean_F)))
        if sum(map(len, self._waiting)) >= BLOCK:
            waiting_XF = np.concatenate(self._waiting)
            whole = len(waiting_XF) // BLOCK * BLOCK
            for start in range(0, whole, BLOCK):
                self._join(waiting_XF[start : start + BLOCK])
            self._waiting = [waiting_XF[whole:]] if whole < len(waiting_XF) else []

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean float64 [F] and covariance float64 [F, F], with X - 1 in the denominator; nothing may be added after.

        Raises:
          UserError: fewer than two vectors.
        """
        if self._waiting:
            self._join(np.concatenate(self._waiting))
            self._waiting = []
        if self.count < 2:
            raise UserError(f"expected at least 2 pictures to take a covariance of, got {self.count}: give more")
        return self._mean_F, self._scatter_FF / (self.count - 1)

    def _join(self, block_XF: np.ndarray) -> None:
        block_XF = block_XF.astype(np.float64)
        block_mean_F = block_XF.mean(0)
        block_XF -= block_mean_F
        total = self.count + len(block_XF)
        apart_F = block_mean_F - self._mean_F
        self._mean_F = self._mean_F + apart_F * (len(block_XF) / total)
        between_FF = np.outer(apart_F, apart_F)
        between_FF *= self.count * len(block_XF) / total
        # numpy hands the product of a matrix with its transpose to syrk: half the work, and exactly symmetric.
        self._scatter_FF = between_FF + self._scatter_FF + block_XF.T @ block_XF
        self.count = total


def mean_and_covariance(features_XF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean float64 [F] and covariance float64 [F, F] of all vectors, as `Moments` gives them.

    Raises:
      UserError: fewer than two vectors, or some that are not finite.
    """
    features_XF = check_features(features_XF)
    moments = Moments(features_XF.shape[1])
    for start in range(0, len(features_XF), BLOCK):
        moments.add(features_XF[start : start + BLOCK])
    return moments.result()


def check_features(features_XF: np.ndarray, *, features: int | None = None) -> np.ndarray:
    """The vectors as an array [X, F].

    Raises:
      UserError: not [X, F], another F than `features`, or a value that is not finite.
    """
    features_XF = np.asarray(features_XF)
    if features_XF.ndim != 2 or (features is not None and features_XF.shape[1] != features):
        wanted = "F" if features is None else features
        raise UserError(
            f"expected features [X, {wanted}], got {list(features_XF.shape)}: both sets must come from one network"
        )
    bad = ~np.isfinite(features_XF).all(1)
    if bad.any():
        raise UserError(
            f"expected finite features, got NaN or infinity in {bad.sum()} of {len(bad)}, first in number "
            f"{bad.argmax()}: check the weights of the network"
        )
    return features_XF


def fid(mean_F, covariance_FF, other_mean_F, other_covariance_FF) -> float:
    """Frechet distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^1/2).

    The trace of the root is the sum of the roots of the eigenvalues of L^T B L, symmetric, where A = L L^T by a
    pivoted Cholesky factorization, which exists for singular A too. Negative eigenvalues are rounding and count as 0.

    All four are float64 and finite, as `mean_and_covariance` and `statistics.load` give them.
    """
    factor = _factor(covariance_FF)
    middle = factor @ other_covariance_FF @ factor.T
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(middle), 0, None))  # which reads one half of it
    apart_F = mean_F - other_mean_F
    return float(apart_F @ apart_F + np.trace(covariance_FF) + np.trace(other_covariance_FF) - 2 * roots.sum())


def _factor(covariance_FF: np.ndarray) -> np.ndarray:
    """The transpose of L, [rank, F], with L L^T = covariance; the rank is what rounding leaves of it."""
    lower_FF, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance_FF, lower=1)
    factor = np.empty((rank, len(lower_FF)))
    factor[:, pivots - 1] = np.triu(lower_FF.T)[:rank]  # LAPACK's columns are our rows
    return factor


def inception_score(logits_XV: np.ndarray, *, splits: int = IS_SPLITS) -> tuple[float, float]:
    """exp of the mean divergence of p(class | picture) from p(class), as mean and standard deviation over splits.

    The splits are consecutive: shuffle the pictures by a seed where their order means something.

    Raises:
      UserError: fewer pictures than splits, or logits that are not finite.
    """
    logits_XV = check_features(logits_XV).astype(np.float64)
    if splits < 1 or len(logits_XV) < splits:
        raise UserError(f"expected at least {max(splits, 1)} pictures for {splits} splits, got {len(logits_XV)}")
    log_p_XV = logits_XV - logits_XV.max(1, keepdims=True)
    log_p_XV -= np.log(np.exp(log_p_XV).sum(1, keepdims=True))
    scores = []
    for part in range(splits):
        log_p = log_p_XV[part * len(log_p_XV) // splits : (part + 1) * len(log_p_XV) // splits]
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 * log 0 is 0
            surplus = np.where(p > 0, p * (log_p - np.log(p.mean(0))), 0)
        scores.append(np.exp(surplus.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(
    features_XF: np.ndarray,
    other_YF: np.ndarray,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (x y / F + 1)^3, as mean and standard deviation over subsets.

    The subsets are drawn by the seed.

    Raises:
      UserError: a set smaller than a subset, different features, or some that are not finite.
    """
    features_XF, other_YF = _pair(features_XF, other_YF)
    smaller = min(len(features_XF), len(other_YF))
    if subset_size < 2 or smaller < subset_size:
        raise UserError(
            f"expected at least {max(subset_size, 2)} pictures a set, as one subset of KID has, got {smaller}: "
            "give more, or a smaller subset"
        )
    rng = np.random.default_rng(seed)
    squares = []
    for _ in range(subsets):
        x = features_XF[rng.choice(len(features_XF), subset_size, replace=False)]
        y = other_YF[rng.choice(len(other_YF), subset_size, replace=False)]
        within = [(k.sum() - np.trace(k)) / (subset_size * (subset_size - 1)) for k in (_kernel(x, x), _kernel(y, y))]
        squares.append(sum(within) - 2 * _kernel(x, y).mean())
    return float(np.mean(squares)), float(np.std(squares))


def _kernel(x_XF, y_YF):
    return (x_XF @ y_YF.T / x_XF.shape[1] + 1) ** 3


def precision_recall(
    features_XF: np.ndarray, real_YF: np.ndarray, *, neighbors: int = NEIGHBORS
) -> tuple[float, float]:
    """Share of the pictures that lie among the real ones, and of the real ones that lie among the pictures.

    A vector lies among a set if it is no further from some member than that member's k-th neighbor in the set.

    Raises:
      UserError: a set of no more than `neighbors`, different features, or some that are not finite.
    """
    features_XF, real_YF = _pair(features_XF, real_YF)
    smaller = min(len(features_XF), len(real_YF))
    if neighbors < 1 or smaller <= neighbors:
        raise UserError(f"expected more than {neighbors} pictures a set, one for each neighbor, got {smaller}")
    shift_F = real_YF.mean(0)  # distances of vectors near the origin lose fewer digits
    features_XF, real_YF = features_XF - shift_F, real_YF - shift_F
    return _covered(features_XF, real_YF, neighbors), _covered(real_YF, features_XF, neighbors)


def _covered(points_XF, among_YF, neighbors: int) -> float:
    radius_Y = np.concatenate([_reach(rows, among_YF, neighbors) for rows in _chunks(among_YF)])
    return float(np.mean(np.concatenate([(_squared(p, among_YF) <= radius_Y).any(1) for p in _chunks(points_XF)])))


def _reach(rows_XF, among_YF, neighbors: int):
    """Squared distance of each vector to its k-th neighbor; a copy, so that the matrix behind it is let go."""
    return np.partition(_squared(rows_XF, among_YF), neighbors, axis=1)[:, neighbors].copy()


def _squared(x_XF, y_YF):
    """Squared distances [X, Y]; 0 where there is nothing but rounding, as between a vector and itself."""
    lengths_XY = (x_XF**2).sum(1)[:, None] + (y_YF**2).sum(1)
    squares_XY = lengths_XY - 2 * x_XF @ y_YF.T
    return np.where(squares_XY < 1e-12 * lengths_XY, 0, squares_XY)


def _chunks(x_XF):
    return [x_XF[start : start + ROWS] for start in range(0, len(x_XF), ROWS)]


def clip_score(images_XE: np.ndarray, captions_XE: np.ndarray) -> float:
    """Mean of 2.5 max(cosine, 0) over pictures and their captions, from vectors of any length but 0.

    Raises:
      UserError: not one caption a picture, or vectors that are not finite or 0.
    """
    cosines = np.einsum("xe,xe->x", *_captioned(images_XE, captions_XE))
    return float(CLIP_SCORE_WEIGHT * np.clip(cosines, 0, None).mean())


def r_precision(images_XE: np.ndarray, captions_XE: np.ndarray, *, candidates: int = 100, seed: int = 0) -> float:
    """Share of the pictures whose caption is nearer than `candidates` - 1 others drawn by the seed.

    Captions with the same vector as the right one are not wrong answers and are not drawn. A tie is a miss.

    Raises:
      UserError: not one caption a picture, fewer different captions than candidates, vectors not finite or 0.
    """
    images_XE, captions_XE = _captioned(images_XE, captions_XE)
    unique_YE, right_X = np.unique(captions_XE, axis=0, return_inverse=True)
    if candidates < 2 or len(unique_YE) < candidates:
        raise UserError(f"expected at least {max(candidates, 2)} different captions, got {len(unique_YE)}: give more")
    rng, hits = np.random.default_rng(seed), 0
    for image_E, right in zip(images_XE, right_X.ravel(), strict=True):
        others = rng.choice(len(unique_YE) - 1, candidates - 1, replace=False)
        others += others >= right
        hits += image_E @ unique_YE[right] > (unique_YE[others] @ image_E).max()
    return hits / len(images_XE)


def _captioned(images_XE, captions_XE) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pictures and of one caption each."""
    images_XE, captions_XE = _pair(images_XE, captions_XE)
    if len(images_XE) != len(captions_XE) or not len(images_XE):
        raise UserError(f"expected one caption a picture, got {len(captions_XE)} and {len(images_XE)}")
    return _unit(images_XE), _unit(captions_XE)


def _unit(x_XE):
    lengths = np.linalg.norm(x_XE, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"expected vectors with a direction, got zeros in number {int((lengths == 0).argmax())}")
    return x_XE / lengths


def _pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    x = check_features(x).astype(np.float64)
    return x, check_features(y, features=x.shape[1]).astype(np.float64)
