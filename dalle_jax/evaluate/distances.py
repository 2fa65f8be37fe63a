"""How far one set of pictures is from another, by the vectors that a network makes of them. numpy, float64.

FID (Heusel et al. 2017), Inception score (Salimans et al. 2016), KID (Binkowski et al. 2018), precision and recall
(Kynkaanniemi et al. 2019), and for captions CLIP score (Hessel et al. 2021) and R-precision (Xu et al. 2018). Nothing
is added to a covariance, no number depends on a global random state, and a set that is too small is refused.

Dimensions: N vectors of one set, M of the other, F features, V classes, E embedding, K candidates.
"""

import numpy as np
import scipy.linalg

from dalle_jax.errors import UserError
from dalle_jax.evaluate import moments

CLIP_SCORE_WEIGHT = 2.5  # Hessel et al. 2021, section 3
IS_SPLITS = 10  # Salimans et al. 2016
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000  # of the reference code of Binkowski et al.
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, section 3
ROWS = 1_024  # of a matrix of distances that are held at a time: 0.3 GB of 40,000 vectors


def fid(mean_F, covariance_FF, other_mean_F, other_covariance_FF) -> float:
    """Frechet distance of two Gaussians: |m - n|^2 + tr(A + B - 2 (A B)^1/2).

    The trace of the root is the sum of the roots of the eigenvalues of L^T B L, symmetric, where A = L L^T by a
    pivoted Cholesky factorisation, which exists for singular A too. Negative eigenvalues are rounding and count as 0.

    Raises:
      UserError: another number of features in the two sets, or values that are not finite.
    """
    sizes = np.shape(mean_F)[:1], np.shape(other_mean_F)[:1]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"expected statistics of equally many features, got {sizes[0][0]} and {sizes[1][0]}: "
            "both sets must come from one network"
        )
    arrays = [np.asarray(x, np.float64) for x in (mean_F, covariance_FF, other_mean_F, other_covariance_FF)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError("expected finite statistics, got NaN or infinity: compute them again")
    mean_F, covariance_FF, other_mean_F, other_covariance_FF = arrays
    factor_RF = _factor(covariance_FF)
    middle_RR = factor_RF @ other_covariance_FF @ factor_RF.T
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(middle_RR), 0, None))  # which reads one half of it
    apart_F = mean_F - other_mean_F
    return float(apart_F @ apart_F + np.trace(covariance_FF) + np.trace(other_covariance_FF) - 2 * roots.sum())


def _factor(covariance_FF: np.ndarray) -> np.ndarray:
    """L^T [R, F] with L L^T = covariance, R its rank as far as rounding lets it be told."""
    lower_FF, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance_FF, lower=1)
    factor_RF = np.empty((rank, len(lower_FF)))
    factor_RF[:, pivots - 1] = np.triu(lower_FF.T)[:rank]  # LAPACK's columns are our rows
    return factor_RF


def inception_score(logits_NV: np.ndarray, *, splits: int = IS_SPLITS) -> tuple[float, float]:
    """exp of the mean divergence of p(class | picture) from p(class): mean and deviation over consecutive splits.

    Pictures come in the caller's order: shuffle them by a seed where their order means something.

    Raises:
      UserError: fewer pictures than splits, or logits that are not finite.
    """
    logits_NV = moments.check_features(logits_NV).astype(np.float64)
    if splits < 1 or len(logits_NV) < splits:
        raise UserError(f"expected at least {max(splits, 1)} pictures for {splits} splits, got {len(logits_NV)}")
    log_p_NV = logits_NV - logits_NV.max(1, keepdims=True)
    log_p_NV -= np.log(np.exp(log_p_NV).sum(1, keepdims=True))
    scores = []
    for part in range(splits):
        log_p = log_p_NV[part * len(log_p_NV) // splits : (part + 1) * len(log_p_NV) // splits]
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 * log 0 is 0
            surplus = np.where(p > 0, p * (log_p - np.log(p.mean(0))), 0)
        scores.append(np.exp(surplus.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(
    features_NF: np.ndarray,
    other_MF: np.ndarray,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Unbiased squared MMD under the kernel (x y / F + 1)^3: mean and deviation over subsets drawn by the seed.

    Raises:
      UserError: a set smaller than a subset, different features, or some that are not finite.
    """
    features_NF, other_MF = _pair(features_NF, other_MF)
    smaller = min(len(features_NF), len(other_MF))
    if subset_size < 2 or smaller < subset_size:
        raise UserError(
            f"expected at least {max(subset_size, 2)} pictures a set, as one subset of KID has, got {smaller}: "
            "give more, or a smaller subset"
        )
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        x = features_NF[rng.choice(len(features_NF), subset_size, replace=False)]
        y = other_MF[rng.choice(len(other_MF), subset_size, replace=False)]
        within = [(k.sum() - np.trace(k)) / (subset_size * (subset_size - 1)) for k in (_kernel(x, x), _kernel(y, y))]
        found.append(sum(within) - 2 * _kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def _kernel(x_NF, y_MF):
    return (x_NF @ y_MF.T / x_NF.shape[1] + 1) ** 3


def precision_recall(
    features_NF: np.ndarray, real_MF: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of the pictures that lie among the real ones, and of the real ones that lie among the pictures.

    A vector lies among a set if it is no further from some member than that member's k-th neighbour in the set.

    Raises:
      UserError: a set of no more than `neighbours`, different features, or some that are not finite.
    """
    features_NF, real_MF = _pair(features_NF, real_MF)
    smaller = min(len(features_NF), len(real_MF))
    if neighbours < 1 or smaller <= neighbours:
        raise UserError(f"expected more than {neighbours} pictures a set, one for each neighbour, got {smaller}")
    shift_F = real_MF.mean(0)  # distances of vectors near the origin lose fewer digits
    features_NF, real_MF = features_NF - shift_F, real_MF - shift_F
    return _covered(features_NF, real_MF, neighbours), _covered(real_MF, features_NF, neighbours)


def _covered(points_NF, among_MF, neighbours: int) -> float:
    radius_M = np.concatenate([_reach(rows, among_MF, neighbours) for rows in _chunks(among_MF)])
    return float(np.mean(np.concatenate([(_squared(p, among_MF) <= radius_M).any(1) for p in _chunks(points_NF)])))


def _reach(rows_NF, among_MF, neighbours: int):
    """Squared distance of each vector to its k-th neighbour; a copy, so that the matrix behind it is let go."""
    return np.partition(_squared(rows_NF, among_MF), neighbours, axis=1)[:, neighbours].copy()


def _squared(x_NF, y_MF):
    """Squared distances [N, M]; 0 where there is nothing but rounding, as between a vector and itself."""
    lengths_NM = (x_NF**2).sum(1)[:, None] + (y_MF**2).sum(1)
    squares_NM = lengths_NM - 2 * x_NF @ y_MF.T
    return np.where(squares_NM < 1e-12 * lengths_NM, 0, squares_NM)


def _chunks(x_NF):
    return [x_NF[start : start + ROWS] for start in range(0, len(x_NF), ROWS)]


def clip_score(images_NE: np.ndarray, captions_NE: np.ndarray) -> float:
    """Mean of 2.5 max(cosine, 0) over pictures and their captions, from vectors of any length but 0.

    Raises:
      UserError: not one caption a picture, or vectors that are not finite or 0.
    """
    images_NE, captions_NE = _pair(images_NE, captions_NE)
    if len(images_NE) != len(captions_NE) or not len(images_NE):
        raise UserError(f"expected one caption a picture, got {len(captions_NE)} and {len(images_NE)}")
    cosines = np.einsum("ne,ne->n", _unit(images_NE), _unit(captions_NE))
    return float(CLIP_SCORE_WEIGHT * np.clip(cosines, 0, None).mean())


def r_precision(images_NE: np.ndarray, captions_NE: np.ndarray, *, candidates: int = 100, seed: int = 0) -> float:
    """Share of the pictures whose own caption is nearer than `candidates` - 1 others drawn by the seed.

    Captions that are equal in their vectors to the own one are not wrong answers and are not drawn. A tie is a miss.

    Raises:
      UserError: not one caption a picture, fewer different captions than candidates, vectors not finite or 0.
    """
    images_NE, captions_NE = _pair(images_NE, captions_NE)
    if len(images_NE) != len(captions_NE):
        raise UserError(f"expected one caption a picture, got {len(captions_NE)} and {len(images_NE)}")
    images_NE, captions_NE = _unit(images_NE), _unit(captions_NE)
    unique_KE, own_N = np.unique(captions_NE, axis=0, return_inverse=True)
    if candidates < 2 or len(unique_KE) < candidates:
        raise UserError(f"expected at least {max(candidates, 2)} different captions, got {len(unique_KE)}: give more")
    rng, hits = np.random.default_rng(seed), 0
    for image_E, own in zip(images_NE, own_N.ravel(), strict=True):
        others = rng.choice(len(unique_KE) - 1, candidates - 1, replace=False)
        others += others >= own
        hits += image_E @ unique_KE[own] > (unique_KE[others] @ image_E).max()
    return hits / len(images_NE)


def _unit(x_NE):
    lengths = np.linalg.norm(x_NE, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"expected vectors with a direction, got zeros in number {int((lengths == 0).argmax())}")
    return x_NE / lengths


def _pair(x, y) -> tuple[np.ndarray, np.ndarray]:
    x = moments.check_features(x).astype(np.float64)
    return x, moments.check_features(y, features=x.shape[1]).astype(np.float64)
