"""The captions of an evaluation, and their pictures: one each, into tar shards, going on where it was stopped.

OUT/plan.json: what decides the pictures (checkpoint, source, how to draw), and each caption with its id. It is made
once, by the seed, and read ever after. An id is KEY#NUMBER: the record's key in the source and the number of the
caption in the record. OUT/pictures/00000.tar ...: pictures `shard_size` at a time in the order of the plan.
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

from dalle_jax import files
from dalle_jax.config import differences
from dalle_jax.data.record import Dropped, Source
from dalle_jax.errors import UserError
from dalle_jax.evaluate.features import counted
from dalle_jax.evaluate.picture_shards import GrowingShard, growing
from dalle_jax.evaluate.protocol import Draw
from dalle_jax.evaluate.workers import Worker
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Request

PLAN, PICTURES = "plan.json", "pictures"
READERS = 8  # threads that mostly wait for the disk


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
        """Seed of the first candidate of a caption."""
        draw = self.settings["draw"]
        return draw["seed"] + index * (draw["best_of"] or 1)


def plan(out: pathlib.Path, source: Source, draw: Draw, settings: Mapping[str, Any], *, worker: Worker) -> Plan:
    """The plan in a folder, made by the first worker if there is none.

    settings: what decides the pictures besides `draw`; plain json.

    Raises:
      UserError: too few captions, or the folder holds the pictures of another evaluation.
    """
    path, settings = out / PLAN, {**settings, "draw": dataclasses.asdict(draw)}
    if worker.first and not path.exists():
        made = choose(source, draw, settings)
        files.write(path, json.dumps(dataclasses.asdict(made), indent=1) + "\n")
    worker.wait([path])
    found = load(path)
    if changed := differences(found.settings, settings):
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

    def read(row: int) -> Dropped | tuple[str, tuple[str, ...]]:
        record = source[row]
        return record if isinstance(record, Dropped) else (record.key, record.captions)

    ids, captions, dropped = [], [], collections.Counter()
    with futures.ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(read, range(len(source))):
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


def check(pipe: Pipeline, draw: Draw) -> None:
    """Raises UserError if this model cannot draw so, before anything is begun."""
    pipe.check(_request("", draw, draw.seed))


def draw_all(pipe: Pipeline, plan: Plan, draw: Draw, out: pathlib.Path, *, worker: Worker) -> list[pathlib.Path]:
    """The shards of all pictures, in order; this worker's own are finished on return.

    A finished shard is never drawn again, nor is a picture of an unfinished one.

    Raises:
      UserError: the last seeds are beyond what a picture can have, a shard holds other pictures, or somebody else is
        drawing it.
      OSError: the folder cannot be written.
    """
    folder = out / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    count = len(plan.captions)
    pipe.check(_request(plan.captions[-1], draw, plan.seed(count - 1)))  # the largest seed
    shards = [range(start, min(start + draw.shard_size, count)) for start in range(0, count, draw.shard_size)]
    paths = [folder / f"{number:05d}.tar" for number in range(len(shards))]
    own, size = worker.share.of(range(len(shards))), _captions_per_call(pipe, draw)
    total = sum(len(shards[number]) for number in own)
    done = sum(len(shards[number]) for number in own if paths[number].exists())
    with worker.bar("drawing", total=total, done=done) as bar:
        for number in own:
            if paths[number].exists():
                continue
            with GrowingShard(paths[number]) as shard:
                missing = _missing(shard, shards[number])
                bar.update(len(shards[number]) - len(missing))
                for start in range(0, len(missing), size):
                    worker.beat("draw")
                    indices = missing[start : start + size]
                    requests = [_request(plan.captions[i], draw, plan.seed(i)) for i in indices]
                    drawn = [pictures[0] for pictures in pipe.draw(requests)]
                    more = [{"id": plan.ids[i], "key": f"{i:09d}"} for i in indices]
                    shard.add(list(zip([f"{i:09d}" for i in indices], drawn, more, strict=True)))
                    bar.update(len(indices))
                shard.finish()
            bar.set_description(f"{paths[number].name} of {len(shards)} shards drawn", refresh=False)
            worker.log(bar)
    return paths


def _missing(shard: GrowingShard, indices: range) -> range:
    """What is not in a shard yet.

    Raises:
      UserError: other pictures are in it.
    """
    done = [f"{i:09d}" for i in indices[: len(shard.names)]]
    if shard.names != done:
        path = growing(shard.path)
        raise UserError(f"expected the pictures {done} in {path}, got {shard.names}: delete that file")
    return indices[len(done) :]


def _captions_per_call(pipe: Pipeline, draw: Draw) -> int:
    """As many as fill a batch, so that little is lost if the process is killed."""
    return pipe.captions_per_batch(_request("", draw, draw.seed))


def _request(caption: str, draw: Draw, seed: int) -> Request:
    options = {"temperature": draw.temperature, "top_k": draw.top_k, "top_p": draw.top_p}
    return Request(caption, best_of=draw.best_of, seed=seed, guidance=draw.guidance, options=options)
