"""Distances: closed forms, invariances, the published formulas and the numbers of pytorch-fid and torch-fidelity.

The FIDs of GOLDEN are pytorch-fid's and its KID is torch-fidelity's, as `python -m tests.evaluate.test_fid_packages`
prints them; its other numbers are ours as they were first written. It may change only with `relu_features`.
"""

import numpy as np
import pytest
import scipy.linalg

from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, statistics
from dalle_jax.evaluate.distances import mean_and_covariance
from tests.support.evaluation import relu_features

GOLDEN = {
    "fid": 1.8294722616714978,  # pytorch-fid
    "fid of 50": 9.10892173793387,  # pytorch-fid; fewer vectors than features
    "kid": 0.03484296798706055,  # torch-fidelity
    "precision": 0.8733333333333333,
    "recall": 0.76,
    "is": 6.186840920294109,
    "is deviation": 0.6178815716034074,
}


def pair(count=300, features=64):
    return relu_features(1, count, features), relu_features(2, count, features, shift=0.1)


def fid_of(one, other):
    return distances.fid(*mean_and_covariance(one), *mean_and_covariance(other))


def fid_by_sqrtm(one, other):
    """The definition, by the square root of a general matrix."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    apart = one.mean(0) - other.mean(0)
    return apart @ apart + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real


def test_fid_is_its_definition():
    for count in (300, 50):  # 50 is fewer than features: the covariance is singular
        one, other = pair(count)
        assert fid_of(one, other) == pytest.approx(fid_by_sqrtm(one, other), abs=1e-5)


def test_fid_of_known_gaussians_and_of_a_set_with_itself():
    """Of N(m, diag a^2) and N(n, diag b^2) it is |m - n|^2 + |a - b|^2, in any basis."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    m, n, a, b = rng.standard_normal((4, 16))
    a[:5] = 0
    got = distances.fid(basis @ m, basis * a**2 @ basis.T, basis @ n, basis * b**2 @ basis.T)
    assert got == pytest.approx(((m - n) ** 2).sum() + ((abs(a) - abs(b)) ** 2).sum(), abs=1e-6)
    one, other = pair()
    assert abs(fid_of(one, one)) < 1e-6
    assert fid_of(one, other) == pytest.approx(fid_of(other, one), abs=1e-9)
    zeros = np.zeros(3), np.zeros((3, 3))
    assert distances.fid(*zeros, *zeros) == 0


def test_mean_and_covariance_are_numpys_in_blocks_and_out_of_order(monkeypatch):
    features = relu_features(3, 32 * 11 + 5, 24)
    whole = mean_and_covariance(features)
    monkeypatch.setattr(distances, "BLOCK", 32)
    blocks, shuffled = (mean_and_covariance(x) for x in (features, np.random.default_rng(0).permutation(features)))
    for mean, covariance in (whole, blocks, shuffled):
        np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-12)
        np.testing.assert_array_equal(covariance, covariance.T)


def test_moments_are_the_same_bits_in_pieces_of_any_size(monkeypatch):
    features = relu_features(3, 101, 24)
    monkeypatch.setattr(distances, "BLOCK", 16)
    whole = mean_and_covariance(features)
    for size in (1, 7, 16, 50, 101):
        moments = distances.Moments(24)
        for start in range(0, len(features), size):
            moments.add(features[start : start + size])
        for got, want in zip(moments.result(), whole, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_large_mean_costs_no_digits():
    features = relu_features(3, 3_000, 8).astype(np.float64)
    far = mean_and_covariance(features + 1e6)[1]
    np.testing.assert_allclose(far, mean_and_covariance(features)[1], atol=1e-8)


def test_golden_numbers():
    assert scores() == pytest.approx(GOLDEN, abs=1e-6)  # of the square roots of what rounding leaves


def scores() -> dict[str, float]:
    one, other = pair()
    is_mean, is_deviation = distances.inception_score(one * 3, splits=10)
    kid = distances.kid(one, other, subsets=1, subset_size=300)[0]
    precision, recall = distances.precision_recall(one, other)
    few = pair(50)
    found = {"fid": fid_of(one, other), "fid of 50": fid_of(*few), "kid": kid, "precision": precision}
    return found | {"recall": recall, "is": is_mean, "is deviation": is_deviation}


def test_inception_score_of_sure_and_of_unsure_networks():
    sure = np.full((1_000, 10), -1e4)
    sure[np.arange(1_000), np.arange(1_000) % 10] = 1e4
    assert distances.inception_score(sure) == pytest.approx((10, 0))
    assert distances.inception_score(np.zeros((100, 10))) == pytest.approx((1, 0))


def test_kid_is_unbiased_seeded_and_the_kernels_sum():
    one, other = (features.astype(np.float64)[:5] for features in pair(60, 8))

    def kernel(x, y):
        return (x @ y / 8 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (one, other) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(kernel(x, y) for x in one for y in other) / 25
    assert distances.kid(one, other, subsets=2, subset_size=5) == pytest.approx((within - 2 * between, 0), abs=1e-12)
    same = relu_features(4, 400, 16), relu_features(5, 400, 16)
    mean, deviation = distances.kid(*same, subsets=50, subset_size=100)
    assert abs(mean) < deviation and distances.kid(*same, subset_size=50, seed=1) == distances.kid(
        *same, subset_size=50, seed=1
    )


def test_precision_and_recall_of_apart_and_nested_sets():
    rng = np.random.default_rng(0)
    wide, narrow = rng.uniform(-1, 1, (2_000, 2)), rng.uniform(-0.3, 0.3, (2_000, 2))
    precision, recall = distances.precision_recall(narrow, wide)
    assert precision > 0.95 and 0.05 < recall < 0.15  # narrow covers 9 % of wide
    assert distances.precision_recall(wide, wide) == (1, 1)
    assert distances.precision_recall(wide + 10, wide) == (0, 0)


def test_captions():
    images = np.eye(4)
    assert distances.clip_score(images, 3 * images) == 2.5
    assert distances.clip_score(images, -images) == 0
    assert distances.r_precision(images, images + 0.1, candidates=4) == 1
    assert distances.r_precision(images, np.roll(images, 1, 0), candidates=4) == 0
    assert distances.r_precision(np.ones((4, 4)), images, candidates=4) == 0  # a tie is no hit
    twice = np.concatenate([images, images])  # the same caption twice is no wrong answer
    assert distances.r_precision(twice, twice, candidates=4) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: fid_of(a[:1], b), "at least 2"),
        (lambda a, b: mean_and_covariance(np.where(a > 1, np.nan, a)), "first in number"),
        (lambda a, b: mean_and_covariance(a[0]), r"\[X, F\]"),
        (lambda a, b: distances.inception_score(a[:5]), "10 splits"),
        (lambda a, b: distances.kid(a, b), "1000"),
        (lambda a, b: distances.kid(a, b[:, :5], subset_size=5), r"\[X, 64\]"),
        (lambda a, b: distances.precision_recall(a, b[:3]), "more than 3"),
        (lambda a, b: distances.clip_score(a, b[:3]), "one caption"),
        (lambda a, b: distances.clip_score(a, 0 * b), "zeros"),
        (lambda a, b: distances.r_precision(a, b, candidates=301), "301"),
    ],
)
def test_bad_sets_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(*pair())


def test_statistics_files(tmp_path):
    mean, covariance = mean_and_covariance(pair()[0])
    about = dict(network="inception-fid", weights="ab", resize="pytorch", crop="center", side="256", blur="0")
    ours = statistics.Statistics(mean, covariance, 300, about)
    statistics.save(tmp_path / "a.npz", ours)
    with np.load(tmp_path / "a.npz") as file:  # pytorch-fid's names
        np.testing.assert_array_equal(file["mu"], mean)
    loaded = statistics.load(tmp_path / "a.npz")
    assert (loaded.count, loaded.about) == (300, about)
    np.testing.assert_array_equal(loaded.covariance_FF, covariance)
    assert statistics.check_comparable(about, len(mean), loaded, where="a.npz") == []
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance)  # as pytorch-fid writes it
    unknown = statistics.load(tmp_path / "theirs.npz")
    notes = statistics.check_comparable(about, len(mean), unknown, where="theirs.npz")
    assert [note.rpartition(" ")[2] for note in notes] == list(statistics.COMMON) and "theirs.npz" in notes[0]
    for key, value in (("resize", "clean"), ("crop", "none"), ("side", "0"), ("weights", "cd"), ("blur", "2")):
        with pytest.raises(UserError, match=f"expected {key} {value} in a.npz, got {about[key]}"):
            statistics.check_comparable(about | {key: value}, len(mean), loaded, where="a.npz")
    with pytest.raises(UserError, match="another network"):
        statistics.check_comparable(about, 3, loaded, where="a.npz")
    with pytest.raises(UserError, match=r"\.npz"):
        statistics.save(tmp_path / "a.txt", ours)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"\[F, F\]"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0], [1, 1]])}, "symmetric"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "not negative"),
        ({"mu": np.array([None, None]), "sigma": np.eye(2)}, "mu and sigma"),
    ],
)
def test_bad_statistics_files_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        statistics.load(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK no zip")
    for name in ("b.npz", "none.npz"):
        with pytest.raises(UserError, match=name):
            statistics.load(tmp_path / name)
