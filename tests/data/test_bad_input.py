"""Bad input: no good record is lost, every bad one is counted under a name, nothing crashes or escapes."""

import collections
import json
import pathlib
import tracemalloc

import numpy as np
import pytest

from dalle_jax.cli.main import main
from dalle_jax.data import filters, pipeline, record
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.record import Dropped
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from tests.support import ROOT
from tests.support.broken_shards import CAPTION, CASES, encoded, expected_total, huge_png, pack, sample

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

SHARED = ROOT / "../shared/data/photos"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared broken files are not here: {SHARED}")

# How many samples of each shared shard are good, and why the others are dropped; its MANIFEST.json leaves some to the
# loader, decided here:
# a blank caption is dropped, a text file that is not UTF-8 is dropped though its json may be readable, the first sample
# of a key stays, and members that are not adjacent are not joined.
OUTCOMES = {
    "01_truncated_jpeg": (3, {"truncated image": 3}),
    "02_zero_byte": (3, {"zero bytes": 1, "empty caption": 1}),
    "03_missing_member": (4, {"no image": 1, "no caption": 1}),
    "04_empty_caption": (2, {"empty caption": 3}),
    "05_huge_caption": (6, {}),
    "06_languages": (15, {}),
    "07_not_utf8": (4, {"not utf-8": 7}),
    "08_tar_cut_in_member": (5, {"truncated tar": 1}),
    "09_tar_cut_in_header": (2, {"truncated tar": 1}),
    "10_tar_no_eof": (3, {}),
    "11_tar_bad_checksum": (4, {"bad tar header": 1}),
    "12_bomb": (2, {"decompression bomb": 4}),
    "13_duplicate_keys": (4, {"duplicate key": 3, "no caption": 1}),
    "14_not_images": (2, {"not an image": 5, "truncated image": 1}),
    "15_bad_json": (10, {}),
    "16_empty_archive": (0, {"empty shard": 1}),
    "17_zero_bytes": (0, {"empty shard": 1}),
    "18_gzip_named_tar": (3, {}),
    "19_garbage": (0, {"not a tar file": 1}),
    "20_odd_names": (8, {"link": 2}),
    "21_not_grouped": (0, {"members apart": 4}),
    "22_mixed": (16, {"truncated image": 2, "zero bytes": 2, "no caption": 2, "not an image": 2}),
}


@pytest.fixture
def all_broken(tmp_path):
    """The source of all broken shards."""
    for number, (data, _, _) in enumerate(CASES.values()):
        (tmp_path / f"{number:02d}.tar").write_bytes(data)
    return f"wds:{tmp_path}/*.tar"


def decoded(source):
    """Every item, one whose image cannot be decoded as dropped."""
    for index in range(len(source)):
        item = source[index]
        if not isinstance(item, Dropped):
            try:
                assert decode_image(item.image, max_pixels=10_000_000).shape[2] == 3
            except BadImage as bad:
                item = Dropped(item.key, bad.reason, bad.detail)
        assert item.key and (not isinstance(item, Dropped) or item.reason in record.REASONS)
        yield item


def outcome(source):
    """Keys of the good records without the shard's name, and reason -> count of the others."""
    items = list(decoded(source))
    dropped = collections.Counter(item.reason for item in items if isinstance(item, Dropped))
    return [item.key.partition(".tar/")[2] for item in items if not isinstance(item, Dropped)], dropped


@pytest.mark.parametrize("name", CASES)
def test_broken_shard(name, tmp_path):
    data, good, dropped = CASES[name]
    (tmp_path / "shard.tar").write_bytes(data)
    assert outcome(open_source(f"wds:{tmp_path}/shard.tar")) == (good, dropped)
    assert {path.name for path in tmp_path.iterdir()} == {"shard.tar", "cache"}, "nothing is unpacked beside the data"


def test_captions_stay_with_their_pictures(tmp_path):
    """Two samples under one key and two pictures under one name never exchange captions."""
    members = [
        ("a.jpg", encoded(1)), ("a.txt", b"first"), ("a.jpg", encoded(2)), ("a.txt", b"second"),
        ("b.jpg", encoded(3)), ("b.jpg", encoded(4)), ("b.txt", b"of the second b"),
    ]  # fmt: skip
    (tmp_path / "0.tar").write_bytes(pack(members))
    source = open_source(f"wds:{tmp_path}/0.tar")
    records = [source[i] for i in range(len(source)) if not isinstance(source[i], Dropped)]
    assert [(r.image, r.captions) for r in records] == [(encoded(1), ("first",))]


def test_pictures_without_captions_are_enough_for_a_dvae(tmp_path):
    (tmp_path / "0.tar").write_bytes(pack([("a.jpg", encoded()), *sample("b", txt=b"\xff"), ("c.txt", CAPTION)]))
    source = open_source(f"wds:{tmp_path}/0.tar", captions_required=False)
    assert [source[0].captions, source[1].captions, source[2].reason] == [(), (), "no image"]


def test_a_bomb_is_refused_before_it_is_decoded():
    tracemalloc.start()
    for size in ((100_000, 100_000), (12_000, 10_000)):
        with pytest.raises(BadImage, match="decompression bomb"):
            decode_image(huge_png(*size), max_pixels=100_000_000)
    with pytest.raises(BadImage, match="decompression bomb"):
        decode_image(encoded(size=(40, 40)), max_pixels=1599)
    assert decode_image(encoded(size=(40, 40)), max_pixels=1600).shape == (40, 40, 3)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_report_of_all_broken_shards(all_broken, tmp_path, capsys):
    """One JSON object on stdout: all the good records, all the reasons; exit status 0."""
    listed = tmp_path / "dropped.jsonl"
    words = ["data", all_broken, "--json", "--max-pixels", "10000000", "--dropped", str(listed)]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    good, dropped = expected_total()
    assert (report["good"], report["dropped"]) == (good, dropped)
    assert report["records"] == good + dropped.total()
    assert {reason: len(named) for reason, named in report["dropped_examples"].items()} == {
        reason: min(count, 3) for reason, count in dropped.items()
    }
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert collections.Counter(line["reason"] for line in lines) == dropped
    assert all(line["key"] for line in lines) and all(line in lines for line in _examples(report))


def _examples(report):
    return [
        {"key": named["key"], "reason": reason, "detail": named["detail"]}
        for reason, examples in report["dropped_examples"].items()
        for named in examples
    ]


def test_training_batches_survive_and_stop_at_the_share(all_broken):
    """The pipeline counts what the report counts, and stops with the table above the allowed share."""
    source, (good, dropped) = open_source(all_broken), expected_total()
    share = dropped.total() / (good + dropped.total())

    def batches(allowed):
        prepare = pipeline.Prepare(pipeline.DataConfig(image_size=16, max_pixels=10_000_000))
        reading = pipeline.Reading(threads=0, max_bad_share=allowed)
        return pipeline.Batches(source, prepare, batch_size=8, seed=0, shuffle=False, epochs=1, reading=reading)

    lenient = batches(share + 0.01)
    assert sum(len(batch["image"]) for batch in lenient) == good == lenient.good
    assert lenient.dropped == dropped
    with pytest.raises(UserError, match="duplicate key"):
        list(batches(share - 0.01))


@shared
@pytest.mark.parametrize("name", OUTCOMES)
def test_shared_broken_shard(name):
    manifest = {
        pathlib.Path(shard["shard"]).stem: shard["samples"]
        for shard in json.loads((SHARED / "bad/MANIFEST.json").read_text())["shards"]
    }
    good, dropped = outcome(open_source(f"wds:{SHARED}/bad/{name}.tar"))
    assert (len(good), dropped) == OUTCOMES[name]
    assert len(set(good)) == len(good)
    assert {entry["key"] for entry in manifest[name] if entry["status"].startswith("ok")} <= set(good)


@shared
def test_shared_odd_images():
    """Size and mean colors of 48 unusual but valid files, whole and by quadrant."""
    for entry in json.loads((SHARED / "odd/MANIFEST.json").read_text()):
        image = decode_image((SHARED / "odd" / entry["file"]).read_bytes())
        height, width = image.shape[:2]
        assert [width, height] == entry["expect_size"], entry["file"]
        wrong = np.abs(image.reshape(-1, 3).mean(0) - entry["expect_mean_rgb"]).max()
        assert wrong <= entry["tolerance"], entry["file"]
        if min(width, height) > 1:
            halves = [
                rows for half in np.array_split(image, [height // 2]) for rows in np.split(half, [width // 2], axis=1)
            ]
            means = np.array([half.mean() for half in halves])
            assert np.abs(means - entry["expect_quadrant_mean"]).max() <= entry["tolerance"], entry["file"]
    assert outcome(open_source(f"wds:{SHARED}/odd.tar"))[1] == {}
    assert outcome(open_source(f"folder:{SHARED}/odd"))[1] == {}


@shared
def test_shared_broken_folder():
    expected = json.loads((SHARED / "bad_folder/MANIFEST.json").read_text())
    source = open_source(f"folder:{SHARED}/bad_folder")
    items = {item.key.rpartition(".")[0]: item for item in decoded(source)}
    dropped = {key: item.reason for key, item in items.items() if isinstance(item, Dropped)}
    assert dropped == {
        "emptycaption": "empty caption", "html": "not an image", "latin1": "not utf-8", "nocaption": "no caption",
        "noimage": "no image", "truncated": "truncated image", "zero": "zero bytes",
    }  # fmt: skip
    assert dropped.keys() == {*expected["skip"], *expected["by_choice"]}
    assert items.keys() - dropped.keys() == set(expected["good"])
    assert list(items["multi"].captions) == expected["multi_captions"]


@shared
def test_shared_broken_coco_json():
    source = open_source(f"coco:{SHARED}/bad_folder/captions_broken.json,{SHARED}/folder/images")
    items = [source[i] for i in range(len(source))]
    good = {item.key: item.captions for item in items if not isinstance(item, Dropped)}
    assert {key: len(captions) for key, captions in good.items()} == {"palm.jpg": 2, "kodim03.jpg": 3, "coins.jpg": 2}
    reasons = collections.Counter(item.reason for item in items if isinstance(item, Dropped))
    assert reasons == {"no caption": 6, "no image": 2, "empty caption": 1, "duplicate key": 1}
    with pytest.raises(UserError, match="does not parse"):
        open_source(f"coco:{SHARED}/bad_folder/captions_cut.json,{SHARED}/folder/images")


def test_no_reason_has_two_meanings():
    assert not set(record.REASONS) & set(filters.REASONS)
