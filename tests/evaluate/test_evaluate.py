"""From a folder of pictures to a report: preprocessing against Pillow and the formulas, the command, bad input."""

import json

import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle_jax import model_dir
from dalle_jax.cli import main
from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, features, moments, preprocess, self_check, statistics
from dalle_jax.evaluate.features import Extractor, Preparation
from tests.support import ROOT

SIDE = preprocess.SIDE
PHOTOS = ROOT / "../shared/data/photos"


def picture(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(40, 56), (299, 299), (400, 330)])
def test_every_resize_has_the_size_and_range_of_the_network(size):
    image = picture(*size)
    for name, resize in preprocess.RESIZES.items():
        x = resize(image)
        assert x.shape == (SIDE, SIDE, 3) and x.dtype == np.float32 and np.abs(x).max() <= 1, name
        plain = resize(np.full((*size, 3), 128, np.uint8))
        want = {"pytorch": np.float32(2 * 128 / 255 - 1), "dm-gan": dm_gan_scale(np.float32(128 / 255))}.get(name, 0)
        np.testing.assert_allclose(plain, np.broadcast_to(want, plain.shape), atol=1e-6)


def dm_gan_scale(image_unit):
    """As its code writes it, channel by channel."""
    scales = (
        (0.229 / 0.5, (0.485 - 0.5) / 0.5),
        (0.224 / 0.5, (0.456 - 0.5) / 0.5),
        (0.225 / 0.5, (0.406 - 0.5) / 0.5),
    )
    channels = np.moveaxis(np.broadcast_to(np.asarray(image_unit)[..., None], (*np.shape(image_unit), 3)), -1, 0)
    return np.stack([x * scale + shift for x, (scale, shift) in zip(channels, scales, strict=True)], -1)


def test_at_the_networks_size_nothing_is_resized():
    image = picture(SIDE, SIDE)
    np.testing.assert_allclose(preprocess.pytorch(image), image / 127.5 - 1, atol=1e-6)
    for name in ("tf1", "clean", "dm-gan-score"):
        np.testing.assert_array_equal(preprocess.RESIZES[name](image), (image.astype(np.float32) - 128) / 128)


@pytest.mark.parametrize("size", [(40, 56), (401, 330)])
def test_resizes_are_pillows_and_the_formulas(size):
    image = picture(*size)
    squeezed = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    for channel in range(3):
        want = dm_gan_scale(squeezed[..., channel] / 255)[..., channel]
        np.testing.assert_allclose(preprocess.dm_gan(image)[..., channel], want, atol=1e-6)
    np.testing.assert_array_equal(preprocess.dm_gan_score(image), (squeezed.astype(np.float32) - 128) / 128)
    one = Image.fromarray(image[..., 1]).convert("F").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(preprocess.clean(image)[..., 1], (np.asarray(one).clip(0, 255) - 128) / 128)
    for name, offset in (("pytorch", 0.5), ("tf1", 0.0)):
        x = preprocess.RESIZES[name](image)
        back = (x + 1) * 127.5 if name == "pytorch" else x * 128 + 128
        for row, column in ((0, 0), (3, 298), (298, 1), (150, 77), (298, 298)):
            assert back[row, column] == pytest.approx(bilinear(image, row, column, offset), abs=0.01), name


def bilinear(image: np.ndarray, row: int, column: int, offset: float) -> np.ndarray:
    """One output pixel by the definition, in float64; offset: where in a pixel its value lies.

    The originals keep positions in float32: off by up to 2e-5 of a pixel, times 255.
    """
    ways = []
    for place, length in ((row, image.shape[0]), (column, image.shape[1])):
        position = max((place + offset) * length / SIDE - offset, 0)
        first = int(position)
        ways.append(((first, 1 - position + first), (min(first + 1, length - 1), position - first)))
    return sum(image[y, x] * (a * b) for y, a in ways[0] for x, b in ways[1])


def test_pytorch_resizes_the_same():
    torch = pytest.importorskip("torch", reason="the comparison takes PyTorch: pip install 'dalle-jax[convert]'")
    for size in ((40, 56), (401, 330)):
        image = picture(*size)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        want = 2 * torch.nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        np.testing.assert_allclose(preprocess.pytorch(image), want[0].permute(1, 2, 0).numpy(), atol=2e-5)


def test_blur_and_crop_stay_uint8():
    image = picture()
    want = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
    np.testing.assert_array_equal(preprocess.blurred(image, 2), want)
    np.testing.assert_array_equal(preprocess.blurred(image, 0), image)
    np.testing.assert_array_equal(preprocess.middle_square(image), image[:, 8:48])
    both = Preparation(resize="tf1", crop="centre", blur=2.0)(image)
    np.testing.assert_array_equal(both, preprocess.tf1(preprocess.blurred(image[:, 8:48], 2)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Model directory of a narrow random network."""
    params = jax.device_get(self_check.random_network()._params)
    folder = tmp_path_factory.mktemp("weights")
    model_dir.save(folder, {"name": "inception", "model": {"narrow": 16}}, params)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 12 pictures of mixed sizes; the second has an unreadable one more."""
    made = []
    for index in range(2):
        folder = tmp_path_factory.mktemp("pictures")
        for number in range(12):
            coarse = picture(5, 5 + number % 3, seed=100 * index + number).repeat(8, 0).repeat(8, 1)
            Image.fromarray(coarse).save(folder / f"{number:02d}.png")
        made.append(folder)
    (made[1] / "99.png").write_bytes(b"no picture")
    return made


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 1)


def run(*words) -> int:
    return main.main(["evaluate", *map(str, words)])


def test_the_command(weights, folders, tmp_path, capsys):
    out, stored = tmp_path / "out", tmp_path / "reference.npz"
    common = ("--weights", weights, "--splits", 2, "--out", out, "--json")
    assert run("--pictures", folders[0], "--reference", folders[1], *common, "--save-statistics", stored) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["pictures"]["count"] == report["reference"]["count"] == 12
    assert report["reference"]["dropped"] == {"not an image": 1}
    assert report["pictures"]["sizes"] == {"40x40": 4, "48x40": 4, "56x40": 4}
    assert (
        report["weights"] == Extractor.load(weights).digest and report["evaluation"]["measure"]["resize"] == "pytorch"
    )
    assert any("fewer than 128 features" in note for note in report["notes"])
    assert "reference pictures left out: 1 x not an image" in report["notes"]
    assert "reference pictures of 3 different sizes, each squeezed to a square" in report["notes"]
    scores = report["scores"]
    assert scores["fid"] > 0 and scores["kid_subset_size"] == 12 and 0 <= scores["precision"] <= 1

    assert run("--pictures", folders[0], "--reference", stored, *common) == 0  # stored statistics give the same
    again = json.loads(capsys.readouterr().out)["scores"]
    assert again["fid"] == scores["fid"] and again["inception_score"] == scores["inception_score"]
    assert run("--pictures", folders[1], "--reference", folders[1], *common[:-1]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 unreadable" in said and "FID" in said
    assert abs(json.loads((out / "report.json").read_text())["scores"]["fid"]) < 1e-5
    assert run("--pictures", folders[0], "--reference", stored, *common, "--resize", "clean") == 2
    assert "expected resize clean" in capsys.readouterr().err
    assert run("--pictures", folders[0], "--reference", stored, *common, "--crop", "centre") == 2
    assert "expected crop centre" in capsys.readouterr().err


def test_features_do_not_depend_on_the_batch(weights, folders):
    from dalle_jax.data.sources import open_source

    source = open_source(f"folder:{folders[1]}", captions_required=False)
    one, other = (Extractor.load(weights, batch=size).of_source(source, prepare=Preparation()) for size in (1, 2))
    assert one.keys == other.keys and len(one.keys) == 12 and one.features_NF.shape == (12, 128)
    np.testing.assert_allclose(one.features_NF, other.features_NF, atol=1e-5)
    np.testing.assert_allclose(one.logits_NV, other.logits_NV, atol=1e-5)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the shared photos are not here: {PHOTOS}")
def test_real_photos_of_many_sizes_from_every_kind_of_source(weights, tmp_path, capsys):
    """The same files in shards and as MS-COCO has them are the same set, at no distance; other photos are not."""
    held = {
        split: f"coco:{PHOTOS}/folder/annotations/captions_{split}.json,{PHOTOS}/folder/images"
        for split in ("train", "val")
    }
    common = ("--weights", weights, "--splits", 1, "--json", "--out", tmp_path)

    def report(pictures, reference):
        assert run("--pictures", pictures, "--reference", reference, *common) == 0
        return json.loads(capsys.readouterr().out)

    same = report(f"wds:{PHOTOS}/wds/train/*.tar", held["train"])
    assert same["pictures"]["count"] == same["reference"]["count"] == 56 and len(same["pictures"]["sizes"]) > 30
    assert same["pictures"]["sizes"] == same["reference"]["sizes"]
    assert same["pictures"]["sha256"] == same["reference"]["sha256"]
    assert abs(same["scores"]["fid"]) < 1e-4 and same["scores"]["precision"] == same["scores"]["recall"] == 1
    assert any("different sizes, each squeezed" in note for note in same["notes"])
    other = report(held["val"], PHOTOS / "bad_folder")
    assert other["pictures"]["count"] == 9 and sum(other["reference"]["dropped"].values()) >= 3
    assert other["scores"]["fid"] > 100 * abs(same["scores"]["fid"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reference", "X", "--weights", "X"), "no --pictures"),
        (("--pictures", "PICTURES", "--reference", "PICTURES", "--weights", "none.pth"), "none.pth does not exist"),
        (("--pictures", "PICTURES", "--reference", "PICTURES", "--weights", "PICTURES"), "config.json"),
        (("--pictures", "PICTURES", "--reference", "none.npz", "--weights", "WEIGHTS"), "none.npz"),
        (("--pictures", "nowhere", "--reference", "PICTURES", "--weights", "WEIGHTS"), "expected a source"),
        (("--pictures", "BAD", "--reference", "PICTURES", "--weights", "WEIGHTS"), "1 x not an image"),
        (("--pictures", "PICTURES", "--reference", "PICTURES", "--weights", "WEIGHTS", "--count", 99), "a count of 99"),
        (("--pictures", "BROKEN", "--reference", "BROKEN", "--weights", "WEIGHTS", "--count", 13), "got 12"),
        (("--pictures", "PICTURES", "--reference", "PICTURES", "--weights", "WEIGHTS", "--blur", -1), "blur"),
        (("--pictures", "PICTURES", "--reference", "PICTURES", "--weights", "WEIGHTS", "--side", 9), "side needs crop"),
        (("--pictures", "PICTURES", "--reference", "a.npz", "--weights", "WEIGHTS", "--blur", 0, 1), "one radius"),
        (("nowhere",), "expected --config FILE.py:PROTOCOL with nowhere"),
        (("--config", "configs/evaluate.py:demo", "--seed", 1), "--config.measure.seed=... instead of --seed"),
        (("--config", "configs/evaluate.py:demo", "--config.clip=X"), "config.json"),
        (("--config", "configs/evaluate.py:demo"), "expected a CLIP for features = 'clip'"),
        (("--config", "configs/evaluate.py:pytorch"), "expected weights of Inception v3"),
        (("--config", "configs/evaluate.py:pytorch", "--config.draw.count=-1"), "count must be a whole number"),
        (
            ("--config", "configs/evaluate.py:coco", "--config.weights=WEIGHTS"),
            "expected the network 'torchvision' for",
        ),
        (("--config", "configs/evaluate.py:pytorch", "--config.weights=WEIGHTS"), "expected a source of captions"),
        (("--from", "none.json"), "expected a report"),
        (("--config", "configs/dvae.py:demo"), "expected a protocol such as"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, weights, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x" * 300)
    places = {"PICTURES": folders[0], "BROKEN": folders[1], "WEIGHTS": weights, "BAD": tmp_path / "bad"}
    words = [places.get(word, str(word).replace("=WEIGHTS", f"={weights}")) for word in words]
    assert run(*words, "--json") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1] and not (tmp_path / "evaluation" / "report.json").exists()


def test_weights_that_make_nan_are_refused(weights, folders):
    extractor = Extractor.load(weights)
    extractor._params = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), extractor._params)
    from dalle_jax.data.sources import open_source

    found = extractor.of_source(open_source(f"folder:{folders[0]}", captions_required=False), prepare=Preparation())
    with pytest.raises(UserError, match="finite features"):
        moments.of(found.features_NF)


@pytest.mark.slow
def test_self_check_passes_and_finds_what_it_should(monkeypatch, capsys):
    monkeypatch.setattr(self_check, "PICTURES", 24)
    assert run("--self-check") == 0
    said = capsys.readouterr().out
    assert said.count("pass") == 7 and "FAIL" not in said
    fid = distances.fid
    monkeypatch.setattr(distances, "fid", lambda *statistics: 3.0 - fid(*statistics))
    assert run("--self-check", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and [check["ok"] for check in found["checks"]].count(False) >= 5


def test_statistics_of_a_source_are_pytorch_fids_format(tmp_path):
    one = np.random.default_rng(0).random((20, 4))
    statistics.save(tmp_path / "a.npz", statistics.Statistics(*moments.of(one)))
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["mu"], one.mean(0))
        np.testing.assert_allclose(file["sigma"], np.cov(one, rowvar=False))
