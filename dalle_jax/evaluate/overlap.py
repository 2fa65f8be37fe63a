"""Near duplicates between a reference set and training pictures, by a CLIP (Ramesh et al. 2021, section 3.1).

For each reference picture the nearest training picture by cosine; from a threshold on the two count as the same. The
paper sorted its pairs and chose the threshold by hand, so the closest pairs are also shown on a sheet. X: reference
pictures, Y: training pictures.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
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
class Nearest:
    """The nearest training picture of each reference picture.

    cosine_X: float32. rows: the training picture by the number of the reference picture. seen: how many training
    pictures were compared.
    """

    cosine_X: np.ndarray
    rows: dict[int, Row]
    seen: int


def nearest(reference: FeatureSet, training: Iterable[FeatureSet]) -> Nearest:
    """Compare the reference with one part of the training set after the other.

    reference, training: unit vectors by one CLIP.
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
    return Nearest(cosine_X, rows, seen)


def summary(reference: FeatureSet, found: Nearest, *, least: float) -> tuple[dict[str, Any], set[int]]:
    """The overlap as a report has it, the closest pairs first, and the places of duplicates in the reference."""
    order = [int(i) for i in np.argsort(-found.cosine_X, kind="stable")]
    same = [i for i in order if found.cosine_X[i] >= least]
    pairs = [
        {
            "reference": reference.rows[i].key,
            "training": found.rows[i].key,
            "cosine": round(float(found.cosine_X[i]), 6),
        }
        for i in order[:LISTED]
    ]
    about = {
        "training_pictures": found.seen,
        "least": least,
        "duplicates": len(same),
        "share": len(same) / len(reference),
        "closest": pairs,
    }
    return about, {reference.rows[i].index for i in same}


def save_sheet(path: pathlib.Path, reference: FeatureSet, found: Nearest, sources: tuple[Source, Source]) -> None:
    """The closest pairs side by side, for a person to choose the threshold. sources: reference and training."""
    images, captions = [], []
    for i in np.argsort(-found.cosine_X, kind="stable")[:SHOWN].tolist():
        pair = reference.rows[i], found.rows[i]
        for source, row in zip(sources, pair, strict=True):
            record = record_at(source, row.index)
            assert not isinstance(record, Dropped)  # it was decoded before
            thumbnail = Image.fromarray(decode_image(record.image))
            thumbnail.thumbnail((SIDE, SIDE))
            images.append(np.asarray(thumbnail))
        captions += [f"{found.cosine_X[i]:.4f} {pair[0].key}", pair[1].key]
    contact_sheet(images, captions, columns=8).save(path)
