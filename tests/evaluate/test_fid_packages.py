"""From the same picture files with the same weights to the same scores as pytorch-fid, torch-fidelity and clean-fid.

The weights are random, so the numbers mean nothing; that they agree does. The pictures are fewer than the features,
the hardest case for a distance of covariances; the slow test has as many as the features, too. Skipped where a package
is missing.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dalle_jax.evaluate import distances, features, preprocess, statistics
from dalle_jax.evaluate.distances import mean_and_covariance
from tests.support.evaluation import noise_image, relu_features, run
from tests.support.inception_weights import import_torchvision, state_dict

COUNT, HEIGHT, WIDTH = 16, 60, 80  # not square, so that a resize has to squeeze
WHY = "the comparison takes PyTorch and {0}: pip install torch torchvision {0}"
SAME_FID = 1e-3  # absolute


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return draw(COUNT, tmp_path_factory)


def draw(count, tmp_path_factory):
    """Two folders of PNG files: pictures of coarse noise, the second set finer and darker."""
    made = []
    for coarse, most in ((20, 255), (10, 200)):
        folder = tmp_path_factory.mktemp("pictures")
        for number in range(count):
            rng = np.random.default_rng(10_000 * coarse + number)
            small = rng.integers(0, most, (HEIGHT // coarse, WIDTH // coarse, 3), np.uint8)
            image = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            image.save(folder / f"{number:04d}.png")
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One file that all three programs read."""
    torch = import_torchvision(WHY.format("pytorch-fid or torch-fidelity"))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({name: torch.from_numpy(array) for name, array in state_dict("fid").items()}, path)
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH", COUNT // 8)  # on eight devices: all pictures at once


@pytest.fixture(scope="module")
def ours(folders, weights, tmp_path_factory):
    """resize -> report of `dalle-jax evaluate` on the two folders."""
    reports = {}

    def report(resize: str, *more) -> dict:
        if (resize, more) not in reports:
            out = tmp_path_factory.mktemp("out")
            places = ("--pictures", folders[0], "--reference", folders[1], "--weights", weights, "--out", out)
            assert run(*places, f"--config.measure.resize={resize}", "--config.measure.splits=1", "--json", *more) == 0
            reports[resize, more] = json.loads((out / "report.json").read_text())
        return reports[resize, more]

    return report


@pytest.mark.timeout(1_800)  # its square root of a singular matrix takes minutes
def test_the_command_of_pytorch_fid(folders, weights, ours, tmp_path, monkeypatch):
    package = pytest.importorskip("pytorch_fid.fid_score", reason=WHY.format("pytorch-fid"))
    import pytorch_fid.inception
    import torch

    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    theirs = tmp_path / "theirs.npz"
    package.save_fid_stats([str(folders[1]), str(theirs)], 5, "cpu", 2_048, num_workers=0)
    want = package.calculate_fid_given_paths([str(folders[0]), str(theirs)], 5, "cpu", 2_048, num_workers=0)

    report = ours("pytorch", "--save-statistics", tmp_path / "ours.npz")
    assert report["scores"]["fid"] == pytest.approx(want, abs=SAME_FID)
    assert abs(ours("tf1")["scores"]["fid"] - want) > 10 * SAME_FID  # the resize alone tells them apart
    one, other = (statistics.load(path) for path in (theirs, tmp_path / "ours.npz"))
    apart = distances.fid(one.mean_F, one.covariance_FF, other.mean_F, other.covariance_FF)
    assert apart == pytest.approx(0, abs=SAME_FID)


def test_the_command_of_torch_fidelity(folders, weights, ours):
    package = pytest.importorskip("torch_fidelity", reason=WHY.format("torch-fidelity"))
    want = package.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), cuda=False, save_cpu_ram=True, cache=False, verbose=False,
        batch_size=5, fid=True, isc=True, isc_splits=1, kid=True, kid_subsets=1, kid_subset_size=COUNT, prc=True,
    )  # fmt: skip
    scores = ours("tf1")["scores"]
    assert scores["fid"] == pytest.approx(want["frechet_inception_distance"], abs=SAME_FID)
    assert scores["inception_score"] == pytest.approx(want["inception_score_mean"], rel=1e-4)
    assert scores["kid_subset_size"] == COUNT
    assert scores["kid"] == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-3)  # float32 there
    assert (scores["precision"], scores["recall"]) == (want["precision"], want["recall"])


@pytest.mark.slow
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("count", [1_000, 2_048])
def test_both_packages_on_whole_sets(count, weights, tmp_path, tmp_path_factory, monkeypatch):
    """FID to 1e-3 absolute on sets of as many pictures as features and of fewer, by each one's own way from the files
    to the number; ours in a process of its own, without the flags of the other tests."""
    theirs = pytest.importorskip("pytorch_fid.fid_score", reason=WHY.format("pytorch-fid"))
    fidelity = pytest.importorskip("torch_fidelity", reason=WHY.format("torch-fidelity"))
    import pytorch_fid.inception
    import torch

    pair = [str(folder) for folder in draw(count, tmp_path_factory)]
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def ours(resize):
        words = ["--pictures", pair[0], "--reference", pair[1], "--weights", weights]
        words += [
            f"--config.measure.resize={resize}",
            "--config.measure.splits=1",
            "--out",
            tmp_path / resize,
            "--json",
        ]
        words = [sys.executable, "-m", "dalle_jax.cli", "evaluate", *words]
        done = subprocess.run(list(map(str, words)), env=environ, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["scores"]["fid"]

    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights))
    want = {"pytorch": theirs.calculate_fid_given_paths(pair, 50, "cpu", 2_048, num_workers=0)}
    want["tf1"] = fidelity.calculate_metrics(
        input1=pair[0], input2=pair[1], feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), cuda=False, save_cpu_ram=True, cache=False, verbose=False,
        batch_size=50, fid=True,
    )["frechet_inception_distance"]  # fmt: skip
    got = {resize: ours(resize) for resize in want}
    print(f"{count} pictures: here {got}, pytorch-fid and torch-fidelity {want}")
    assert got == pytest.approx(want, rel=0, abs=SAME_FID)


def test_the_resize_of_clean_fid():
    import_torchvision(WHY.format("clean-fid"))
    package = pytest.importorskip("cleanfid.resize", reason=WHY.format("clean-fid"))
    for size in ((HEIGHT, WIDTH), (299, 299), (401, 330)):
        image = noise_image(*size)
        want = (package.build_resizer("clean")(image) - 128) / 128  # as its InceptionV3W scales
        np.testing.assert_array_equal(preprocess.clean(image), want)


def pair(count: int):
    return relu_features(1, count, 64), relu_features(2, count, 64, shift=0.1)


def theirs(one, other) -> dict[str, float]:
    """FID by both packages; KID by torch-fidelity in single precision, of one subset, which is the whole set."""
    torch = import_torchvision(WHY.format("pytorch-fid torch-fidelity"))
    pytest.importorskip("torch_fidelity", reason=WHY.format("torch-fidelity"))
    pytest.importorskip("pytorch_fid", reason=WHY.format("pytorch-fid"))
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    tensors = [torch.from_numpy(features) for features in (one, other)]
    parts = [part for x in (one, other) for part in (x.astype(float).mean(0), np.cov(x.astype(float), rowvar=False))]
    fid = fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)
    kid = kid_features_to_metric(*tensors, kid_subsets=1, kid_subset_size=len(one), verbose=False)
    return {
        "fid": float(calculate_frechet_distance(*parts)),
        "fid of torch-fidelity": fid["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
    }


@pytest.mark.parametrize("count", [300, 50])
def test_both_packages_agree_on_the_same_vectors(count):
    """Also of fewer vectors than features, whose covariance is singular."""
    one, other = pair(count)
    want, got = theirs(one, other), distances.fid(*mean_and_covariance(one), *mean_and_covariance(other))
    assert got == pytest.approx(want["fid"], abs=1e-5)
    assert got == pytest.approx(want["fid of torch-fidelity"], abs=1e-4)  # its mean is of float32
    assert distances.kid(one, other, subsets=1, subset_size=count)[0] == pytest.approx(want["kid"], abs=1e-5)


def test_the_scores_of_torch_fidelity_on_the_same_vectors():
    torch = import_torchvision(WHY.format("torch-fidelity"))
    pytest.importorskip("torch_fidelity", reason=WHY.format("torch-fidelity"))
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, other = relu_features(1, 400, 64), relu_features(2, 300, 64, shift=0.1)  # sets of two sizes
    tensors = [torch.from_numpy(x) for x in (one, other)]
    for splits in (1, 7):  # 7 parts of 400 are not equal
        score = isc_features_to_metric(3 * tensors[0], splits=splits, shuffle=False)
        assert distances.inception_score(3 * one, splits=splits) == pytest.approx(
            (score["inception_score_mean"], score["inception_score_std"]), rel=1e-6, abs=1e-9
        )
    for neighbors in (1, 3, 5):
        prc = prc_features_to_metric(*tensors, prc_neighborhood=neighbors, verbose=False)
        want = prc["precision"], prc["recall"]
        assert distances.precision_recall(one, other, neighbors=neighbors) == pytest.approx(want, abs=1e-6)


if __name__ == "__main__":
    print(theirs(*pair(300)), theirs(*pair(50)))
