"""Near duplicates between a reference set and training pictures, by a CLIP (Ramesh et al. 2021, section 3.1).

For each reference picture the nearest training picture by cosine; from a threshold on the two count as the same. The
paper sorted its pairs and chose the threshold by hand, so the closest pairs are also shown on a sheet. X: reference
pictures, Y: training pictures.
"""

import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from PIL import Image

from dalle_jax import files, sharding
from dalle_jax.data.decode import decode_image
from dalle_jax.data.record import Dropped, Source
from dalle_jax.errors import UserError
from dalle_jax.evaluate.distances import check_features
from dalle_jax.evaluate.feature_cache import ImageSet, hashes
from dalle_jax.evaluate.features import ClipExtractor, FeatureSet, Row, record_at
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.evaluate.workers import Worker
from dalle_jax.mesh import local_mesh
from dalle_jax.pictures.sheet import contact_sheet

PART = 65_536  # training pictures that a file is about
BLOCK = 2_048  # of them that a device compares at a time: 0.33 GB of cosines with 40,504 reference pictures
CHECKED = 1_024  # of so many training pictures one is looked at before a file is used again
LISTED = 200  # closest pairs in a report
SHOWN = 24  # on the sheet
SHEET = "overlap.png"
SIDE = 128  # pixels of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference picture and the place of the training picture nearest to it. cosine: float32."""

    cosine: np.floating
    reference: Row
    training: int


def search(
    clip: ClipExtractor, reference: FeatureSet, training: ImageSet, *, folder: pathlib.Path, worker: Worker
) -> list[pathlib.Path]:
    """Files with the nearest pictures of each part of the training set; this worker's exist on return.

    reference: by the same CLIP. A file has 12 bytes a reference picture; no vector of a training picture is kept. One
    that exists is used again if a sample of its pictures are still the same.

    Raises:
      UserError: vectors that are not finite.
      OSError: the folder cannot be written.
    """
    source, preprocess = training.source, Preprocess(crop=training.crop)
    name = training.digest("nearest", reference.digest, clip.digest, clip.batch)
    pieces = [training.rows[start : start + PART] for start in range(0, len(training.rows), PART)]
    paths = [folder / f"{name}-{number:05d}.npz" for number in range(len(pieces))]
    placed_XE = jax.device_put(reference.features_XF, sharding.replicated(local_mesh()))

    def is_done(number: int) -> bool:
        worker.beat("overlap")
        try:
            with np.load(paths[number]) as file:
                return file["hashes"].tolist() == hashes(source, pieces[number][::CHECKED])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False

    def make(number: int, bar: tqdm.tqdm) -> None:
        def advance(count: int) -> None:
            worker.beat("overlap")
            bar.update(count)

        found = clip.of_source(source, preprocess=preprocess, rows=pieces[number], advance=advance)
        cosine_X, place_X = nearest(placed_XE, check_features(found.features_XF))
        row_X = np.asarray([row.index for row in found.rows] or [-1])[place_X]
        out = io.BytesIO()
        np.savez(out, cosine=cosine_X, row=row_X, seen=len(found), hashes=hashes(source, pieces[number][::CHECKED]))
        files.write(paths[number], out.getvalue())

    worker.make_parts(f"{training.name} by {clip.network}", list(map(len, pieces)), is_done=is_done, make=make)
    return paths


def nearest(reference_XE: Any, training_YE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine float32 [X] of the nearest of unit vectors, and its place int64 [X]: on all devices of this process.

    Of equal ones the first. Without any the cosine is minus infinity.
    """
    mesh = local_mesh()
    size, place = BLOCK * sharding.batch_ways(mesh), sharding.batch_sharding(mesh)
    cosine_X, place_X = np.full(len(reference_XE), -np.inf, np.float32), np.zeros(len(reference_XE), np.int64)
    reference_XE = jax.device_put(reference_XE, sharding.replicated(mesh))
    for start in range(0, len(training_YE), size):
        block_BE = training_YE[start : start + size]
        filled_BE = jax.device_put(sharding.fill_rows(block_BE, size), place)
        value_X, best_X = map(np.asarray, _nearest(reference_XE, filled_BE, len(block_BE)))
        closer_X = value_X > cosine_X
        cosine_X[closer_X], place_X[closer_X] = value_X[closer_X], start + best_X[closer_X]
    return cosine_X, place_X


@jax.jit
def _nearest(reference_XE, block_BE, count):
    """`nearest` of the first `count` vectors of a block; in float32, whatever a device multiplies in by default."""
    cosine_XB = jnp.matmul(reference_XE, block_BE.T, precision="highest")
    cosine_XB = jnp.where(jnp.arange(len(block_BE))[None] < count, cosine_XB, -jnp.inf)
    return cosine_XB.max(1), cosine_XB.argmax(1)


def closest(paths: Sequence[pathlib.Path], reference: FeatureSet, training: Source) -> tuple[list[Pair], int]:
    """A pair for each reference picture, the closest first, and how many training pictures were compared.

    Raises:
      UserError: there are none.
    """
    cosine_X, row_X, seen = np.full(len(reference), -np.inf, np.float32), np.zeros(len(reference), np.int64), 0
    for path in paths:
        with np.load(path) as file:
            closer_X = file["cosine"] > cosine_X
            cosine_X[closer_X], row_X[closer_X] = file["cosine"][closer_X], file["row"][closer_X]
            seen += int(file["seen"])
    if not seen:
        raise UserError(f"expected pictures in {training.name}, got none that can be read: see `dalle-jax data`")
    order = np.argsort(-cosine_X, kind="stable")
    return [Pair(cosine_X[i], reference.rows[i], int(row_X[i])) for i in order], seen


def summary(
    pairs: Sequence[Pair], training: Source, *, seen: int, min_cosine: float
) -> tuple[dict[str, Any], set[int]]:
    """The overlap as a report has it, and the places of duplicates in the reference."""
    same = [pair for pair in pairs if pair.cosine >= min_cosine]
    listed = [
        {
            "reference": pair.reference.key,
            "training": record_at(training, pair.training).key,
            "cosine": round(float(pair.cosine), 6),
        }
        for pair in pairs[:LISTED]
    ]
    counts = {
        "training_pictures": seen,
        "min_cosine": min_cosine,
        "duplicates": len(same),
        "share": len(same) / len(pairs),
    }
    return {**counts, "closest": listed}, {pair.reference.index for pair in same}


def save_sheet(path: pathlib.Path, pairs: Sequence[Pair], sources: tuple[Source, Source]) -> None:
    """The closest pairs side by side, for a person to choose the threshold. sources: reference and training."""
    images, captions = [], []
    for pair in pairs[:SHOWN]:
        rows, notes = (pair.reference.index, pair.training), (f"{pair.cosine:.4f} ", "")
        for source, index, note in zip(sources, rows, notes, strict=True):
            record = record_at(source, index)
            assert not isinstance(record, Dropped)  # it was decoded before
            thumbnail = Image.fromarray(decode_image(record.image))
            thumbnail.thumbnail((SIDE, SIDE))
            images.append(np.asarray(thumbnail))
            captions.append(note + record.key)
    with files.replacing(path) as aside:
        contact_sheet(images, captions, columns=8).save(aside, format="PNG")
