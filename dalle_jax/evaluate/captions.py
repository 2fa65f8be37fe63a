"""Which captions an evaluation draws: chosen once by the seed, written down, and taken from there ever after.

OUT/plan.json: what decides the pictures (checkpoint, source, how to draw), and each caption with its id. An id is
KEY#NUMBER: the record's key in the source and the number of the caption in the record.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import numpy as np

from dalle_jax import config as configs
from dalle_jax import files
from dalle_jax.data.record import Dropped, Source
from dalle_jax.errors import UserError
from dalle_jax.evaluate.crew import Crew
from dalle_jax.evaluate.features import counted
from dalle_jax.evaluate.protocol import Draw

PLAN = "plan.json"
READERS = 8  # that wait for the disk, mostly


@dataclasses.dataclass(frozen=True)
class Plan:
    """The captions of an evaluation in the order in which they are drawn.

    ids, captions: equally many. settings: what else decides the pictures. dropped: reason -> records of the source that
    gave no caption. records: of the source, dropped ones included.
    """

    ids: list[str]
    captions: list[str]
    settings: dict[str, Any]
    dropped: dict[str, int]
    records: int

    @property
    def digest(self) -> str:
        """sha256 of ids and captions."""
        return hashlib.sha256(json.dumps([self.ids, self.captions]).encode()).hexdigest()

    def seed(self, index: int) -> int:
        """Of the first candidate of a caption."""
        draw = self.settings["draw"]
        return draw["seed"] + index * max(draw["best_of"], 1)


def plan(out: pathlib.Path, source: Source, draw: Draw, settings: Mapping[str, Any], *, crew: Crew) -> Plan:
    """The plan in a folder, made by the first process if there is none.

    settings: what decides the pictures besides `draw`; plain json.

    Raises:
      UserError: too few captions, or the folder holds the pictures of another evaluation.
    """
    path, settings = out / PLAN, {**settings, "draw": dataclasses.asdict(draw)}
    if crew.first and not path.exists():
        made = choose(source, draw, settings)
        files.write(path, json.dumps(dataclasses.asdict(made), indent=1) + "\n")
    crew.wait([path])
    found = load(path)
    if changed := configs.differences(found.settings, settings):
        listed = ", ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in sorted(changed.items()))
        raise UserError(f"{out} holds the pictures of another evaluation ({listed}): use these again or another --out")
    return found


def load(path: pathlib.Path) -> Plan:
    """Raises UserError if the file is no plan."""
    try:
        return Plan(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"expected the plan of an evaluation in {path}, got {error}: delete its folder") from error


def choose(source: Source, draw: Draw, settings: Mapping[str, Any]) -> Plan:
    """Captions of a source by `draw`: `count` of them by the seed without one twice, or all.

    Raises:
      UserError: fewer captions than asked for, or none.
    """
    ids, captions, dropped = [], [], collections.Counter()
    with futures.ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(lambda row: _captions(source, row), range(len(source))):
            if isinstance(found, Dropped):
                dropped[found.reason] += 1
                continue
            key, texts = found
            ids += [f"{key}#{number}" for number in range(len(texts))]
            captions += texts
    if draw.unique:
        first: dict[str, int] = {}
        for index, caption in enumerate(captions):
            first.setdefault(caption, index)
        ids, captions = [ids[i] for i in first.values()], list(first)
    wanted = draw.count or len(captions)
    if not captions or wanted > len(captions):
        lost = f" ({counted(dropped)})" if dropped else ""
        raise UserError(
            f"expected {wanted or 'some'} captions in {source.name}, got {len(captions)}{lost}: "
            "give a source with more, or --config.draw.count=N"
        )
    chosen = np.random.default_rng(draw.seed).permutation(len(captions))[:wanted] if draw.count else range(wanted)
    return Plan([ids[i] for i in chosen], [captions[i] for i in chosen], dict(settings), dict(dropped), len(source))


def _captions(source: Source, row: int) -> Dropped | tuple[str, tuple[str, ...]]:
    record = source[row]
    return record if isinstance(record, Dropped) else (record.key, record.captions)
