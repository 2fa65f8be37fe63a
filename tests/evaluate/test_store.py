"""What an evaluation keeps on disk while it works: parts of the features, shards that one process alone writes."""

import shutil

import numpy as np
import pytest

from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import picture_shards, store
from dalle_jax.evaluate.crew import Crew
from tests.evaluate.test_protocols import IMAGES, coco  # noqa: F401


def test_features_that_are_there_are_not_made_again_unless_the_pictures_changed(coco, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(store, "PART", 5)
    source, other = tmp_path / "coco", tmp_path / "features"
    shutil.copytree(coco, source)
    pictures = open_source(f"coco:{source}")

    class Counting:
        network, digest, batch, features = "counting", "0", 1, 3

        def __init__(self):
            self.rows = []

        def of_rows(self, source, *, prepare, rows, advance):
            self.rows += rows.tolist()
            made = {"keys": [str(r) for r in rows], "rows": rows.tolist(), "captions": [""] * len(rows)}
            hashes = [store.hash_of(source[row].image) for row in rows]
            zeros = np.zeros((len(rows), 3), np.float32)
            return store.Found(zeros, zeros, **made, hashes=hashes, dropped={}, sizes=[(1, 1)] * len(rows))

    counting, prepare = Counting(), store.Preparation()

    def make():
        return store.parts(
            counting, pictures, prepare=prepare, rows=np.arange(IMAGES), folder=other, crew=Crew(), tell="set"
        )

    files = make()
    assert len(files) == 3 and counting.rows == list(range(IMAGES))
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [f"set; {done} of 12 pictures" for done in (5, 10, 12)]
    assert said[-1].endswith(" a second, 0:00:00 left")
    assert make() == files and len(counting.rows) == IMAGES
    shutil.copy(
        source / "val2014" / "COCO_val2014_000000000007.jpg", source / "val2014" / "COCO_val2014_000000000014.jpg"
    )
    files[2].write_bytes(files[2].read_bytes()[:-40])
    assert make() == files and counting.rows[IMAGES:] == [5, 6, 7, 8, 9, 10, 11]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "set; 5 of 7 pictures", "set; 7 of 7 pictures",
    ]  # fmt: skip
    assert sum(len(store.load(file)) for file in files) == IMAGES


def test_two_jobs_do_not_draw_into_one_shard(tmp_path):
    shard = picture_shards.GrowingShard(tmp_path / "00000.tar")
    with pytest.raises(UserError, match="another process"):
        picture_shards.GrowingShard(tmp_path / "00000.tar")
    shard.close()
    picture_shards.GrowingShard(tmp_path / "00000.tar").close()
