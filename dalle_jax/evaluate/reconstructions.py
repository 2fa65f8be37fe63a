"""A comparison of image tokenizers: each encodes and decodes the pictures of a source, and is scored by what it keeps.

Originals are brought to the size of each tokenizer by `center_crop` first, so what that loses is no error of a
tokenizer. Pictures pass in pieces, whatever their number.
"""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from dalle_jax import files, sharding
from dalle_jax.data.decode import BadImage, decode_image
from dalle_jax.data.in_order import evenly_spread, in_order
from dalle_jax.data.record import Dropped, Source
from dalle_jax.data.transforms import center_crop
from dalle_jax.errors import UserError, check_choice, check_number, writing_to
from dalle_jax.evaluate import features, fidelity, reconstruction_report, report
from dalle_jax.evaluate.distances import Moments
from dalle_jax.evaluate.feature_cache import ImageSet, open_images
from dalle_jax.evaluate.features import Extractor, counted, hash_of, record_at
from dalle_jax.evaluate.preprocess import RESIZES, Preprocess
from dalle_jax.evaluate.protocol import MAX_PICTURES, MAX_SIDE, check_texts
from dalle_jax.evaluate.reconstruction_report import Shown
from dalle_jax.evaluate.reconstructor import Perceptual, Reconstructor
from dalle_jax.evaluate.workers import Worker
from dalle_jax.mesh import local_mesh
from dalle_jax.sample.request import MAX_SEEDS

PART = 1_024  # pictures between two lines of progress in a log
SHOWN = 8  # pictures on the sheet


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """The values that the scores of reconstructions depend on, beside the tokenizers.

    data: source of the pictures. count: so many of them by the seed, None for all. size: pixels per side that pictures
    are brought to, a multiple of every tokenizer's stride; None for the size that each was trained at. weights: path of
    Inception v3, None for no rFID. resize: to Inception's size, a function of `preprocess`. lpips: model directory of
    LPIPS, None for the edge error of `models.lpips` in its place.
    """

    data: str | None = None
    count: int | None = None
    size: int | None = None
    weights: str | None = None
    resize: str = "pytorch"
    lpips: str | None = None
    seed: int = 0

    def __post_init__(self):
        check_texts(self, "data", "weights", "lpips")
        check_choice("resize", self.resize, RESIZES)
        check_number("count", self.count, min=2, max=MAX_PICTURES, whole=True, optional=True)
        check_number("size", self.size, min=1, max=MAX_SIDE, whole=True, optional=True)
        check_number("seed", self.seed, min=0, max=MAX_SEEDS - 1, whole=True)


def reconstruct(
    settings: Reconstructions, tokenizers: Sequence[str], *, out: pathlib.Path, worker: Worker
) -> dict[str, Any]:
    """Writes OUT/reconstructions.json, .md and .png; returns the report.

    tokenizers: folders that `ImageTokenizer.load` takes. This process does all of it, on all of its devices.

    Raises:
      UserError: something given is wrong or too little, or the folder cannot be written.
    """
    start = time.monotonic()
    if len(set(tokenizers)) < len(tokenizers):
        raise UserError(f"expected different tokenizers, got {', '.join(tokenizers)}: name each once")
    if not settings.data:
        raise UserError("expected pictures to reconstruct, got none: give --data SOURCE")
    with writing_to(out):
        files.prepare(out)
    extractor = Extractor.load(settings.weights) if settings.weights else None
    length = None if extractor is None else extractor.features
    perceptual = Perceptual(settings.lpips)
    judged = [Reconstructor(folder, size=settings.size, features=length) for folder in tokenizers]
    source, seed = open_images(settings.data), settings.seed
    images = ImageSet.choose("pictures", source, crop="center", count=settings.count, seed=seed)
    seen = _Pass(images, judged, extractor, perceptual, resize=settings.resize)
    seen.run(worker)
    images.check(seen.pictures, seen.dropped)
    made = {
        "pictures": {
            "source": source.name,
            "count": seen.pictures,
            "dropped": dict(seen.dropped),
            "sha256": seen.digest.hexdigest(),
        },
        "tokenizers": [each.scores(seen.moments.get(each.size), perceptual=perceptual) for each in judged],
        "network": extractor and {"name": extractor.network, "digest": extractor.digest, "resize": settings.resize},
        "lpips": perceptual.digest,
        "notes": _notes(seen, judged, extractor, perceptual),
        "settings": dataclasses.asdict(settings),
        "versions": report.versions(),
        "seconds": round(time.monotonic() - start, 1),
    }
    with writing_to(out):
        reconstruction_report.write(out, made, seen.shown)
    return made


def _notes(
    seen: "_Pass", judged: Sequence[Reconstructor], extractor: Extractor | None, perceptual: Perceptual
) -> list[str]:
    """Sentences on what is left out or doubtful."""
    notes = []
    if extractor is None:
        notes.append("no rFID: give the weights of Inception v3 as --weights PATH")
    elif seen.pictures < extractor.features:
        notes.append(f"{seen.pictures} pictures are fewer than {extractor.features} features: rFID is much too high")
    if perceptual.digest is None:
        notes.append("the edge error in place of LPIPS: give a converted LPIPS as --lpips DIR")
    if seen.dropped:
        notes.append(f"{seen.dropped.total()} pictures cannot be read: {counted(seen.dropped)}")
    sizes = sorted({each.size for each in judged})
    if len(sizes) > 1:
        listed = ", ".join(map(str, sizes))
        notes.append(f"pictures of {listed} pixels: scores compare at one size only, which --config.size=N gives")
    for size in sizes:
        if enlarged := seen.enlarged[size]:
            notes.append(f"{enlarged} of {seen.pictures} pictures were smaller than {size} pixels and enlarged to that")
        if size < fidelity.WINDOW:
            notes.append(f"no SSIM of {size} pixels: its window has {fidelity.WINDOW}")
        if size < perceptual.min_size:
            notes.append(f"no LPIPS of {size} pixels: it takes {perceptual.min_size}")
    for each in judged:
        if each.exact:
            notes.append(f"{each.folder} gives {each.exact} pictures back exactly: the mean of PSNR leaves them out")
    return notes


@dataclasses.dataclass(frozen=True)
class _Read:
    """A picture of the source: its place there, sha256 and shape as it is stored, and its crop by size."""

    key: str
    index: int
    sha256: str
    shape: tuple[int, int]
    cropped: dict[int, np.ndarray]


class _Pass:
    """One pass of all pictures through all tokenizers.

    Attributes:
      pictures: that could be read. dropped: reason -> count of others. enlarged: size -> pictures that were smaller.
        digest: sha256 of the pictures in their order. moments: size -> of Inception's features of the originals. shown:
        columns of the sheet.
    """

    def __init__(
        self,
        images: ImageSet,
        judged: Sequence[Reconstructor],
        extractor: Extractor | None,
        perceptual: Perceptual,
        *,
        resize: str,
    ):
        self._images, self._judged, self._extractor, self._perceptual = images, judged, extractor, perceptual
        self._preprocess = Preprocess(resize=resize)
        self._sizes = sorted({each.size for each in judged})
        self._due = [images.rows[place] for place in evenly_spread(len(images.rows), SHOWN)]
        self.pictures, self.digest = 0, hashlib.sha256()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.enlarged: collections.Counter[int] = collections.Counter()
        self.moments = {} if extractor is None else {size: Moments(extractor.features) for size in self._sizes}
        self.shown: list[Shown] = []

    def run(self, worker: Worker) -> None:
        """All of it, with a bar."""
        source, rows = self._images.source, self._images.rows
        parts = [rows[start : start + PART] for start in range(0, len(rows), PART)]
        chunk = features.BATCH * sharding.batch_ways(local_mesh())

        def make(number: int, bar) -> None:
            outcomes = in_order(self._reader(source), map(int, parts[number]), threads=None, ahead=chunk)
            with futures.ThreadPoolExecutor() as pool:
                while found := list(itertools.islice(outcomes, chunk)):
                    worker.beat("reconstruct")
                    self._take(found, pool)
                    bar.update(len(found))

        worker.make_parts(f"{source.name} reconstructed", list(map(len, parts)), is_done=lambda _: False, make=make)

    def _reader(self, source: Source) -> Callable[[int], _Read | Dropped]:
        def read(index: int) -> _Read | Dropped:
            record = record_at(source, index)
            if isinstance(record, Dropped):
                return record
            try:
                image_uint8 = decode_image(record.image)
            except BadImage as bad:
                return Dropped(record.key, bad.reason, bad.detail)
            cropped = {size: center_crop(image_uint8, size) for size in self._sizes}
            return _Read(record.key, index, hash_of(record.image), image_uint8.shape[:2], cropped)

        return read

    def _take(self, outcomes: Sequence[_Read | Dropped], pool: futures.Executor) -> None:
        self.dropped.update(outcome.reason for outcome in outcomes if isinstance(outcome, Dropped))
        found = [outcome for outcome in outcomes if isinstance(outcome, _Read)]
        if not found:
            return
        self.pictures += len(found)
        self.digest.update("".join(read.sha256 for read in found).encode())
        self.enlarged.update(size for read in found for size in self._sizes if min(read.shape) < size)
        columns = self._columns(found)
        shown = [Shown(found[i].key, found[i].cropped[self._sizes[-1]]) for i in columns]
        image_BHWC = {size: np.stack([read.cropped[size] for read in found]) for size in self._sizes}
        for size, moments in self.moments.items():
            self._see(image_BHWC[size], moments, pool)
        for each in self._judged:
            again_BHWC = each(image_BHWC[each.size])
            ratios = each.compare(image_BHWC[each.size], again_BHWC, perceptual=self._perceptual, pool=pool)
            for i, column in zip(columns, shown, strict=True):
                column.reconstructions.append((again_BHWC[i], ratios[i]))
            if each.moments is not None:
                self._see(again_BHWC, each.moments, pool)
        self.shown += shown

    def _columns(self, found: Sequence[_Read]) -> list[int]:
        """Numbers of those that are shown: the first that can be read from each place that is due."""
        columns: list[int] = []
        for i, read in enumerate(found):
            number = len(self.shown) + len(columns)
            if number < len(self._due) and read.index >= self._due[number]:
                columns.append(i)
        return columns

    def _see(self, image_BHWC: np.ndarray, moments: Moments, pool: futures.Executor) -> None:
        assert self._extractor is not None
        x_BHWC = np.stack(list(pool.map(self._preprocess.for_inception, image_BHWC)))
        moments.add(self._extractor(x_BHWC)[0])
