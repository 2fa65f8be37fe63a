"""Sources: what they hand out, random access, caching, pickling, threads, and one sentence for a wrong place."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from dalle_jax.cli.main import main
from dalle_jax.data.decode import decode_image
from dalle_jax.data.record import Record, Source
from dalle_jax.data.sources import cache, open_source
from dalle_jax.errors import UserError
from tests.support.broken_shards import encoded, pack, sample


@pytest.fixture
def two_shards(tmp_path):
    for shard in range(2):
        members = [
            m for i in range(6) for m in sample(f"{shard}{i}", jpg=encoded(10 * shard + i), txt=b"caption %d" % i)
        ]
        (tmp_path / f"{shard:06d}.tar").write_bytes(pack(members))
    return tmp_path


def everything(source):
    return [source[i] for i in range(len(source))]


def write(folder, **files):
    """name -> bytes; '__' is a slash and the last '_' a dot."""
    for name, data in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_shards_give_records_in_file_order(two_shards):
    source = open_source(f"wds:{two_shards}/{{000000..000001}}.tar")
    records = everything(source)
    assert isinstance(source, Source) and len(records) == 12
    assert records[8] == Record("000001.tar/12", encoded(12), ("caption 2",))
    assert source[-1] == records[-1]
    with pytest.raises(IndexError):
        source[12]
    assert everything(open_source(f"wds:{two_shards}")) == records == everything(open_source(f"wds:{two_shards}/*.tar"))


def test_text_comes_before_json_and_each_line_is_a_caption(tmp_path):
    fields = json.dumps({"caption": "in json"}).encode()
    (tmp_path / "0.tar").write_bytes(pack(sample("a", json=fields, txt=b"one\n\n two \r\nthree")))
    assert open_source(f"wds:{tmp_path}/0.tar")[0].captions == ("one", "two", "three")


def test_cache_folder_variables(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("DALLE_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg/dalle_jax"


def test_tfds_without_tensorflow(tmp_path):
    """A real dataset in the array_record format, prepared and read without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyCaptions(tfds.core.GeneratorBasedBuilder):
        """Captions nested as in coco_captions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="png"),
                "image/filename": tfds.features.Text(),
                "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                captions = [{"id": 0, "text": f"caption {i}"}, {"id": 1, "text": "가"}][: 0 if i == 3 else 2]
                picture = io.BytesIO(encoded(i, kind="PNG"))
                yield i, {"image": picture, "image/filename": f"{i}.png", "captions": captions, "label": i % 2}

    TinyCaptions(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = open_source(f"tfds:tiny_captions/train@{tmp_path}")
    records = {item.key.split()[-1]: item for item in everything(source)}
    assert records["2.png"].captions == ("caption 2", "가")
    assert np.array_equal(decode_image(records["2.png"].image), decode_image(encoded(2, kind="PNG")))
    assert records["3.png"].reason == "no caption" and len(records) == 4
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)
    assert len(open_source(f"tfds:tiny_captions/train[:50%]@{tmp_path}")) == 2
    with pytest.raises(UserError, match="array_record"):
        open_source(f"tfds:tiny_captions/nope@{tmp_path}")


def test_tfds_image_folder_labels_are_captions(tmp_path, monkeypatch):
    write(tmp_path, train__polar_bear__1_jpg=encoded(1), train__dog__2_jpg=encoded(2), val__dog__3_jpg=encoded(3))
    monkeypatch.setenv("HOME", str(tmp_path))
    records = everything(open_source("tfds:image_folder/train@~"))
    assert [(record.key, record.captions) for record in records] == [
        ("dog/2.jpg", ("dog",)), ("polar_bear/1.jpg", ("polar bear",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("photos", "expected a source such as"),
        ("zip:a.zip", "expected a source such as"),
        ("wds:", "expected a source such as"),
        ("wds:{}/nope.tar", "no file matches"),
        ("wds:{}/*.tar", "no file matches"),
        ("wds:{}", "without .tar files"),
        ("wds:{}/{{5..1}}.tar", "from low to high"),
        ("folder:{}/nope", "no folder"),
        ("folder:{}", "got none"),
        ("coco:{}/captions.json", "official download"),
        ("coco:{0}/captions.json,{0}", "check the path"),
        ("coco:{0}/list.json,{0}", "expected lists"),
        ("coco:{0}/urls.json,{0}", "got none among 1, the first of them .*coco_url"),
        ("coco:{0}/other.json,{0}", "such as '1'; the first annotation is .*'image_id': 2"),
        ("tfds:nope/train@{}", "nope"),
        ("tfds:nope", "expected tfds:NAME/SPLIT"),
        ("tfds:image_folder/train@{}", "no folder"),
        ("scenes:nope", "scenes:train"),
    ],
)
def test_a_wrong_place_is_one_sentence(spec, words, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1, 2]")
    urls, named = {"id": 1, "coco_url": "x"}, {"id": 1, "file_name": "a.jpg"}
    for name, image in (("urls", urls), ("other", named)):
        content = {"images": [image], "annotations": [{"image_id": 2, "caption": "a"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    spec = spec.format(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        open_source(spec)
    assert "\n" not in str(error.value)
    assert main(["data", spec]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_report_as_text_and_picture(two_shards, capsys):
    picture = two_shards / "examples.png"
    assert main(["data", f"wds:{two_shards}/*.tar", "--picture", str(picture), "--max-aspect-ratio", "2"]) == 0
    text = capsys.readouterr().out
    assert "good     12" in text and "48 .. 48" in text and "12, 1.00 a record, 2 .. 2" in text
    with Image.open(picture) as image:
        assert image.width > 1000  # five columns
    assert main(["data", f"wds:{two_shards}/*.tar", "--json", "--max-aspect-ratio", "1.4"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["good"], report["dropped"], report["picture"]) == (0, {"aspect ratio": 12}, None)
    places = ([option, f"{two_shards}/{place}"] for option in ("--picture", "--dropped") for place in ("nope/x", ""))
    for wrong in (*places, ["--limit", "-5"], ["--min-image-side", "-1"]):
        capsys.readouterr()
        assert main(["data", f"wds:{two_shards}/*.tar", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_report_of_a_part(two_shards, capsys):
    assert main(["data", f"wds:{two_shards}/*.tar", "--json", "--limit", "5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["source_records"], report["good"]) == (5, 12, 5)
    assert report["caption_length"]["max"] == 2 and report["caption_length_unit"] == "words"
    assert report["aspect_ratio"]["1.25 - 2"] == 5 and report["shorter_side"]["32 - 64"] == 5
