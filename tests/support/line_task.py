"""The smallest task that a run can train, and batches that depend on their number alone: for tests of the loop."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dalle_jax.checkpoint import reader
from dalle_jax.models.layers import Model, param
from dalle_jax.train import loop, run
from dalle_jax.train.monitor import metrics
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.settings import load_settings
from tests.support.toy_task import one_device

WIDTH, BATCH = 8, 8


class Line(nnx.Module):
    def __init__(self, rngs):
        self.matrix = param(rngs, (WIDTH, WIDTH), axes=("embed", "mlp"), std=0.3)
        self.gain = param(rngs, (WIDTH,), axes=("embed",), fill=1.0)

    def __call__(self, x):
        return (x * self.gain[...][None]) @ self.matrix[...]


MODEL = Model(types.SimpleNamespace(), Line)


def line_loss(params, frozen, batch, *, key, step):
    del frozen, key, step
    return jnp.square(MODEL.apply(params, batch["x"]) - 1.0).mean(), {}


LINE = Task("line", MODEL, line_loss)


class Numbers:
    """Batches that depend on their number alone; those in `poison` hold what makes every gradient not finite."""

    def __init__(self, poison=(), value=np.nan):
        self.position, self.poison, self.value, self.given = 0, poison, value, []

    def __next__(self):
        self.position += 1
        self.given.append(self.position)
        return self.batch(self.position)

    def batch(self, number):
        x = np.random.default_rng(number).normal(size=(BATCH, WIDTH)).astype(np.float32)
        if number in self.poison:
            x[0, 0] = self.value
        return {"x": x}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def line_settings(**values):
    """Settings of a run of LINE. values: of keys below `run`, `accumulate`, or a part, e.g. compression={"rank": 2}."""
    optimizer = {"name": "adamw", "learning_rate": 0.05, "b2": 0.9}
    schedule = {"name": "warmup_constant", "warmup_steps": 0, "end_learning_rate": 0.0}
    keys = {"batch_size": BATCH} | {f"optimizer.{key}": value for key, value in optimizer.items()}
    keys |= {f"optimizer.schedule.{key}": value for key, value in schedule.items()}
    defaults = {"steps": 12, "log_every": 4, "validate_every": None, "picture_every": None, "checkpoint_every": 4}
    for key, value in (defaults | {"rollback_after": 3} | values).items():
        name = key if key == "accumulate" else f"run.{key}"
        keys |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return load_settings("configs/dvae.py:demo").changed(keys)


def line_step(mesh=None, **options):
    """The `TrainStep` of LINE with the optimizer of `line_settings()`. mesh: default one device."""
    return dataclasses.replace(run.step_for(line_settings(), LINE, mesh or one_device()), **options)


def train(workdir, batches=None, *, mesh=None, task=LINE, of_loop=None, hooks=(), **values):
    """`loop.run` without a word. of_loop: more of its arguments. values: as those of `line_settings`."""
    settings = line_settings(**values)
    step = run.step_for(settings, task, mesh or one_device())
    options = {"batches": batches or Numbers(), "hooks": hooks, "progress": False, **(of_loop or {})}
    return loop.run(step, settings, workdir, **options)


def digest_of(workdir):
    """The digest of the state in a run's newest checkpoint."""
    return reader.state_digests(reader.checkpoint_path(workdir)[1])["state"]


def logged(workdir, name):
    """Step -> value of a metric in metrics.jsonl."""
    return {line["step"]: line[name] for line in metrics.read(workdir / "metrics.jsonl") if name in line}
