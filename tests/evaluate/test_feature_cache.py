"""What an evaluation keeps on disk while it works: parts of the features, shards that one process alone writes."""

import shutil

import numpy as np
import pytest

from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import feature_cache
from dalle_jax.evaluate.drawing import collecting
from dalle_jax.evaluate.feature_cache import FeatureCache, ImageSet
from dalle_jax.evaluate.features import FeatureSet, Row, hash_of
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.evaluate.workers import Worker
from tests.support.evaluation import IMAGES


class Counting:
    """Makes features of zeros and remembers which rows."""

    network, digest, batch = "counting", "0", 1

    def __init__(self):
        self.rows = []

    def of_source(self, source, *, preprocess, rows, advance):
        self.rows += list(rows)
        advance(len(rows))
        made = [Row(f"{row}", int(row), "", hash_of(source[row].image), (1, 1)) for row in rows]
        zeros = np.zeros((len(rows), 3), np.float32)
        return FeatureSet(zeros, zeros, made, {})


def test_features_that_are_there_are_not_made_again_unless_the_pictures_changed(coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "PART", 5)
    place = tmp_path / "coco"
    shutil.copytree(coco, place)
    pictures = ImageSet.choose("set", open_source(f"coco:{place}"), crop="none")
    counting, cache = Counting(), FeatureCache(tmp_path / "features", Worker(show=True))

    def make():
        return cache.make(counting, pictures, Preprocess())

    parts = make()
    assert len(parts.paths) == 3 and counting.rows == list(range(IMAGES))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [f"set by counting: {n} of 12 pictures" for n in (5, 10, 12)]
    assert said[-1].endswith(" pictures/s, 00:00 left")
    assert make().paths == parts.paths and len(counting.rows) == IMAGES
    shutil.copy(
        place / "val2014" / "COCO_val2014_000000000007.jpg", place / "val2014" / "COCO_val2014_000000000014.jpg"
    )
    parts.paths[2].write_bytes(parts.paths[2].read_bytes()[:-40])
    assert make().paths == parts.paths and counting.rows[IMAGES:] == [5, 6, 7, 8, 9, 10, 11]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "set by counting: 10 of 12 pictures", "set by counting: 12 of 12 pictures",
    ]  # fmt: skip
    found = parts.load()
    assert [row.index for row in found.rows] == list(range(IMAGES)) and found.features_XF.shape == (IMAGES, 3)


def test_two_jobs_do_not_draw_into_one_shard(tmp_path):
    with collecting(tmp_path / "00000.tar") as folder, pytest.raises(UserError, match="another process"):
        with collecting(tmp_path / "00000.tar"):
            pytest.fail("both have it")
    with collecting(tmp_path / "00000.tar") as again:
        assert again == folder
