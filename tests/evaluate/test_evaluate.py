"""From a folder of pictures to a report: preprocessing against Pillow and the formulas, the command, bad input."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle_jax.data.record import Source
from dalle_jax.data.sources import open_source
from dalle_jax.data.transforms import clip_crop, middle_square
from dalle_jax.evaluate import distances, features, preprocess
from dalle_jax.evaluate.distances import mean_and_covariance
from dalle_jax.evaluate.features import Extractor
from dalle_jax.evaluate.preprocess import Preprocess
from tests.support import ROOT
from tests.support.evaluation import noise_image, run
from tests.support.inception_weights import import_torchvision

SIDE = preprocess.SIZE
PHOTOS = ROOT / "../shared/data/photos"


@pytest.mark.parametrize("size", [(40, 56), (299, 299), (400, 330)])
def test_every_resize_has_the_size_and_range_of_the_network(size):
    image = noise_image(*size)
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


@pytest.mark.parametrize("size", [(40, 56), (SIDE, SIDE), (401, 330)])
def test_resizes_are_pillows_and_the_formulas(size):
    image = noise_image(*size)
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
        image = noise_image(*size)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        want = 2 * torch.nn.functional.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
        np.testing.assert_allclose(preprocess.pytorch(image), want[0].permute(1, 2, 0).numpy(), atol=2e-5)


def test_blur_and_crop_stay_uint8():
    image = noise_image()
    want = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
    np.testing.assert_array_equal(preprocess.blurred(image, 2), want)
    np.testing.assert_array_equal(preprocess.blurred(image, 0), image)
    np.testing.assert_array_equal(middle_square(image), image[:, 8:48])
    both = Preprocess(resize="tf1", crop="center", blur=2.0).for_inception(image)
    np.testing.assert_array_equal(both, preprocess.tf1(preprocess.blurred(image[:, 8:48], 2)))


def test_clips_crop_has_the_roundings_of_torchvision():
    """As its `Resize(size)` and `CenterCrop(size)` have them: the long side is cut to a whole number, half of what is
    left over is rounded to an even one."""
    for height, width, size in [(h, w, s) for h in range(20, 200, 23) for w in range(20, 200, 31) for s in (16, 33)]:
        short, long = min(height, width), max(height, width)
        long_size = int(size * long / short)
        tall, wide = (size, long_size) if height <= width else (long_size, size)
        top, left = (int(round((length - size) / 2.0)) for length in (tall, wide))
        image = noise_image(height, width)
        resized = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(clip_crop(image, size), resized[top : top + size, left : left + size])


@pytest.mark.parametrize("shape", [(40, 40), (48, 85), (97, 40), (30, 41)])
def test_torchvision_prepares_the_same_for_clip(shape):
    import_torchvision("the comparison takes torchvision: pip install torchvision")
    from torchvision import transforms

    image, size = noise_image(*shape), 32
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(size, interpolation=bicubic), transforms.CenterCrop(size)])
    want = np.asarray(theirs(Image.fromarray(image)))
    np.testing.assert_array_equal(Preprocess().for_clip(image, size), want)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 12 pictures of mixed sizes; the second has an unreadable one more."""
    made = []
    for index in range(2):
        folder = tmp_path_factory.mktemp("pictures")
        for number in range(12):
            coarse = noise_image(5, 5 + number % 3, seed=100 * index + number).repeat(8, 0).repeat(8, 1)
            Image.fromarray(coarse).save(folder / f"{number:02d}.png")
        made.append(folder)
    (made[1] / "99.png").write_bytes(b"no picture")
    return made


def test_the_command(weights, folders, tmp_path, capsys):
    out, stored = tmp_path / "out", tmp_path / "reference.npz"
    common = ("--weights", weights, "--config.measure.splits=2", "--out", out, "--json")
    assert run("--pictures", folders[0], "--reference", folders[1], *common, "--save-statistics", stored) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["pictures"]["count"] == report["reference"]["count"] == 12
    assert report["reference"]["dropped"] == {"not an image": 1}
    assert report["pictures"]["sizes"] == {"40x40": 4, "48x40": 4, "56x40": 4}
    assert report["weights"] == Extractor.load(weights).digest and report["resize"] == "pytorch"
    assert any("fewer than 128 features" in note for note in report["notes"])
    assert "reference pictures left out: 1 x not an image" in report["notes"]
    assert "reference pictures of 3 different sizes, each squeezed to a square" in report["notes"]
    scores = report["scores"]
    assert scores["fid"] > 0 and scores["kid_subset_size"] == 12 and 0 <= scores["precision"] <= 1

    assert run("--pictures", folders[0], "--reference", stored, *common) == 0  # stored statistics give the same
    again = json.loads(capsys.readouterr().out)["scores"]
    assert again["fid"] == scores["fid"] and again["inception_score"] == scores["inception_score"]
    assert run("--pictures", folders[1], "--reference", folders[1], *common[:-1]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "1 unreadable" in printed and "FID" in printed
    assert abs(json.loads((out / "report.json").read_text())["scores"]["fid"]) < 1e-5
    assert run("--pictures", folders[0], "--reference", stored, *common, "--config.measure.resize=clean") == 2
    assert "expected resize clean" in capsys.readouterr().err
    assert run("--pictures", folders[0], "--reference", stored, *common, "--config.measure.crop=center") == 2
    assert "expected crop center" in capsys.readouterr().err


def test_features_do_not_depend_on_the_batch(weights, folders, monkeypatch):
    source = open_source(f"folder:{folders[1]}", captions_required=False)
    found = []
    for size in (1, 2):
        monkeypatch.setattr(features, "BATCH", size)
        found.append(Extractor.load(weights).of_source(source, preprocess=Preprocess()))
    one, other = found
    assert one.rows == other.rows and len(one.rows) == 12 and one.features_XF.shape == (12, 128)
    np.testing.assert_allclose(one.features_XF, other.features_XF, atol=1e-5)
    np.testing.assert_allclose(one.logits_XV, other.logits_XV, atol=1e-5)


def test_names_need_not_be_text(weights, folders, tmp_path, capfdbinary):
    place, out = (tmp_path / os.fsdecode(name) for name in (b"pictures\xff", b"out\xff"))
    shutil.copytree(folders[0], place)
    (place / "00.png").rename(place / os.fsdecode(b"\xfe.png"))
    words = ("--reference", place, "--weights", weights, "--config.measure.splits=1", "--out", out)
    assert run("--pictures", place, *words, "--json") == 0
    assert json.loads(capfdbinary.readouterr().out) == json.loads((out / "report.json").read_text())
    assert run("--pictures", place, *words) == 0
    assert b"/out\xff/report.json\n" in capfdbinary.readouterr().out
    assert b"pictures\xff" in (out / "report.md").read_bytes()


def test_outputs_are_tried_before_anything_is_read(weights, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dalle_jax.evaluate.run.open_inputs", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "file").write_text("")
    given = ("--pictures", folders[0], "--reference", folders[1], "--weights", weights)
    for more, message in {
        ("--out", tmp_path / "file"): "expected a folder to write to",
        ("--out", tmp_path / "out", "--save-statistics", tmp_path / "none" / "a.npz"): "expected a place to write to",
        ("--out", tmp_path / "out", "--save-statistics", tmp_path / "a.txt"): "ending in .npz",
    }.items():
        assert run(*given, *more) == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the shared photos are not here: {PHOTOS}")
def test_real_photos_of_many_sizes_from_every_kind_of_source(weights, tmp_path, capsys):
    """The same files in shards and as MS-COCO has them are the same set, at no distance; other photos are not."""
    held = {
        split: f"coco:{PHOTOS}/folder/annotations/captions_{split}.json,{PHOTOS}/folder/images"
        for split in ("train", "val")
    }
    common = ("--weights", weights, "--config.measure.splits=1", "--json", "--out", tmp_path)

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


GIVEN = ("--pictures", "PICTURES", "--reference", "PICTURES", "--weights", "WEIGHTS")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reference", "X", "--weights", "X"), "no --pictures"),
        ((*GIVEN, "--weights", "none.pth"), "none.pth does not exist"),
        ((*GIVEN, "--weights", "PICTURES"), "config.json"),
        ((*GIVEN, "--reference", "none.npz"), "none.npz"),
        ((*GIVEN, "--pictures", "nowhere"), "expected a source"),
        ((*GIVEN, "--pictures", "BAD"), "2 x not an image"),
        ((*GIVEN, "--pictures", "scenes:val@64", "--reference", "ONE"), "expected at least 2 pictures in folder:"),
        ((*GIVEN, "--config.count=99"), "a count of 99"),
        ((*GIVEN[2:], "--pictures", "BROKEN", "--config.count=13"), "got 12"),
        ((*GIVEN, "--config.measure.blur=(-1.0,)"), "blur"),
        ((*GIVEN, "--config.measure.side=9"), "with side = 9"),
        ((*GIVEN, "--reference", "a.npz", "--config.measure.blur=(0.0,1.0)"), "one radius"),
        (("nowhere",), "expected --config FILE.py:PROTOCOL with nowhere"),
        ((*GIVEN, "--seed", 1), "--seed is now --config.measure.seed: write that"),
        ((*GIVEN, "--reference-crop", "none"), "--reference-crop is now --config.measure.reference_crop: write that"),
        (("--pictures", "PICTURES", "--weights", "WEIGHTS"), "or --reference SOURCE"),
        (("--config", "configs/evaluate.py:demo", "--config.clip=X"), "config.json"),
        (("--config", "configs/evaluate.py:demo"), "expected a CLIP for features = 'clip'"),
        (("--config", "configs/evaluate.py:pytorch"), "expected weights of Inception v3"),
        (("--config", "configs/evaluate.py:pytorch", "--config.draw.count=-1"), "draw.count to be a whole"),
        (("--config", "configs/evaluate.py:coco", "--config.weights=WEIGHTS"), "expected the network 'torchvision'"),
        (("--config", "configs/evaluate.py:pytorch", "--config.weights=WEIGHTS"), "expected a source of captions"),
        (("--config", "none.json"), "expected a report"),
        (("--from", "none.json"), "--from is now --config: write that"),
        (("--config", "configs/dvae.py:demo"), "expected a protocol such as"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, weights, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("bad/a.jpg", "bad/b.jpg", "one/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 300)
    places = {
        "PICTURES": folders[0],
        "BROKEN": folders[1],
        "WEIGHTS": weights,
        "BAD": tmp_path / "bad",
        "ONE": tmp_path / "one",
    }
    words = [places.get(word, str(word).replace("=WEIGHTS", f"={weights}")) for word in words]
    assert run(*words, "--json") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1] and not (tmp_path / "evaluation" / "report.json").exists()


@dataclasses.dataclass(frozen=True)
class Noised:
    """A source disturbed by normal noise; the same picture always in the same way."""

    source: Source
    std: float
    name: str = "noised"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        record = self.source[index]
        noise = self.std * np.random.default_rng(index).standard_normal(record.image.shape)
        return dataclasses.replace(record, image=(record.image + noise).clip(0, 255).round().astype(np.uint8))


def test_from_pictures_to_a_distance_everything_behaves_as_it_must(weights):
    """Properties that hold for any network: a set is at no distance from itself in any order, its other half is nearer
    than what is blurred, and the distance rises with blur and with noise."""
    extractor, source, count = Extractor.load(weights), open_source("scenes:val@64"), 16

    def fid_of(rows=range(count), *, blur: float = 0.0, std: float = 0.0):
        found = extractor.of_source(Noised(source, std), preprocess=Preprocess(blur=blur), rows=rows)
        return distances.fid(*reference, *mean_and_covariance(found.features_XF))

    plain = extractor.of_source(source, preprocess=Preprocess(), rows=range(count)).features_XF
    reference = mean_and_covariance(plain)
    rounding = 1e-4 * np.trace(reference[1])  # square roots of what float64 leaves of a zero
    assert abs(distances.fid(*reference, *reference)) <= rounding
    assert abs(distances.fid(*reference, *mean_and_covariance(plain[::-1]))) <= rounding
    blurs = [fid_of(blur=radius) for radius in (1, 2, 8)]
    noises = [fid_of(std=std) for std in (8, 32, 128)]
    for values in (blurs, noises):
        assert rounding < values[0] < values[1] < values[2]
    assert rounding < fid_of(range(count, 2 * count)) < blurs[-1]
