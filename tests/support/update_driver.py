"""One of two processes that train for `test_many_processes.py`: FOLDER PORT N I KIND, clip or compressed."""

import sys

import jax

from dalle_jax import distributed, sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.train.objectives import build_task
from dalle_jax.train.optimizer.build import build_optimizer
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.step import TrainStep
from tests.support import line_task, processes
from tests.support.tiny_clip import ONE_LAYER, TINY, random_batch, tiny_settings

UPDATES = {"clip": 2, "compressed": 4}


def clip_step():
    """Adam's epsilon is large, because it would blow the rounding of gradients that are zero (of the keys' biases) up
    to the step size."""
    values = {"optimizer.name": "adamw", "optimizer.eps": 1e-3, "optimizer.schedule.warmup_steps": 0}
    settings = tiny_settings(values | ONE_LAYER)
    task = build_task(settings, {})
    built = build_optimizer(settings.optimizer, steps=UPDATES["clip"], axes=task.model.axes)
    return TrainStep(task, built, make_mesh({"fsdp": -1}, devices=jax.devices()[: jax.process_count()]))


def compressed_step():
    return line_task.line_step(make_mesh({"replica": 2, "fsdp": 4}), compression=Compression(4, "paper"))


def batch_of(kind, number):
    if kind == "compressed":
        return line_task.Numbers().batch(number)
    return dict(zip(("image", "text"), random_batch(TINY, batch=8, seed=number), strict=True))


def train(kind):
    """Metrics of each update on this process's part of the batches, and whole arrays after them: parameters, and what
    compression left out, summed over the replicas."""
    step = clip_step() if kind == "clip" else compressed_step()
    state = step.init(jax.random.key(0))
    part, parts = sharding.batch_share(step.mesh)
    measured = []
    for number in range(UPDATES[kind]):
        own = {name: x.reshape(parts, -1, *x.shape[1:])[part] for name, x in batch_of(kind, number).items()}
        state, metrics = step.update(state, {}, sharding.shard_batch(own, step.mesh), jax.random.key(1))
        measured.append({name: float(value) for name, value in metrics.items()})
    state = step.to_saved(state)
    return measured, distributed.whole({name: state[name] for name in ("params", "error") if name in state})


if __name__ == "__main__":
    folder, rank, (kind,) = processes.join(*sys.argv[1:])
    processes.write(folder, rank, *train(kind))
