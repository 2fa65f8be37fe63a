"""One of two processes of four devices that train with compressed gradients for `test_many_processes.py`:
FOLDER PORT N I."""

import json
import pathlib
import sys

import jax
import numpy as np

from dalle_jax import distributed, sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.train.optimizer.powersgd import Compression
from tests.support.line_task import Numbers, line_step

SIZES, UPDATES = {"replica": 2, "fsdp": 4}, 4


def train():
    """Loss and norm of each update on this process's part of the batches, and whole arrays after them: parameters, and
    what was left out, summed over the replicas."""
    mesh = make_mesh(SIZES)
    step = line_step(mesh, compression=Compression(4, "paper"))
    state = step.init(jax.random.key(0))
    part, parts = sharding.batch_reader(mesh)
    batches, measured = Numbers(), []
    for _ in range(UPDATES):
        own = {name: x.reshape(parts, -1, *x.shape[1:])[part] for name, x in next(batches).items()}
        state, metrics = step.update(state, {}, sharding.shard_batch(own, mesh), jax.random.key(1))
        measured.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    state = step.to_saved(state)
    return measured, distributed.whole({name: state[name] for name in ("params", "error")})


def main(folder: pathlib.Path, port: str, count: int, rank: int) -> None:
    distributed.initialize(
        coordinator=f"localhost:{port}", num_processes=count, process_id=rank, start_seconds=60, hang_seconds=60
    )
    measured, arrays = train()
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    np.savez(folder / f"{rank}.npz", *jax.tree.leaves(arrays))


if __name__ == "__main__":
    place, number, all_, own = sys.argv[1:]
    main(pathlib.Path(place), number, int(all_), int(own))
