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
from dalle_jax.evaluate.features import FeatureSet, picture_at
from dalle_jax.pictures.sheet import contact_sheet

LISTED = 200  # closest pairs in a report
SHOWN = 24  # on the sheet
SHEET = "overlap.png"
SIDE = 128  # pixels of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each reference picture.

    cosine_X: float32. index_X: int64, its place in the training source. keys: its name. seen: how many training
    pictures were compared.
    """

    cosine_X: np.ndarray
    index_X: np.ndarray
    keys: list[str]
    seen: int


def nearest(reference: FeatureSet, training: Iterable[FeatureSet]) -> Nearest:
    """Compare the reference with one part of the training set after the other.

    reference, training: unit vectors by one CLIP.
    """
    count = len(reference)
    cosine_X, index_X, keys, seen = np.full(count, -np.inf, np.float32), np.full(count, -1), [""] * count, 0
    for part in training:
        if not len(part):
            continue
        cosine_XY = reference.features_XF @ part.features_XF.T
        best_X = cosine_XY.argmax(1)
        value_X = cosine_XY[np.arange(count), best_X]
        for i in np.flatnonzero(value_X > cosine_X):
            cosine_X[i], index_X[i], keys[i] = value_X[i], part.rows[best_X[i]].index, part.rows[best_X[i]].key
        seen += len(part)
    return Nearest(cosine_X, index_X, keys, seen)


def summary(reference: FeatureSet, found: Nearest, *, least: float) -> tuple[dict[str, Any], set[int]]:
    """The overlap as a report has it, the closest pairs first, and the places of duplicates in the reference."""
    order = np.argsort(-found.cosine_X, kind="stable")
    same = [int(i) for i in order if found.cosine_X[i] >= least]
    pairs = [
        {"reference": reference.rows[i].key, "training": found.keys[i], "cosine": round(float(found.cosine_X[i]), 6)}
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
    pictures, captions = [], []
    for i in np.argsort(-found.cosine_X, kind="stable")[:SHOWN]:
        for source, row in zip(sources, (reference.rows[i].index, int(found.index_X[i])), strict=True):
            record = picture_at(source, row)
            assert not isinstance(record, Dropped)  # it was decoded before
            thumbnail = Image.fromarray(decode_image(record.image))
            thumbnail.thumbnail((SIDE, SIDE))
            pictures.append(np.asarray(thumbnail))
        captions += [f"{found.cosine_X[i]:.4f} {reference.rows[i].key}", found.keys[i]]
    contact_sheet(pictures, captions, columns=8).save(path)
