"""A tiny transformer in any precision, its batches and its update, and the equations of a traced program."""

import dataclasses
import functools

import jax
import numpy as np

from dalle_jax.mesh import make_mesh
from dalle_jax.models import transformer
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.objectives.transformer import token_losses
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from dalle_jax.train.optimizer.schedule import Schedule
from dalle_jax.train.step import TrainStep

RISE = Schedule("warmup_linear", warmup_steps=60)
TINY = TransformerConfig(
    num_layers=2, width=16, heads=2, head_size=8, text_len=4, text_vocab=9, grid=4, image_vocab=11, pattern="full",
    remat="full", scan=True, precision="fp16-paper",
)  # fmt: skip


def tokens(index, batch=8, config=TINY):
    rng = np.random.default_rng(index)
    text = np.stack([config.layout.caption_ids(rng.integers(config.text_vocab, size=2)) for _ in range(batch)])
    return {"text": text, "image": rng.integers(config.image_vocab, size=(batch, config.grid**2)).astype(np.int32)}


def loss_of(model, params, batch, scales=None):
    logits = model.apply(params, batch["text"], batch["image"], scales)
    text, image = token_losses(*logits, batch["text"], batch["image"])
    return text + image


def task_of(precision):
    model = transformer.model(dataclasses.replace(TINY, precision=precision))

    def loss(params, frozen, batch, *, key, step, scales=None):
        del frozen, key, step
        return loss_of(model, params, batch, scales), {}

    return Task("transformer", model, loss)


def step_of(precision, mesh, *, moments="fp32", **options) -> TrainStep:
    """The update with AdamW. options: of TrainStep."""
    values = Optimizer(b2=0.96, learning_rate=8e-3, weight_decay=4.5e-2, clip_norm=1.0, moments=moments, schedule=RISE)
    task = task_of(precision)
    return TrainStep(task, build_optimizer(values, steps=100, axes=task.model.axes), mesh, **options)


@functools.cache
def plain_step(precision, *, on_mesh=False) -> TrainStep:
    sizes, devices = ({"replica": 2, "fsdp": 4}, 8) if on_mesh else ({}, 1)
    return step_of(precision, make_mesh(sizes, devices=jax.devices()[:devices]))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
