"""One of two processes of four devices that train with compressed gradients for `test_many_processes.py`:
FOLDER PORT N I."""

import json
import pathlib
import sys

import jax
import numpy as np

from dalle_jax import distributed, sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.train import step as steps
from dalle_jax.train.optimizer import build as optimizers
from dalle_jax.train.optimizer.powersgd import Compression
from tests.support.line_task import LINE, Numbers, config

SIZES, UPDATES = {"replica": 2, "fsdp": 4}, 4


def train():
    """Loss and norm of each update on this process's part of the batches, and whole arrays after them: parameters, and
    what was left out, summed over the replicas."""
    mesh = make_mesh(SIZES)
    built = optimizers.build(config().optimizer, steps=UPDATES, axes=LINE.model.axes)
    kept = {"mesh": mesh, "compression": Compression(4, "paper")}
    state = steps.init_state(LINE, built, key=jax.random.key(0), **kept)
    update, (_, to_saved, _) = steps.make_update(LINE, built, **kept), steps.make_saved(LINE, built, **kept)
    part, parts = sharding.batch_reader(mesh)
    batches, measured = Numbers(), []
    for _ in range(UPDATES):
        own = {name: x.reshape(parts, -1, *x.shape[1:])[part] for name, x in next(batches).items()}
        state, metrics = update(state, {}, sharding.shard_batch(own, mesh), jax.random.key(1))
        measured.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    state = to_saved(state)
    return measured, distributed.whole({name: state[name] for name in ("params", "error")})


def main(folder: pathlib.Path, port: str, count: int, rank: int) -> None:
    distributed.initialise(
        coordinator=f"localhost:{port}", num_processes=count, process_id=rank, start_seconds=60, hang_seconds=60
    )
    measured, arrays = train()
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    np.savez(folder / f"{rank}.npz", *jax.tree.leaves(arrays))


if __name__ == "__main__":
    place, number, all_, own = sys.argv[1:]
    main(pathlib.Path(place), number, int(all_), int(own))
