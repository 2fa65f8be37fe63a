"""One of two processes that train with compressed gradients for `test_many_processes.py`: FOLDER PORT N I."""

import sys

import jax

from dalle_jax import distributed, sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.train.optimizer.powersgd import Compression
from tests.support import processes
from tests.support.line_task import Numbers, line_step

SIZES, UPDATES = {"replica": 2, "fsdp": 4}, 4


def train():
    """Loss and norm of each update on this process's part of the batches, and whole arrays after them: parameters, and
    what was left out, summed over the replicas."""
    mesh = make_mesh(SIZES)
    step = line_step(mesh, compression=Compression(4, "paper"))
    state = step.init(jax.random.key(0))
    part, parts = sharding.batch_share(mesh)
    batches, measured = Numbers(), []
    for _ in range(UPDATES):
        own = {name: x.reshape(parts, -1, *x.shape[1:])[part] for name, x in next(batches).items()}
        state, metrics = step.update(state, {}, sharding.shard_batch(own, mesh), jax.random.key(1))
        measured.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
    state = step.to_saved(state)
    return measured, distributed.whole({name: state[name] for name in ("params", "error")})


if __name__ == "__main__":
    folder, rank, _ = processes.join(*sys.argv[1:])
    processes.write(folder, rank, *train())
