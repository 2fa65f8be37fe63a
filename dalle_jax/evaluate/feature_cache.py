"""Features of a set in parts on disk: an evaluation that was stopped goes on, and several processes share one.

A part is a file of PART rows, made by one process in batches that depend on nothing but the rows. So the features are
the same bits whatever number of processes made them and however often they were stopped.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures

import numpy as np
import tqdm

from dalle_jax import files
from dalle_jax.data.record import Dropped, Source
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate.distances import check_features
from dalle_jax.evaluate.features import Extractor, FeatureSet, Row, counted, hash_of, record_at
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.evaluate.workers import Worker

PART = 1_024  # rows; a minute or two of Inception on two cores


def open_images(spec: str) -> Source:
    """Pictures with or without captions. spec: a source, or the path of a folder.

    Raises:
      UserError: no such source.
    """
    return open_source(f"folder:{spec}" if pathlib.Path(spec).is_dir() else spec, captions_required=False)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Rows of a source. name: 'pictures', 'reference' or 'training', for people. crop: of `protocol.CROPS`.

    count: how many pictures were asked for, None for all.
    """

    name: str
    source: Source
    rows: Sequence[int] | np.ndarray
    crop: str
    count: int | None = None

    @classmethod
    def choose(cls, name: str, source: Source, *, crop: str, count: int | None = None, seed: int = 0) -> "ImageSet":
        """All rows, or `count` of them by the seed.

        Raises:
          UserError: the source has fewer pictures than `count`, or a set that is compared fewer than two.
        """
        rows = range(len(source))
        if len(rows) < 2 and name != "training":
            raise UserError(f"expected at least 2 pictures in {source.name}, got {len(rows)}: give more")
        if count is None:
            return cls(name, source, rows, crop)
        if count > len(rows):
            key = "reference_count" if name == "reference" else "count"
            raise UserError(
                f"expected 2 to {len(rows)} pictures of {source.name}, as it has, got a count of {count}: give more "
                f"pictures, or another number by --config.{key}=N"
            )
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
        return cls(name, source, chosen, crop, count)

    def digest(self, *made_of: object) -> str:
        """A name for what is made of these rows; of all rows at no cost, however many they are."""
        rows = (
            self.rows
            if isinstance(self.rows, range)
            else hashlib.sha256(np.asarray(self.rows, np.int64).tobytes()).hexdigest()
        )
        return hashlib.sha256(json.dumps([self.source.name, str(rows), *made_of]).encode()).hexdigest()[:16]

    def check(self, found: int, dropped: Mapping[str, int]) -> None:
        """Raises UserError if no picture could be read, or fewer than were asked for. dropped: reason -> count."""
        lost = counted(dropped)
        if not found:
            raise UserError(
                f"expected pictures in {self.source.name}, got none that can be read ({lost or 'it is empty'}): "
                "see `dalle-jax data`"
            )
        if found < (self.count or 0):
            raise UserError(
                f"expected {self.count} pictures of {self.source.name}, got {found}, as the rest cannot be read "
                f"({lost}): mend or remove those, see `dalle-jax data`"
            )


@dataclasses.dataclass(frozen=True)
class Parts:
    """Files with the features of a set, in its order; others may still be making some of them."""

    images: ImageSet
    paths: list[pathlib.Path]
    worker: Worker

    def load(self) -> FeatureSet:
        """All features, once every worker has made its parts.

        Raises:
          UserError: fewer pictures than were asked for, or none.
        """
        self.worker.wait(self.paths)
        found = FeatureSet.joined([load(path) for path in self.paths])
        self.images.check(len(found), found.dropped)
        return found


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Makes features of sets, in parts below `folder`."""

    folder: pathlib.Path
    worker: Worker

    def make(self, extractor: Extractor, images: ImageSet, preprocess: Preprocess) -> Parts:
        """The features of a set; this worker's parts exist on return.

        A part that exists is used again if the pictures are still the same.

        Raises:
          UserError: features that are not finite.
          OSError: the folder cannot be written.
        """
        source, worker = images.source, self.worker
        name = images.digest(extractor.network, extractor.digest, extractor.batch, preprocess.to_words())
        pieces = [images.rows[start : start + PART] for start in range(0, len(images.rows), PART)]
        paths = [self.folder / f"{name}-{number:05d}.npz" for number in range(len(pieces))]
        self.folder.mkdir(parents=True, exist_ok=True)

        def is_done(number: int) -> bool:
            worker.beat("features")
            return _is_current(paths[number], source)

        def make(number: int, bar: tqdm.tqdm) -> None:
            worker.beat("features")
            found = extractor.of_source(source, preprocess=preprocess, rows=pieces[number], advance=bar.update)
            check_features(found.features_XF)  # before hours go by
            files.write(paths[number], _packed(found))

        what = f"{images.name} by {extractor.network}" + (f", blur {preprocess.blur:g}" if preprocess.blur else "")
        worker.make_parts(what, [len(piece) for piece in pieces], is_done=is_done, make=make)
        return Parts(images, paths, worker)


def load(path: pathlib.Path) -> FeatureSet:
    """The features in the file of a part."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        rows = [
            Row(key, index, caption, sha256, (height, width))
            for key, index, caption, sha256, (height, width) in about["rows"]
        ]
        return FeatureSet(file["features"], file["logits"], rows, about["dropped"])


def _packed(found: FeatureSet) -> bytes:
    about = json.dumps({"rows": [dataclasses.astuple(row) for row in found.rows], "dropped": found.dropped})
    out = io.BytesIO()
    np.savez(out, features=found.features_XF, logits=found.logits_XV, about=about)
    return out.getvalue()


def _is_current(path: pathlib.Path, source: Source) -> bool:
    """True if a part exists and was made of the pictures that the source has now."""
    try:
        found = load(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return False

    return hashes(source, [row.index for row in found.rows]) == [row.hash for row in found.rows]


def hashes(source: Source, rows: Iterable[int]) -> list[str]:
    """`hash_of` the pictures that lie there now, '' for none."""

    def hash_now(index: int) -> str:
        record = record_at(source, index)
        return "" if isinstance(record, Dropped) else hash_of(record.image)

    with futures.ThreadPoolExecutor() as pool:
        return list(pool.map(hash_now, rows))
