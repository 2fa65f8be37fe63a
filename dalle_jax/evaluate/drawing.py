"""Draws the pictures of an evaluation: one a caption, into tar shards, going on where it was stopped.

OUT/pictures/00000.tar ...: pictures `shard_size` at a time in the order of the plan. Process i draws every n-th.
"""

import pathlib

from dalle_jax.errors import UserError
from dalle_jax.evaluate.captions import Plan
from dalle_jax.evaluate.crew import Crew
from dalle_jax.evaluate.picture_shards import GrowingShard, growing
from dalle_jax.evaluate.progress import Clock, bar, say
from dalle_jax.evaluate.protocol import Draw
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import Request

PICTURES = "pictures"


def check(pipe: Pipeline, draw: Draw) -> None:
    """Raises UserError if this model cannot draw so, before anything is begun."""
    pipe.check(_request("", draw, draw.seed))


def draw_all(
    pipe: Pipeline, plan: Plan, draw: Draw, out: pathlib.Path, *, crew: Crew, tell: bool
) -> list[pathlib.Path]:
    """The shards of all pictures, in order; this process's own are finished on return.

    A finished shard is never drawn again, nor is a picture of an unfinished one. tell: progress on stderr, a bar on a
    terminal, a line for each shard elsewhere.

    Raises:
      UserError: the last seeds are beyond what a picture can have, a shard holds other pictures, or somebody else is
        drawing it.
      OSError: the folder cannot be written.
    """
    folder = out / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    count, size = len(plan.captions), draw.shard_size
    shards = [range(start, min(start + size, count)) for start in range(0, count, size)]
    paths = [folder / f"{number:05d}.tar" for number in range(len(shards))]
    own = [number for number in crew.own(len(shards)) if not paths[number].exists()]
    pipe.check(_request(plan.captions[-1], draw, plan.seed(count - 1)))  # the largest seed
    together = _together(pipe, draw)
    todo = sum(len(shards[number]) for number in own)
    everything = sum(len(shards[number]) for number in crew.own(len(shards)))
    clock = Clock(todo)
    with bar(everything, "drawing" if tell else "", done=everything - todo) as shown:
        for number in own:
            shard = GrowingShard(paths[number])
            try:
                waiting = _missing(shard, shards[number])
                clock.skip(len(shards[number]) - len(waiting))
                shown.update(len(shards[number]) - len(waiting))
                for start in range(0, len(waiting), together):
                    crew.beat("draw")
                    indices = waiting[start : start + together]
                    requests = [_request(plan.captions[i], draw, plan.seed(i)) for i in indices]
                    drawn = [pictures[0] for pictures in pipe.draw(requests)]
                    more = [{"id": plan.ids[i], "key": f"{i:09d}"} for i in indices]
                    shard.add(list(zip([f"{i:09d}" for i in indices], drawn, more, strict=True)))
                    clock.done(len(indices))
                    shown.update(len(indices))
                shard.finish()
            finally:
                shard.close()
            if tell:
                say(f"{paths[number].name} of {len(shards)} shards drawn; {clock}")
    return paths


def _missing(shard: GrowingShard, indices: range) -> list[int]:
    """What is not in a shard yet.

    Raises:
      UserError: other pictures are in it.
    """
    done = [f"{i:09d}" for i in indices[: len(shard.names)]]
    if shard.names != done:
        path = growing(shard.path)
        raise UserError(f"expected the pictures {done} in {path}, got {shard.names}: delete that file")
    return list(indices[len(done) :])


def _together(pipe: Pipeline, draw: Draw) -> int:
    """Captions of one call: as many as fill a batch, so that little is lost if the process is killed."""
    return pipe.captions_per_batch(_request("", draw, draw.seed))


def _request(caption: str, draw: Draw, seed: int) -> Request:
    return Request(
        caption,
        best_of=draw.best_of or None,
        seed=seed,
        guidance=draw.guidance,
        options={
            "temperature": draw.temperature,
            "top_k": draw.top_k or None,
            "top_p": None if draw.top_p == 1 else draw.top_p,
        },
    )
