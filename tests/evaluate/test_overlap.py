"""The nearest training picture of each reference picture: against all cosines at once, and of a million vectors."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.data.record import Dropped, Record
from dalle_jax.data.share import Share
from dalle_jax.evaluate import features, overlap
from dalle_jax.evaluate.feature_cache import ImageSet
from dalle_jax.evaluate.features import ClipExtractor, FeatureSet, Row
from dalle_jax.evaluate.workers import Worker
from dalle_jax.models import build
from dalle_jax.models.clip import encode_images
from dalle_jax.preflight import flops, roofline
from dalle_jax.preflight.hardware import CHIPS
from dalle_jax.sample.rerank import Reranker
from dalle_jax.train.settings import load_settings


@dataclasses.dataclass
class Numbered:
    """Pictures of one pixel, each with its number; every 17th cannot be read."""

    count: int
    name: str = "numbered"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index % 17 == 16:
            return Dropped(str(index), "no image")
        return Record(str(index), np.full((1, 1, 3), index % 256, np.uint8), ())


def unit(x_XE):
    return x_XE / np.linalg.norm(x_XE, axis=1, keepdims=True)


class Generated:
    """Random unit vectors instead of a CLIP's, the same for the same rows, and reference vectors among them."""

    network, digest, batch = "generated", "0", 1

    def __init__(self, width=8, planted=()):
        self.width, self.planted, self.seen = width, dict(planted), 0

    def of_source(self, source, *, preprocess, rows, advance):
        kept = [row for row in rows if row % 17 != 16]
        vectors_YE = np.random.default_rng(rows[0]).standard_normal((len(kept), self.width), np.float32)
        for place, row in enumerate(kept):
            if row in self.planted:
                vectors_YE[place] = self.planted[row]
        self.seen += len(rows)
        advance(len(rows))
        return FeatureSet(unit(vectors_YE), np.zeros((len(kept), 0)), [made_row(row) for row in kept], {})


def made_row(index):
    return Row(str(index), index, "", "", (1, 1))


def reference_set(vectors_XE):
    return FeatureSet(vectors_XE, np.zeros((len(vectors_XE), 0)), [made_row(i) for i in range(len(vectors_XE))], {})


def test_the_nearest_are_those_of_all_cosines_at_once(tmp_path, monkeypatch):
    """In parts and blocks that do not come out even, made once, again where a picture has changed, in any order."""
    monkeypatch.setattr(overlap, "PART", 33)
    monkeypatch.setattr(overlap, "BLOCK", 2)  # 16 on eight devices
    monkeypatch.setattr(overlap, "CHECKED", 5)
    clip, source = Generated(), Numbered(100)
    reference = reference_set(unit(np.random.default_rng(0).standard_normal((7, 8), np.float32)))
    training = ImageSet.choose("training", source, crop="none")

    def search():
        return overlap.search(clip, reference, training, folder=tmp_path, worker=Worker())

    paths = search()
    found = [
        clip.of_source(source, preprocess=None, rows=range(i, min(i + 33, 100)), advance=int) for i in range(0, 100, 33)
    ]
    cosine_XY = reference.features_XF @ np.concatenate([part.features_XF for part in found]).T
    kept = [row.index for part in found for row in part.rows]
    pairs, seen = overlap.closest(paths, reference, source)
    assert seen == len(kept) == 95 and len(paths) == 4
    assert {pair.reference.index: pair.training for pair in pairs} == {
        i: kept[best] for i, best in enumerate(cosine_XY.argmax(1))
    }
    np.testing.assert_allclose([pair.cosine for pair in pairs], np.sort(cosine_XY.max(1))[::-1], rtol=1e-6)
    for index in (0, 1):  # two workers share the parts
        shared = tmp_path / "shared"
        shared.mkdir(exist_ok=True)
        theirs = overlap.search(clip, reference, training, folder=shared, worker=Worker(Share(index, 2)))
    assert overlap.closest(theirs, reference, source) == (pairs, seen)
    clip.seen = 0
    assert search() == paths and clip.seen == 0
    paths[1].write_bytes(paths[1].read_bytes()[:-40])
    assert search() == paths and clip.seen == 33


def test_clip_works_on_all_devices(model):
    clip = Reranker.load(model / "clip")
    extractor, size = ClipExtractor(clip), clip.image_size
    images_uint8 = np.random.default_rng(0).integers(0, 256, (11, size, size, 3), np.uint8)
    vectors_XE, _ = extractor(images_uint8)
    assert extractor.batch == features.BATCH * jax.device_count()
    np.testing.assert_allclose(vectors_XE, encode_images(clip.model, clip.params, images_uint8), atol=1e-5)


def test_the_name_of_all_rows_costs_nothing():
    """250 million of them: no list is made, neither of rows nor of their names."""
    begun = time.process_time()
    training = ImageSet.choose("training", Numbered(250_000_000), crop="none")
    assert len(training.digest("x")) == 16 and training.digest("x") != training.digest("y")
    assert time.process_time() - begun < 0.5


COUNT, REFERENCE, WIDTH = 1_000_000, 1_000, 512
FP32 = 67e12  # operations a second of an H100 without its tensor cores (NVIDIA's data sheet)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_a_million_vectors(tmp_path):
    """Planted near duplicates are found; docs/evaluation.md has the figures that this prints."""
    rng = np.random.default_rng(1)
    reference_XE = unit(rng.standard_normal((REFERENCE, WIDTH), np.float32))
    rows = rng.choice(COUNT // 17, REFERENCE, replace=False) * 17
    noisy_XE = reference_XE + 0.005 * rng.standard_normal(reference_XE.shape, np.float32)
    clip = Generated(WIDTH, zip(rows.tolist(), noisy_XE, strict=True))
    training, reference = ImageSet.choose("training", Numbered(COUNT), crop="none"), reference_set(reference_XE)
    times = []
    compare = overlap.nearest

    def timed(*arrays):
        begun = time.perf_counter()
        found = compare(*arrays)
        times.append(time.perf_counter() - begun)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "nearest", timed)
        paths = overlap.search(clip, reference, training, folder=tmp_path, worker=Worker())
    pairs, seen = overlap.closest(paths, reference, training.source)
    assert seen == COUNT - COUNT // 17
    assert [pair.training for pair in sorted(pairs, key=lambda pair: pair.reference.index)] == rows.tolist()
    assert min(pair.cosine for pair in pairs) > 0.98
    size = sum(path.stat().st_size for path in paths)
    print(
        f"\n{COUNT:,} vectors of {WIDTH} against {REFERENCE:,}: {sum(times):.0f} s of products, {size:,} bytes of files"
    )
    counted(pictures=250_000_000, reference=40_504)


def counted(*, pictures, reference):
    """Prints what a search costs by counting: bytes of its files, operations of CLIP and of the products."""
    settings = load_settings("configs/clip.py:b32")
    model, size = build("clip", settings.model), settings.model.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    each = flops.traced(lambda params, x: encode_images(model, params, x), model.abstract, image)
    encoding, products = each * pictures, 2 * settings.model.embed * reference * pictures
    parts = -(-pictures // overlap.PART)
    chip = CHIPS["gpu"]["h100"].peak_flops
    hours = [
        work / peak / roofline.COMPUTE_SHARE / 3_600 for work, peak in ((encoding, chip["bf16"]), (products, FP32))
    ]
    print(
        f"{pictures:,} pictures against {reference:,}: {parts:,} files of {12 * reference:,} bytes, "
        f"{12 * reference * parts / 1e9:.1f} GB; CLIP b32 {each / 1e9:.1f} GFLOP a picture, {encoding:.3g} in all, "
        f"products {products:.3g}; on one H100 {hours[0]:.2f} and {hours[1]:.2f} hours"
    )
