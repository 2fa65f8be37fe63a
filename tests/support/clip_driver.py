"""One of two processes that train a tiny CLIP for `test_many_processes.py`: FOLDER PORT N I."""

import sys

import jax

from dalle_jax import distributed, sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.train.objectives import build_task
from dalle_jax.train.optimizer.build import build_optimizer
from dalle_jax.train.step import TrainStep
from tests.support import processes
from tests.support.tiny_clip import ONE_LAYER, TINY, random_batch, tiny_settings

BATCH, UPDATES = 8, 2


def train():
    """Metrics of each update on this process's part of the batches, and the parameters after them, whole.

    Adam's epsilon is large, because it would blow the rounding of gradients that are zero (of the keys' biases) up to
    the step size.
    """
    mesh = make_mesh({"fsdp": -1}, devices=jax.devices()[: jax.process_count()])
    values = {"optimizer.name": "adamw", "optimizer.eps": 1e-3, "optimizer.schedule.warmup_steps": 0}
    settings = tiny_settings(values | ONE_LAYER | {"batch_size": BATCH})
    task = build_task(settings, {})
    built = build_optimizer(settings.optimizer, steps=UPDATES, axes=task.model.axes)
    step = TrainStep(task, built, mesh)
    state = step.init(jax.random.key(0))
    part, parts = sharding.batch_share(mesh)
    measured = []
    for seed in range(UPDATES):
        image, text = (x.reshape(parts, -1, *x.shape[1:])[part] for x in random_batch(TINY, batch=BATCH, seed=seed))
        batch = sharding.shard_batch({"image": image, "text": text}, mesh)
        state, metrics = step.update(state, {}, batch, jax.random.key(1))
        measured.append({name: float(value) for name, value in metrics.items()})
    return measured, distributed.whole(state["params"])


if __name__ == "__main__":
    folder, rank, _ = processes.join(*sys.argv[1:])
    processes.write(folder, rank, *train())
