"""Near duplicates between a reference set and training pictures, by a CLIP (Ramesh et al. 2021, section 3.1).

For each reference picture the nearest training picture by cosine; from a threshold on the two count as the same. The
paper sorted its pairs and chose the threshold by hand, so the closest pairs are also shown on a sheet. X: reference
pictures, Y: training pictures.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.data.decode import decode_image
from dalle_jax.data.record import Dropped, Source
from dalle_jax.evaluate.features import FeatureSet, Row, record_at
from dalle_jax.pictures.sheet import contact_sheet

LISTED = 200  # closest pairs in a report
SHOWN = 24  # on the sheet
SHEET = "overlap.png"
SIDE = 128  # pixels of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference picture and the training picture nearest to it. cosine: float32."""

    cosine: np.floating
    reference: Row
    training: Row


def nearest(reference: FeatureSet, training: Iterable[FeatureSet]) -> tuple[list[Pair], int]:
    """A pair for each reference picture, the closest first, and how many training pictures were compared.

    reference, training: unit vectors by one CLIP; the training set comes in parts.
    """
    cosine_X, rows, seen = np.full(len(reference), -np.inf, np.float32), {}, 0
    for part in training:
        if not len(part):
            continue
        cosine_XY = reference.features_XF @ part.features_XF.T
        best_X, value_X = cosine_XY.argmax(1), cosine_XY.max(1)
        for i in np.flatnonzero(value_X > cosine_X):
            cosine_X[i], rows[int(i)] = value_X[i], part.rows[best_X[i]]
        seen += len(part)
    order = np.argsort(-cosine_X, kind="stable").tolist()
    return [Pair(cosine_X[i], reference.rows[i], rows[i]) for i in order if i in rows], seen


def summary(pairs: Sequence[Pair], *, seen: int, least: float) -> tuple[dict[str, Any], set[int]]:
    """The overlap as a report has it, and the places of duplicates in the reference."""
    same = [pair for pair in pairs if pair.cosine >= least]
    closest = [
        {"reference": pair.reference.key, "training": pair.training.key, "cosine": round(float(pair.cosine), 6)}
        for pair in pairs[:LISTED]
    ]
    counts = {"training_pictures": seen, "least": least, "duplicates": len(same), "share": len(same) / len(pairs)}
    return {**counts, "closest": closest}, {pair.reference.index for pair in same}


def save_sheet(path: pathlib.Path, pairs: Sequence[Pair], sources: tuple[Source, Source]) -> None:
    """The closest pairs side by side, for a person to choose the threshold. sources: reference and training."""
    images, captions = [], []
    for pair in pairs[:SHOWN]:
        for source, row in zip(sources, (pair.reference, pair.training), strict=True):
            record = record_at(source, row.index)
            assert not isinstance(record, Dropped)  # it was decoded before
            thumbnail = Image.fromarray(decode_image(record.image))
            thumbnail.thumbnail((SIDE, SIDE))
            images.append(np.asarray(thumbnail))
        captions += [f"{pair.cosine:.4f} {pair.reference.key}", pair.training.key]
    contact_sheet(images, captions, columns=8).save(path)
