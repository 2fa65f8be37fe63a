"""Features of a set in parts on disk: an evaluation that was stopped goes on, and several processes share one.

A part is a file of PART rows, made by one process in batches that depend on nothing but the rows. So the features, and
what is summed of them in their order, are the same bits whatever number of processes made them and however often they
were stopped.
"""

import hashlib
import io
import json
import pathlib
import zipfile
from concurrent import futures

import numpy as np

from dalle_jax import files
from dalle_jax.data.record import Dropped, Source
from dalle_jax.evaluate import moments
from dalle_jax.evaluate.crew import Crew
from dalle_jax.evaluate.features import LISTS, Extractor, Found, Preparation, hash_of
from dalle_jax.evaluate.progress import Clock, bar, say

PART = 1_024  # rows; a minute or two of Inception on two cores


def parts(
    extractor: Extractor,
    source: Source,
    *,
    prepare: Preparation,
    rows: np.ndarray,
    folder: pathlib.Path,
    crew: Crew,
    tell: str = "",
) -> list[pathlib.Path]:
    """Files with the features of these rows, in their order; this process's own are there on return.

    A part that is there already is taken if the pictures are still the same. tell: as in `Extractor.of_source`.

    Raises:
      UserError: features that are not finite.
      OSError: the folder cannot be written.
    """
    about = [source.name, rows.tolist(), extractor.network, extractor.digest, extractor.batch, prepare.about()]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    pieces = [rows[start : start + PART] for start in range(0, len(rows), PART)]
    paths = [folder / f"{name}-{number:05d}.npz" for number in range(len(pieces))]
    folder.mkdir(parents=True, exist_ok=True)
    own = crew.own(len(pieces))
    todo = sum(len(pieces[number]) for number in own)
    clock = Clock(todo)
    with bar(todo, tell) as shown:
        for number in own:
            crew.beat(tell or "features")
            if _still_true(paths[number], source):
                shown.update(len(pieces[number]))
                clock.skip(len(pieces[number]))
                continue
            found = extractor.of_rows(source, prepare=prepare, rows=pieces[number], advance=shown.update)
            moments.check_features(found.features_NF)  # before hours go by
            files.write(paths[number], _packed(found))
            clock.done(len(pieces[number]))
            if tell and len(pieces) > 1:
                say(f"{tell}; {clock}")
    return paths


def load(path: pathlib.Path) -> Found:
    """What is in a part."""
    with np.load(path, allow_pickle=False) as file:
        lists = json.loads(str(file["lists"]))
        sizes = [(height, width) for height, width in lists.pop("sizes")]
        return Found(features_NF=file["features"], logits_NV=file["logits"], **lists, sizes=sizes)


def _packed(found: Found) -> bytes:
    lists = {name: getattr(found, name) for name in (*LISTS, "dropped")}
    out = io.BytesIO()
    np.savez(out, features=found.features_NF, logits=found.logits_NV, lists=json.dumps(lists))
    return out.getvalue()


def _still_true(path: pathlib.Path, source: Source) -> bool:
    """Whether a part is there and was made of the pictures that the source has now."""
    try:
        found = load(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False

    def hash_now(row: int) -> str:
        record = source[row]
        return "" if isinstance(record, Dropped) else hash_of(record.image)

    with futures.ThreadPoolExecutor() as pool:
        return list(pool.map(hash_now, found.rows)) == found.hashes
