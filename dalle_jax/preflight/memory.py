"""Bytes of one chip by kind, without compiling: what the job holds, and what its step needs on top.

The training state is exact, from the shardings it trains with. Gradients, activations and temporaries are a formula
of what is there at the fullest moment, the backward pass of the last layers, without the compiler's padding. Some of
its constants are fitted to compilers; the tests hold the sum to 15 % of what the compiler needs. It only ranks
candidates and explains a verdict, which is always the compiler's. Compression adds the error that it carries, and
nothing on top: it works on one matrix after another, in what the backward pass has left free by then.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dalle_jax.models.layers import compute_dtype, stream_dtype
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight.job import Job, shard_bytes
from dalle_jax.sample.engine import weight_bytes, widest_mesh
from dalle_jax.sharding import TENSOR

# Numbers of the width that the backward pass finds saved, per token and layer, by `model.remat`. 'full': the stream as
# it goes into attention and into the MLP. 'dots': also q, k, v, the hidden layer and both results. 'attention': also
# what lies between, but no scores. 'none' adds the scores, below, where they are arrays: a fused kernel keeps none.
SAVED = {"full": 2, "dots": 2 + 3 + 4 + 2, "attention": 2 + 2 + 3 + 1 + 3 * 4 + 2, "none": 2 + 2 + 3 + 1 + 3 * 4 + 2}
HELD = ("parameters", "optimizer", "ema", "frozen", "compression", "memory")  # kinds of bytes that stay between steps
WORKING = 16  # numbers of the width per token of the layer at work, with its gradients
SCORE_COPIES = 2  # of a layer's scores in float32, and what a layer without remat saves of them


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The memory of the scan over layers, as one compiler lays it out.

    saved_copies: how often what the scan saves is there. parameter_copies: copies of the parameters in the compute
    dtype. whole_layers: layers whose weights are there uncut. prefetches: with the launchers' flags, a scan over cut
    layers gathers and works for two turns at once, so the next turn's weights and a third copy of the scores are there.
    """

    saved_copies: int
    parameter_copies: int
    whole_layers: int
    prefetches: bool


# Fitted to the temporaries of 12b: libtpu 0.0.42 on v4, v5p and v6e with 1, 2 and 4 sequences a chip (0.0.52, which jax
# 0.10 does not ask for, saves twice as much), XLA of jax 0.10.2 for H100 with 1, 4 and 16, launchers' flags on and off.
FITTED = {"tpu": Fitted(3, 1, 2, prefetches=False), "gpu": Fitted(1, 2, 1, prefetches=True)}


def by_kind(job: Job) -> dict[str, int]:
    """Bytes by kind: parameters, optimizer, ema, frozen, compression (if gradients are compressed), memory (if the task
    has one), gradients, activations, temporaries."""
    state, settings = job.state, job.settings
    held = {
        "parameters": shard_bytes(state["params"]),
        "optimizer": shard_bytes(state["opt_state"]),
        "ema": shard_bytes(state["ema"]) - job.average_bytes_taken_off,
        "frozen": shard_bytes(job.frozen),
        **({"compression": shard_bytes(state["error"])} if "error" in state else {}),
        **({"memory": shard_bytes(state["memory"])} if "memory" in state else {}),
    }
    item = compute_dtype(settings.model.precision)(0).dtype.itemsize
    numbers = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state["params"]))
    compute = numbers * item  # the parameters, or their gradients, in the compute dtype
    gradients = compute + (2 * held["parameters"] if settings.accumulate > 1 else 0)
    # No scan over layers: the results of all products. Fitted to configs/dvae.py:paper by libtpu 0.0.42 on v5p, with 8
    # images a chip: 8.1 GB with a residual stream of bfloat16 and 12.6 with one of float32.
    if results := job.work.result_bytes:
        activations, working = job.sequences * sum(results), job.sequences * 2 * max(results)
        return {**held, "gradients": gradients, "activations": activations, "temporaries": working}
    model, platform = job.task.model.config, job.topology.chip.platform
    fitted = FITTED[platform]
    activations = fitted.saved_copies * job.sequences * _saved(model, job.work.scores, item) // job.mesh.shape["tensor"]
    copies = fitted.parameter_copies * compute
    if platform == "gpu" and model.scan_length < 2:
        # Without a loop gradients and copies lie where the backward pass has used what was saved, or the other way
        # round: only the larger of both counts. Fitted to 5 layers of 12b and to 1b3 on 1 and 8 H100.
        if activations > copies + compute:
            copies, gradients = 0, gradients - compute
        else:
            activations = 0
    prefetches = fitted.prefetches and job.mesh.shape["fsdp"] > 1 and model.scan_length > 1
    whole = _whole(model, item, job, layers=fitted.whole_layers + (model.period if prefetches else 0))
    working = _working(model, item, job, score_copies=SCORE_COPIES + prefetches)
    temporaries = copies + whole + job.sequences * working
    return {**held, "gradients": gradients, "activations": activations, "temporaries": temporaries}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Samples that are drawn between steps, by the first process: bytes on each of its devices.

    weights: of the model that draws, cut over `devices`. held: by the training, its state and frozen models. fits: both
    are within what a program may use; what is left decides how many images are drawn at a time. Where they do not fit,
    the training says so and goes on without samples.
    """

    weights: int
    devices: int
    held: int
    fits: bool


def sampling(job: Job) -> Sampling | None:
    """None for a training that draws no samples."""
    evaluate, model = job.settings.run.evaluate, job.task.model
    if evaluate is None or not (job.settings.run.picture_every or evaluate.every):
        return None
    mesh = widest_mesh(model.config.heads, job.first_devices)
    weights = weight_bytes(model, mesh)
    kinds = by_kind(job)
    held = sum(kinds[kind] for kind in HELD if kind in kinds)
    return Sampling(weights, mesh.shape[TENSOR], held, held + weights <= job.topology.usable_bytes)


def total(job: Job) -> int:
    """Bytes of all kinds together."""
    return sum(by_kind(job).values())


def _saved(model: TransformerConfig, scores: int, item: int) -> int:
    """Bytes that the backward pass finds saved of one sequence."""
    stream = 2 * (jnp.dtype(stream_dtype(model.precision)).itemsize - item)  # more than in the compute dtype
    saved = model.num_layers * model.layout.length * model.width * (item * SAVED[model.remat] + stream)
    return saved + (scores * (4 + item) * SCORE_COPIES // 2 if model.remat == "none" else 0)


def _whole(model: TransformerConfig, item: int, job: Job, *, layers: int) -> int:
    """Bytes of weights and gradients that are there uncut: of some layers, and of the tables and output heads."""
    tensor, layout = job.mesh.shape["tensor"], model.layout
    tables = (layout.text_ids + layout.image_ids) * model.width * 4 // tensor
    return tables + (layers * (12 * model.width**2 // tensor) * item if job.mesh.shape["fsdp"] > 1 else 0)


def _working(model: TransformerConfig, item: int, job: Job, *, score_copies: int) -> int:
    """Bytes of one sequence in the layer at work: activations and scores with their gradients, or the logits."""
    layout, tensor = model.layout, job.mesh.shape["tensor"]
    scores = max(_scores(model, kind) for kind in set(model.kinds)) // tensor if model.attention == "xla" else 0
    layer = WORKING * layout.length * model.width * item + score_copies * 4 * scores
    return max(layer, 3 * 4 * layout.logits // tensor)


def _scores(model: TransformerConfig, kind: str) -> int:
    """Scores of a layer as it computes them: image queries against all text and the keys of their block."""
    grid, text = model.grid, model.text_len
    keys = {"row": 2 * grid, "column": grid, "conv": 14 * grid, "full": grid * grid}[kind]
    return model.heads * (text * text + grid * grid * (text + keys))
