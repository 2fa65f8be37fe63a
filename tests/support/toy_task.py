"""A next-token model that compiles in a second, and its training step with any optimizer, storage and compression."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dalle_jax import sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models.layers import Model, param
from dalle_jax.train.ema import Ema
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from dalle_jax.train.optimizer.schedule import Schedule
from dalle_jax.train.step import TrainStep

VOCAB, WIDTH, LENGTH, BATCH = 16, 8, 9, 16


class Toy(nnx.Module):
    """Has every kind of parameter that the real models have: tables, stacked matrices, gains, a head."""

    def __init__(self, rngs):
        self.table = param(rngs, (VOCAB, WIDTH), axes=("vocab", "embed"), std=0.3)
        self.gain = param(rngs, (2, WIDTH), axes=("layers", "embed"), fill=1.0)
        self.matrix = param(rngs, (2, WIDTH, WIDTH), axes=("layers", "embed", "mlp"), std=0.3)
        self.head = param(rngs, (WIDTH, VOCAB), axes=("embed", "vocab"), std=0.1)

    def __call__(self, text_BT):
        x = self.table[...][text_BT]
        for gain, matrix in zip(self.gain[...], self.matrix[...], strict=True):
            branch = jnp.tanh((x * gain[None, None]) @ matrix)
            x = sharding.constrain(x + branch, ("batch", "sequence", "embed_activation"))
        return x @ self.head[...]


MODEL = Model(types.SimpleNamespace(), Toy)


def toy_loss(params, frozen, batch, *, key, step):
    del key, step
    logits = jax.nn.log_softmax(MODEL.apply(params, batch["text"][:, :-1]) * frozen["temperature"])
    loss = -jnp.take_along_axis(logits, batch["text"][:, 1:, None], axis=-1).mean()
    return loss, {"twice": 2 * loss}


TOY = Task("toy", MODEL, toy_loss, frozen={"temperature": np.float32(1.5)})
NAN = {"temperature": np.float32(np.nan)}  # frozen parameters with which no update is finite


def toy_step(mesh=None, optimizer=types.MappingProxyType({}), **options) -> TrainStep:
    """mesh: default one device. optimizer: values that differ. options: of TrainStep."""
    values = {"b2": 0.96, "weight_decay": 4.5e-2, "learning_rate": 0.05, "clip_norm": 0.5, **optimizer}
    values.setdefault("schedule", Schedule(warmup_steps=2))
    built = build_optimizer(Optimizer(**values), steps=100, axes=MODEL.axes)
    return TrainStep(TOY, built, mesh or one_device(), **{"ema": Ema(decay=0.9), **options})


def toy_batch(index):
    return {"text": np.random.default_rng(index).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)}


def make_updates(step, state, numbers, *, frozen=TOY.frozen, batch=toy_batch):
    """The state after updates on the batches of these numbers, and what they measured."""
    measured = []
    for number in numbers:
        state, values = step.update(state, frozen, sharding.shard_batch(batch(number), step.mesh), jax.random.key(1))
        measured.append(jax.device_get(values))
    return state, measured


def one_device():
    return make_mesh({}, devices=jax.devices()[:1])
