"""`evaluate --reconstructions`: scores of every picture alone, of an identity, the table and the sheet, bad input."""

import collections
import json
import math
import os

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax import config, model_dir
from dalle_jax.data.sources import scenes
from dalle_jax.errors import UserError
from dalle_jax.evaluate import reconstruction_report, reconstructions
from dalle_jax.evaluate.reconstructions import Reconstructions
from dalle_jax.models import build, image_tokenizer, lpips
from dalle_jax.sample.image_tokenizer import ImageTokenizer
from tests.evaluate.test_fidelity import slow_ssim
from tests.support import tiny_model
from tests.support.evaluation import run
from tests.support.parameters import random_parameters

PICTURES, SIDE = 11, 16


VQ = {
    "image_size": SIDE, "vocab": 256, "code_dim": 4, "network": "patches", "width": 8, "multipliers": (1,), "blocks": 1,
    "patch": 4,
}  # fmt: skip


def write_tokenizer(folder, name, sizes):
    model_dir.save(folder, {"name": name, "model": sizes}, random_parameters(build(name, sizes)))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A dVAE with 12 codes and a VQ with 256, both with 4 x 4 image tokens for 16 pixels."""
    place = tmp_path_factory.mktemp("tokenizers")
    return [write_tokenizer(place / "a", "dvae", tiny_model.DVAE), write_tokenizer(place / "b", "vq", VQ)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of readable pictures of two sizes, one of them with a name that is no text, and two broken files."""
    place, source = tmp_path_factory.mktemp("data") / "pictures", scenes.open_scenes("val@40")
    place.mkdir()
    for i in range(PICTURES):
        image = np.pad(source[i].image, ((0, 0), (0, 8 * (i % 2)), (0, 0)), constant_values=255)
        Image.fromarray(image).save(place / (os.fsdecode(b"\xfe.png") if i == 4 else f"{i:02d}.png"))
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (place / "none.jpg").write_bytes(b"")
    return place


def crops(pictures, side):
    """The pictures as a tokenizer gets them: Pillow's Lanczos to the shorter side, then the middle."""
    for path in sorted(pictures.iterdir()):
        if path.name in ("broken.png", "none.jpg"):
            continue
        image = Image.open(path)
        wide = round(side * image.width / image.height)
        left = round((wide - side) / 2)
        yield np.asarray(image.resize((wide, side), Image.Resampling.LANCZOS))[:, left : left + side]


@pytest.fixture(scope="module")
def report(tokenizers, pictures, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    common = ("--data", pictures, "--weights", weights, "--out", out, "--json")
    assert run("--reconstructions", *tokenizers, *common) == 0
    return json.loads((out / "reconstructions.json").read_text()) | {"out": out}


def test_scores_are_those_of_every_picture_alone(report, tokenizers, pictures, weights, tmp_path, capsys):
    assert report["pictures"]["count"] == PICTURES and sum(report["pictures"]["dropped"].values()) == 2
    for folder, row in zip(tokenizers, report["tokenizers"], strict=True):
        found = model_dir.load(folder)
        errors, similar, codes, edges = [], [], collections.Counter(), []
        places = [tmp_path / folder.name / kind for kind in ("original", "again")]
        for place in places:
            place.mkdir(parents=True)
        encode, decode = (jax.jit(f, static_argnums=0) for f in (image_tokenizer.encode, image_tokenizer.decode))
        for number, image in enumerate(crops(pictures, SIDE)):
            tokens = encode(found.model, found.params, image[None])
            again = np.asarray(decode(found.model, found.params, tokens))[0]
            errors.append(np.mean((image.astype(float) - again) ** 2))
            similar.append(slow_ssim(image, again))
            codes.update(np.asarray(tokens).ravel().tolist())
            edges.append(slow_edge_error(image / 255, again / 255))
            for place, kept in zip(places, (image, again), strict=True):
                Image.fromarray(kept).save(place / f"{number:02d}.png")
        assert row["psnr"] == pytest.approx(np.mean([10 * math.log10(65025 / error) for error in errors]), rel=1e-6)
        assert row["psnr_pooled"] == pytest.approx(10 * math.log10(65025 / np.mean(errors)), rel=1e-6)
        assert row["ssim"] == pytest.approx(np.mean(similar), abs=1e-6)
        assert row["edge_error"] == pytest.approx(np.mean(edges), rel=1e-4)
        share = np.array(list(codes.values())) / codes.total()
        bits = -(share * np.log2(share)).sum()
        assert (row["codes_used"], row["vocab"]) == (len(codes), found.model.config.vocab)
        assert row["perplexity"] == pytest.approx(2**bits) and row["entropy_bits"] == pytest.approx(16 * bits)
        assert (row["tokens"], row["grid"], row["size"]) == (16, [4, 4], SIDE)
        assert row["bits"] == pytest.approx(16 * math.log2(found.model.config.vocab))
        assert row["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(found.params))
        common = ("--weights", weights, "--out", tmp_path / "out", "--json", "--config.measure.splits=1")
        capsys.readouterr()
        assert run("--pictures", places[1], "--reference", places[0], *common) == 0
        assert row["rfid"] == pytest.approx(json.loads(capsys.readouterr().out)["scores"]["fid"], rel=1e-5)


def slow_edge_error(x_HWC, y_HWC):
    """Mean over scales of the mean absolute difference of what neighbors differ by, down and across."""
    scales = []
    for side in (1, 2, 4):
        x, y = (
            np.array([[a[i : i + side, j : j + side].mean((0, 1)) for j in range(0, len(a), side)]
                      for i in range(0, len(a), side)])
            for a in (x_HWC, y_HWC)
        )  # fmt: skip
        edges = [[(a[1:] - a[:-1]).ravel(), (a[:, 1:] - a[:, :-1]).ravel()] for a in (x, y)]
        scales.append(np.abs(np.concatenate(edges[0]) - np.concatenate(edges[1])).mean())
    return np.mean(scales)


def test_one_table_and_one_sheet_for_all(report, tokenizers):
    table = (report["out"] / "reconstructions.md").read_text(errors="surrogateescape")
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["a", "b"] and "rFID" in header and "SSIM" in header
    assert f"{report['tokenizers'][0]['psnr']:.2f}" in rows[0]
    with Image.open(report["out"] / "reconstructions.png") as sheet:
        assert 7 * 128 < sheet.width < 9 * 150 and 3 * 128 < sheet.height < 3 * 200
    notes = " ".join(report["notes"])
    assert "rFID is much too high" in notes and "edge error in place of LPIPS" in notes
    assert "2 pictures cannot be read: " in notes and "1 x zero bytes" in notes


def test_pieces_change_nothing(report, tokenizers, pictures, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reconstructions, "PART", 5)
    common = ("--data", f"folder:{pictures}", "--weights", weights, "--out", tmp_path, "--json")
    assert run("--reconstructions", tokenizers[1], *common) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["pictures"]["sha256"] == report["pictures"]["sha256"]
    (one,), (_, other) = again["tokenizers"], report["tokenizers"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == (pytest.approx(other[name], rel=1e-5) if isinstance(value, float) else other[name]), name


@pytest.mark.parametrize(("change", "ratio"), [(0, None), (1, 48.1308)])
def test_an_identity_and_one_gray_apart_have_known_scores(
    change, ratio, tokenizers, pictures, tmp_path, monkeypatch, capsys
):
    """A tokenizer whose image tokens are the pixels, and one that flips their last bit: a squared error of 1."""
    monkeypatch.setattr(ImageTokenizer, "encode", lambda tokenizer, image: image)
    monkeypatch.setattr(ImageTokenizer, "decode", lambda tokenizer, tokens: tokens ^ np.uint8(change))
    words = ("--reconstructions", tokenizers[1], "--data", pictures, "--out", tmp_path)
    assert run(*words) == 0
    printed, noted = capsys.readouterr()
    (row,) = json.loads((tmp_path / "reconstructions.json").read_text())["tokenizers"]
    found = collections.Counter(np.concatenate([image.ravel() for image in crops(pictures, SIDE)]).tolist())
    assert row["codes_used"] == len(found) and printed.count("\n") == 1
    if ratio is None:
        assert row["psnr"] is row["psnr_pooled"] is None and row["exact"] == PICTURES
        assert row["ssim"] == pytest.approx(1, abs=1e-12) and row["edge_error"] == 0
        assert "PSNR mean inf" in printed and f"{PICTURES} pictures back exactly" in noted
    else:
        assert row["psnr"] == pytest.approx(ratio, abs=1e-4) == row["psnr_pooled"] and row["exact"] == 0
        assert 0.9 < row["ssim"] < 1 and "back exactly" not in noted


def test_one_exact_picture_leaves_the_mean_finite(tokenizers, pictures, tmp_path, monkeypatch, capsys):
    first = next(crops(pictures, SIDE))

    def decode(tokenizer, tokens):
        same = (tokens == first).all((1, 2, 3))[:, None, None, None]
        return np.where(same, tokens, tokens ^ np.uint8(1))

    monkeypatch.setattr(ImageTokenizer, "encode", lambda tokenizer, image: image)
    monkeypatch.setattr(ImageTokenizer, "decode", decode)
    assert run("--reconstructions", tokenizers[1], "--data", pictures, "--out", tmp_path, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["tokenizers"]
    assert (row["exact"], row["psnr"]) == (1, pytest.approx(48.1308, abs=1e-4))
    assert row["psnr_pooled"] == pytest.approx(48.1308 - 10 * math.log10((PICTURES - 1) / PICTURES), abs=1e-4)


def test_lpips_is_that_of_every_picture_alone(report, tokenizers, pictures, tmp_path, capsys):
    found = model_dir.load(write_lpips(tmp_path / "lpips"))
    small = write_tokenizer(tmp_path / "small", "vq", VQ | {"image_size": 8})
    words = ("--data", pictures, "--lpips", tmp_path / "lpips", "--out", tmp_path, "--json")
    assert run("--reconstructions", tokenizers[0], small, *words) == 0
    made = json.loads(capsys.readouterr().out)
    row, of_small = made["tokenizers"]
    tokenizer, distances = model_dir.load(tokenizers[0]), []
    encode, decode, distance = (
        jax.jit(function, static_argnums=0)
        for function in (image_tokenizer.encode, image_tokenizer.decode, lpips.distance)
    )
    for image in crops(pictures, SIDE):
        again = decode(tokenizer.model, tokenizer.params, encode(tokenizer.model, tokenizer.params, image[None]))
        pair = (np.asarray(x, np.float32) / 255 for x in (image[None], again))
        distances.append(float(distance(found.model, found.params, *pair)[0]))
    assert row["lpips"] == pytest.approx(np.mean(distances), rel=1e-4) and np.std(distances) > 0
    assert made["lpips"] == found.digest and "edge_error" not in row and row["psnr"] == report["tokenizers"][0]["psnr"]
    assert "lpips" not in of_small and any("no LPIPS of 8 pixels" in note for note in made["notes"])
    write_lpips(tmp_path / "lpips", bad=True)
    assert run("--reconstructions", tokenizers[0], *words) == 2
    assert "expected finite distances by LPIPS" in capsys.readouterr().err


def write_lpips(folder, *, bad=False):
    """A sixteenth of the published channels, all weights random."""
    sizes = {"narrow": 16}
    params = random_parameters(build("lpips", sizes))
    if bad:
        params["conv1_1"]["bias"][0] = np.nan
    model_dir.save(folder, {"name": "lpips", "model": sizes}, params)
    return folder


def test_every_tokenizer_has_its_size_or_all_have_one(tmp_path, capsys):
    small, large = (write_tokenizer(tmp_path / str(side), "vq", VQ | {"image_size": side}) for side in (8, 32))
    words = ("--data", "scenes:val@24", "--config.count=3", "--out", tmp_path, "--json")
    assert run("--reconstructions", small, large, *words) == 0
    made = json.loads(capsys.readouterr().out)
    assert [row["size"] for row in made["tokenizers"]] == [8, 32] and made["pictures"]["count"] == 3
    assert ["ssim" in row for row in made["tokenizers"]] == [False, True] and "rfid" not in made["tokenizers"][0]
    notes = " ".join(made["notes"])
    assert "no SSIM of 8 pixels" in notes and "no rFID" in notes and "pictures of 8, 32 pixels" in notes
    assert "3 of 3 pictures were smaller than 32 pixels" in notes and "smaller than 8 pixels" not in notes
    assert run("--reconstructions", small, *words, "--config.size=24") == 0
    made = json.loads(capsys.readouterr().out)
    assert [(row["size"], row["grid"], row["tokens"]) for row in made["tokenizers"]] == [(24, [6, 6], 36)]
    notes = " ".join(made["notes"])
    assert "enlarged" not in notes and "scores compare at one size" not in notes


TWO = ("--reconstructions", "A", "B", "--data", "PICTURES")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TWO[:3], "give --data SOURCE"),
        (("--data", "PICTURES"), "expected --data only with --reconstructions DIR"),
        (("--reconstructions", "A", "A", *TWO[3:]), "expected different tokenizers"),
        (("--reconstructions", "WEIGHTS", *TWO[3:]), "expected a dvae or vq"),
        (("--reconstructions", "nowhere", *TWO[3:]), "nowhere without a readable config.json"),
        ((*TWO, "--pictures", "PICTURES"), "expected --reconstructions without --pictures"),
        ((*TWO, "--num-processes", "2"), "expected --reconstructions without --num-processes"),
        ((*TWO, "--config.size=10"), "a multiple of 4, the stride of"),
        ((*TWO, "--config.size=0"), "expected size to be a whole number of at least 1"),
        ((*TWO, "--config.count=99"), "a count of 99"),
        ((*TWO, "--config.count=13"), "got 11, as the rest cannot be read"),
        ((*TWO, "--config.sise=16"), "nearest valid one is 'size'"),
        ((*TWO, "--config", "configs/evaluate.py:sets"), "expected configs/evaluate.py:reconstructions"),
        (("--config", "configs/evaluate.py:reconstructions", "--pictures", "A"), "expected a protocol such as"),
        ((*TWO, "--weights", "none.pth"), "none.pth does not exist"),
        ((*TWO, "--lpips", "A"), "expected a lpips"),
        ((*TWO[:3], "--data", "BAD"), "2 x not an image"),
        ((*TWO[:3], "--data", "tokens:nowhere"), "expected a source of pictures"),
    ],
)
def test_bad_input_is_one_clear_line(words, message, tokenizers, pictures, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "bad" / name).write_bytes(b"x" * 300)
    places = {"A": tokenizers[0], "B": tokenizers[1], "PICTURES": pictures, "WEIGHTS": weights, "BAD": tmp_path / "bad"}
    assert run(*(places.get(word, word) for word in words), "--json") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]
    assert not (tmp_path / "evaluation" / reconstruction_report.REPORT).exists()


def test_settings_are_checked_and_a_config_has_them():
    values = config.load("configs/evaluate.py:reconstructions").to_dict()
    assert values.pop("name") == "reconstructions" and Reconstructions(**values) == Reconstructions()
    for wrong in ({"count": 1}, {"count": 10**11}, {"size": 5_000}, {"size": 1.5}, {"seed": -1}, {"resize": "x"}):
        with pytest.raises(UserError, match=r"^expected .*, got "):
            Reconstructions(**wrong)
    with pytest.raises(UserError, match="expected data to be a text"):
        Reconstructions(data=3)
