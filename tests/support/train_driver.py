"""One of several processes that train in `test_many_processes.py`: FOLDER PORT N I WORKDIR SIGNALLED [OVERRIDE ...]."""

import hashlib
import json
import os
import pathlib
import signal
import sys
import types

if __name__ == "__main__":
    sys.modules["torch"] = None  # tensorboardX imports it if it is there, for seconds, and needs nothing of it here

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dalle_jax import distributed, sharding
from dalle_jax.cli import main, train
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.models.layers import Model, param
from dalle_jax.train import run
from dalle_jax.train.monitor import goodput, metrics
from dalle_jax.train.objectives.task import Task

SIDE, WIDTH = 16, 32


class Toy(nnx.Module):
    """Pictures to pictures through a narrow layer: compiles in a second, cut along both axes of a matrix."""

    def __init__(self, rngs):
        self.down = param(rngs, (SIDE * SIDE * 3, WIDTH), axes=("in", "out"), std=0.05)
        self.up = param(rngs, (WIDTH, SIDE * SIDE * 3), axes=("out", "in"), std=0.05)

    def __call__(self, pixels_BP):
        return jnp.tanh(pixels_BP @ self.down[...]) @ self.up[...]


MODEL = Model(types.SimpleNamespace(), Toy)


def toy_task(*_) -> Task:
    """Squared error of noisy pictures, so that every update is random."""

    def loss(params, frozen, batch, *, key, step):
        pixels_BP = batch["image"].reshape(-1, SIDE * SIDE * 3) / 255.0
        pixels_BP = sharding.constrain(pixels_BP, ("batch", None))
        error = jnp.square(MODEL.apply(params, pixels_BP + 0.1 * jax.random.normal(key, pixels_BP.shape)) - pixels_BP)
        return error.mean(), {}

    def pictures(params, frozen, batch, key):
        made = MODEL.apply(params, batch["image"].reshape(-1, SIDE * SIDE * 3) / 255.0)
        return jnp.clip(made * 255, 0, 255).astype(jnp.uint8).reshape(1, -1, SIDE, SIDE, 3)

    return Task("dvae", MODEL, loss, pictures=jax.jit(pictures))


def note_records(seen: list, *, on_batch=lambda number: None) -> None:
    """From here on, the record numbers of every training batch of this process (its pictures tell) go to `seen`."""
    take = ShardedBatches.__next__

    def taken(self):
        batch = take(self)
        seen.append(batch["image"][:, 0, 0, 0].tolist())
        on_batch(len(seen))
        return batch

    ShardedBatches.__next__ = taken


def digest(tree) -> str:
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(distributed.whole(tree)):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def run_command(
    folder: pathlib.Path, port: int, count: int, rank: int, workdir: str, signalled: str, *overrides: str
) -> int:
    """`dalle-jax train`, with SIGTERM to process `signalled` while it takes its fourth batch ('' for none)."""
    seen, states = [], []

    def terminate(number):
        if signalled and rank == int(signalled) and number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    note_records(seen, on_batch=terminate)
    metrics.save_curves = goodput.draw = lambda *_, **__: None  # seconds of matplotlib
    run.build_task, do_train = toy_task, train.train
    train.train = lambda *args, **kwargs: states.append(do_train(*args, **kwargs)) or states[-1]
    job = ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id", str(rank)]
    status = main.main(["train", "--config", "configs/dvae.py:demo", "--workdir", workdir, *job, *overrides])
    if states:
        found = {"status": status, "records": seen, "step": states[0].step, "digest": digest(states[0].state)}
        (folder / f"{rank}.json").write_text(json.dumps(found))
    return status


if __name__ == "__main__":
    place, number, all_, own, *rest = sys.argv[1:]
    sys.exit(run_command(pathlib.Path(place), int(number), int(all_), int(own), *rest))
