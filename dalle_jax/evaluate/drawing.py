"""The captions of an evaluation, and their pictures: one each, into tar shards, going on where it was stopped.

OUT/plan.json: what decides the pictures (checkpoint, source, how to draw), and each caption with its id. It is made
once, by the seed, and read ever after. An id is KEY#NUMBER: the record's key in the source and the number of the
caption in the record. OUT/pictures/00000.tar ... (webdataset): pictures `shard_size` at a time in the order of the
plan, NAME.png with how it was made, NAME.txt its caption, NAME.json the rest.

The pictures of a shard are collected as files in a hidden folder beside it, each whole or not at all, and joined when
all are there. So what a kill left is used again, and the shard has the same bytes as if nobody had stopped it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from dalle_jax import files
from dalle_jax.config import differences
from dalle_jax.data.in_order import in_order
from dalle_jax.data.record import Dropped, Source
from dalle_jax.data.sources import open_source
from dalle_jax.data.sources.tar_members import BLOCK
from dalle_jax.errors import UserError
from dalle_jax.evaluate.features import counted
from dalle_jax.evaluate.protocol import Draw
from dalle_jax.evaluate.workers import Worker
from dalle_jax.pictures.picture import Picture
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Request, caption_seed

PLAN, PICTURES = "plan.json", "pictures"
READERS = 8  # threads that mostly wait for the disk
READ_AHEAD = 256  # records
END = b"\0" * 10_240  # of an archive, as tar itself writes it


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

    def summary(self) -> dict[str, Any]:
        """The plan in a report."""
        return {
            "captions_sha256": self.digest,
            "records": self.records,
            "records_dropped": self.dropped,
            "seeds": {caption_id: self.seed(i) for i, caption_id in enumerate(self.ids)},
        }

    def seed(self, index: int) -> int:
        """Seed of the first candidate of a caption."""
        draw = self.settings["draw"]
        return caption_seed(draw["seed"], index, candidates=draw["best_of"] or 1)


def load(path: pathlib.Path) -> Plan:
    """Raises UserError if the file is no plan."""
    try:
        plan = Plan(**json.loads(path.read_text()))
        texts = [*plan.ids, *plan.captions]
        if not texts or len(texts) != 2 * len(plan.ids) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{len(plan.ids)} ids of {len(plan.captions)} captions, or others than texts")
        plan.seed(len(plan.captions))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"expected the plan of an evaluation in {path}, got {error!r}: use another --out") from error
    return plan


def choose(source: Source, draw: Draw, settings: Mapping[str, Any]) -> Plan:
    """Captions of a source by `draw`: `count` of them by the seed without one twice, or all.

    Raises:
      UserError: fewer captions than asked for, or none.
    """

    def read(row: int) -> Dropped | tuple[str, tuple[str, ...]]:
        record = source[row]
        return record if isinstance(record, Dropped) else (record.key, record.captions)  # no pictures in memory

    ids, captions, dropped = [], [], collections.Counter()
    for found in in_order(read, range(len(source)), threads=READERS, ahead=READ_AHEAD):
        if isinstance(found, Dropped):
            dropped[found.reason] += 1
            continue
        key, texts = found
        ids += [f"{key}#{number}" for number in range(len(texts))]
        captions += texts
    if draw.unique:
        first: dict[str, str] = {}
        for caption_id, caption in zip(ids, captions, strict=True):
            first.setdefault(caption, caption_id)
        ids, captions = list(first.values()), list(first)
    wanted = draw.count or len(captions)
    if not captions or wanted > len(captions):
        lost = f" ({counted(dropped)})" if dropped else ""
        raise UserError(
            f"expected {wanted or 'some'} captions in {source.name}, got {len(captions)}{lost}: "
            "give a source with more, or --config.draw.count=N"
        )
    chosen = np.random.default_rng(draw.seed).permutation(len(captions))[:wanted] if draw.count else range(wanted)
    return Plan([ids[i] for i in chosen], [captions[i] for i in chosen], dict(settings), dict(dropped), len(source))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A model that draws pictures, and what it is asked for. source: of the captions."""

    pipe: Pipeline
    draw: Draw
    source: str

    @classmethod
    def load(cls, folder: str, draw: Draw, source: str, *, tensor: int = 1) -> "Drawing":
        """The model of a transformer's workdir. tensor: devices that share one copy of it.

        Raises:
          UserError: a part of it is missing, or it cannot draw so.
        """
        drawing = cls(Pipeline.load(folder, clip=draw.clip, weights=draw.weights, tensor=tensor), draw, source)
        drawing.pipe.check(drawing.request("", draw.seed))
        return drawing

    @property
    def ranked_by(self) -> str | None:
        """sha256 of the CLIP that chooses among candidates."""
        return self.pipe.reranker.digest if self.draw.best_of and self.pipe.reranker else None

    def request(self, caption: str, seed: int) -> Request:
        draw = self.draw
        options = {"temperature": draw.temperature, "top_k": draw.top_k, "top_p": draw.top_p}
        return Request(caption, best_of=draw.best_of, seed=seed, guidance=draw.guidance, options=options)

    def cut(self, plan: Plan) -> int:
        """The number of captions that are longer than the model reads."""
        usages = (self.pipe.generator.usage(self.request(caption, 0)) for caption in plan.captions)
        return sum(usage.text_tokens > usage.max_text_tokens for usage in usages)

    def plan(self, out: pathlib.Path, worker: Worker) -> Plan:
        """The plan in a folder, made by the first worker if there is none.

        Raises:
          UserError: too few captions, or the folder holds the pictures of another evaluation.
        """
        path, draw = out / PLAN, dataclasses.asdict(self.draw) | {"clip": None}  # `ranked_by` says which CLIP
        settings = {"checkpoint": self.pipe.digest, "ranked_by": self.ranked_by, "source": self.source, "draw": draw}
        if worker.first and not path.exists():
            made = choose(open_source(self.source), self.draw, settings)
            files.write(path, json.dumps(dataclasses.asdict(made), indent=1) + "\n")
        worker.wait([path])
        found = load(path)
        if changed := differences(found.settings, settings):
            listed = ", ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in sorted(changed.items()))
            raise UserError(
                f"{out} holds the pictures of another evaluation ({listed}): use these again or another --out"
            )
        return found

    def draw_all(self, plan: Plan, out: pathlib.Path, worker: Worker) -> list[pathlib.Path]:
        """The shards of all pictures, in order; this worker's are finished on return.

        A finished shard is never drawn again, nor is a picture of an unfinished one.

        Raises:
          UserError: the last seeds are beyond what a picture can have, or another process draws one of the shards.
          OSError: the folder cannot be written.
        """
        folder, size, count = out / PICTURES, self.draw.shard_size, len(plan.captions)
        folder.mkdir(parents=True, exist_ok=True)
        self.pipe.check(self.request(plan.captions[-1], plan.seed(count - 1)))  # the largest seed
        shards = [range(start, min(start + size, count)) for start in range(0, count, size)]
        paths = [folder / f"{number:05d}.tar" for number in range(len(shards))]

        def make(number: int, bar: tqdm.tqdm) -> None:
            self._draw_shard(paths[number], shards[number], plan, worker, bar.update)
            bar.set_description_str(f"{paths[number].name} of {len(shards)} shards drawn", refresh=False)

        sizes = [len(shard) for shard in shards]
        worker.make_parts("drawing", sizes, is_done=lambda number: paths[number].exists(), make=make)
        return paths

    def _draw_shard(self, path: pathlib.Path, indices: range, plan: Plan, worker: Worker, advance: Callable) -> None:
        with collecting(path) as folder:
            parts = {i: folder / f"{i:09d}.part" for i in indices}
            todo = [i for i in indices if not parts[i].exists()]
            advance(len(indices) - len(todo))
            # As many as fill a batch, so that little is lost if the process is killed.
            size = self.pipe.captions_per_batch(self.request("", self.draw.seed))
            for start in range(0, len(todo), size):
                worker.beat("draw")
                called = todo[start : start + size]
                drawn = self.pipe.draw([self.request(plan.captions[i], plan.seed(i)) for i in called])
                for i, (picture, *_) in zip(called, drawn, strict=True):
                    name = f"{i:09d}"
                    files.write(parts[i], packed(name, picture, {"id": plan.ids[i], "key": name}))
                advance(len(called))
            join(list(parts.values()), path)


@contextlib.contextmanager
def collecting(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder for the pictures of a shard, locked until the block ends, by a kill too.

    Raises:
      UserError: another process has it; both would draw the same pictures.
    """
    folder = path.with_name(f".{path.name}.parts")
    folder.mkdir(exist_ok=True)
    with files.locked(folder / "lock") as free:
        if not free:
            raise UserError(
                f"expected to draw into {path} alone, but another process is: wait for it, or use another --out"
            )
        yield folder


def packed(name: str, picture: Picture, more: Mapping[str, str]) -> bytes:
    """A picture as it stands in a shard. more: what its .json says besides caption, seed and score."""
    png = io.BytesIO()
    picture.save(png, format="PNG")
    about = {"caption": picture.caption, "seed": picture.seed, "score": picture.score, **more}
    parts = {"png": png.getvalue(), "txt": picture.caption.encode(), "json": json.dumps(about, sort_keys=True).encode()}
    members = b""
    for ending, content in parts.items():
        header = tarfile.TarInfo(f"{name}.{ending}")
        header.size = len(content)
        members += header.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % BLOCK)
    return members


def join(parts: list[pathlib.Path], path: pathlib.Path) -> None:
    """Write a shard of packed pictures and remove their folder."""
    with files.replacing(path) as aside:
        with aside.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
            file.write(END)
    shutil.rmtree(parts[0].parent)
