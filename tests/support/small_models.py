"""The real dVAE and transformer, tiny, trained for a few updates on a mesh of any shape."""

import math

import jax
import numpy as np

from dalle_jax import sharding
from dalle_jax.mesh import demand, make_mesh
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import build
from dalle_jax.train.ema import Ema
from dalle_jax.train.objectives import build_task
from dalle_jax.train.optimizer.build import build_optimizer
from dalle_jax.train.step import TrainStep
from tests.support.demo_settings import demo_settings

UPDATES, BATCH = 4, 16
# A larger step size would let Adam blow rounding of near-zero gradients up to its own size.
COMMON = {"batch_size": BATCH, "run.steps": UPDATES, "optimizer.name": "adamw", "optimizer.schedule.warmup_steps": 0}
DVAE = COMMON | {
    "model.image_size": 16, "model.vocab": 16, "model.width": 32, "model.stem": 8, "model.patch": 4,
    "data.image_size": 16, "optimizer.learning_rate": 3e-5, "optimizer.schedule.end_learning_rate": 0.0,
}  # fmt: skip
# Eight heads, so that tensor can be 8; row, column, row, row, which a scan repeats, and the convolution.
TRANSFORMER = COMMON | {
    "model.num_layers": 5, "model.width": 16, "model.heads": 8, "model.head_size": 2, "model.text_len": 8,
    "model.text_vocab": 24, "model.grid": 4, "model.image_vocab": 16, "data.image_size": 16,
    "optimizer.learning_rate": 2e-3,
}  # fmt: skip


def task_of(name, values=None):
    """Task and optimizer; the transformer's frozen image tokenizer has random parameters. values: of config keys."""
    settings, frozen = demo_settings(name, (DVAE if name == "dvae" else TRANSFORMER) | (values or {})), {}
    if name != "dvae":
        model = build("dvae", demo_settings("dvae", DVAE).model)
        frozen = {"image_tokenizer": ModelDir({}, model, jax.jit(model.init)(jax.random.key(5)))}
    task = build_task(settings, frozen)
    return task, build_optimizer(settings.optimizer, steps=UPDATES, axes=task.model.axes)


def batches(name):
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        batch = {"image": rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)}
        if name == "transformer":
            batch["text"] = rng.integers(0, 24, (BATCH, 8)).astype(np.int32)
        yield batch


def train(name, shape, *, accumulate=1, values=None):
    """Losses and gradient norms of every update, and the last state."""
    task, built = task_of(name, values)
    mesh = make_mesh(
        dict(zip(sharding.MESH_AXES, shape, strict=True)),
        devices=jax.devices()[: math.prod(shape)],
        unfit=demand(task.model.abstract, task.model.axes, batch_size=BATCH, accumulate=accumulate),
    )
    step = TrainStep(task, built, mesh, ema=Ema(decay=0.9), accumulate=accumulate)
    state = step.init(jax.random.key(0))
    frozen, measured = jax.device_put(task.frozen, sharding.replicated(mesh)), []
    for batch in batches(name):
        state, values = step.update(state, frozen, sharding.shard_batch(batch, mesh), jax.random.key(1))
        measured.append((float(values["loss"]), float(values["grad_norm"])))
    return np.array(measured), state
