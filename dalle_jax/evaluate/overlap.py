"""Near duplicates between a reference set and training pictures, by a CLIP (Ramesh et al. 2021, section 3.1).

For each reference picture the nearest training picture by cosine; from a threshold on the two count as the same. The
paper sorted its pairs and chose the threshold by hand, so the closest pairs are also shown on a sheet.

Dimensions: N reference pictures, M training pictures, E embedding.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from dalle_jax.data.decode import decode_image
from dalle_jax.data.record import Source
from dalle_jax.evaluate.features import Found
from dalle_jax.pictures.sheet import contact_sheet

LISTED = 200  # closest pairs in a report
SHOWN = 24  # on the sheet
SHEET = "overlap.png"
SIDE = 128  # pixels of a picture on the sheet


@dataclasses.dataclass(frozen=True)
class Nearest:
    """For each reference picture the nearest training picture. cosine_N: float32; row_N: int64 place in the training
    source; keys: of the training pictures; seen: how many training pictures were compared."""

    cosine_N: np.ndarray
    row_N: np.ndarray
    keys: list[str]
    seen: int


def nearest(reference: Found, training: Iterable[Found]) -> Nearest:
    """Goes through the parts of a training set once, and holds one of them at a time.

    reference, training: unit vectors by one CLIP.
    """
    count = len(reference)
    cosine_N, row_N, keys, seen = np.full(count, -np.inf, np.float32), np.full(count, -1), [""] * count, 0
    for part in training:
        if not len(part):
            continue
        cosine_NM = reference.features_NF @ part.features_NF.T
        best_N = cosine_NM.argmax(1)
        value_N = cosine_NM[np.arange(count), best_N]
        for i in np.flatnonzero(value_N > cosine_N):
            cosine_N[i], row_N[i], keys[i] = value_N[i], part.rows[best_N[i]], part.keys[best_N[i]]
        seen += len(part)
    return Nearest(cosine_N, row_N, keys, seen)


def report(reference: Found, found: Nearest, *, least: float) -> tuple[dict[str, Any], set[int]]:
    """What is told of the overlap, the closest pairs first, and the reference's rows that are duplicates."""
    order = np.argsort(-found.cosine_N, kind="stable")
    same = [int(i) for i in order if found.cosine_N[i] >= least]
    pairs = [
        {"reference": reference.keys[i], "training": found.keys[i], "cosine": round(float(found.cosine_N[i]), 6)}
        for i in order[:LISTED]
    ]
    about = {
        "training_pictures": found.seen,
        "least": least,
        "duplicates": len(same),
        "share": len(same) / len(reference),
        "closest": pairs,
    }
    return about, {reference.rows[i] for i in same}


def save_sheet(path: pathlib.Path, reference: Found, found: Nearest, sources: tuple[Source, Source]) -> None:
    """The closest pairs side by side, for a person to choose the threshold. sources: reference and training."""
    pictures, captions = [], []
    for i in np.argsort(-found.cosine_N, kind="stable")[:SHOWN]:
        for source, row in zip(sources, (reference.rows[i], int(found.row_N[i])), strict=True):
            small = Image.fromarray(decode_image(source[row].image))
            small.thumbnail((SIDE, SIDE))
            pictures.append(np.asarray(small))
        captions += [f"{found.cosine_N[i]:.4f} {reference.keys[i]}", found.keys[i]]
    contact_sheet(pictures, captions, columns=8).save(path)
