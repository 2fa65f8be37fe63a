"""Bytes of one chip by kind, without compiling: what the job holds, and what its update needs on top.

The training state is exact, from the shardings it trains with. Gradients, activations and temporaries are a formula
of what is there at the fullest moment, the backward pass of the last layers, without the compiler's padding; the
tests hold it to 15 % of what the compiler needs. Compression adds what it has left out, which is held, and nothing
on top: it works on one matrix after another, in what the backward pass has left free by then.
"""

import math

import jax
import jax.numpy as jnp

from dalle_jax.models.layers import compute_dtype, stream_dtype
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight import flops
from dalle_jax.preflight.job import Job, shard_bytes

# Numbers of the width that the backward pass finds saved, per token and layer, by `model.remat`. 'full': the stream as
# it goes into attention and into the MLP. 'dots': also q, k, v, the hidden layer and both results. 'attention': also
# what lies between, but no scores. 'none' adds the scores, below, where they are arrays: a fused kernel keeps none.
SAVED = {"full": 2, "dots": 2 + 3 + 4 + 2, "attention": 2 + 2 + 3 + 1 + 3 * 4 + 2, "none": 2 + 2 + 3 + 1 + 3 * 4 + 2}
# Fitted to the compilers' temporaries of 12b (libtpu 0.0.42 on v4, v5p and v6e with 1, 2 and 4 sequences a chip, XLA of
# jax 0.10.2 for H100 with 1, 4 and 16): how often what a scan saves is there (twice by libtpu 0.0.52, which jax 0.10
# does not ask for), copies of the parameters in the compute dtype, and layers whose weights are there uncut.
SAVED_COPIES = {"tpu": 3, "gpu": 1}
PARAMETER_COPIES = {"tpu": 1, "gpu": 2}
WHOLE_LAYERS = {"tpu": 2, "gpu": 1}
SCORE_COPIES = 2  # of a layer's scores in float32, and what a layer without remat saves of them
# The launchers' flags for GPUs let a scan over cut layers gather and work for two turns at once: the weights of the
# next turn are there too, and scores once more. Fitted to 64 H100 with 4 and 16 sequences each, flags on and off.
PIPELINED_SCORES = 1
WORKING = 16  # numbers of the width per token of the layer at work, with its gradients


def by_kind(job: Job) -> dict[str, int]:
    """Bytes by kind: parameters, optimizer, ema, frozen, compression (what it has left out, where there is any),
    gradients, activations, temporaries."""
    state = job.state
    held = {
        "parameters": shard_bytes(state["params"]),
        "optimizer": shard_bytes(state["opt_state"]),
        "ema": shard_bytes(state["ema"]) - job.average_bytes_taken_off,
        "frozen": shard_bytes(job.frozen),
        **({"compression": shard_bytes(state["error"])} if "error" in state else {}),
    }
    item = compute_dtype(job.config.model.precision)(0).dtype.itemsize
    numbers = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state["params"]))
    compute = numbers * item  # the parameters, or their gradients, in the compute dtype
    gradients = compute + (2 * held["parameters"] if job.config.accumulate > 1 else 0)
    if job.helper is None:
        activations, working = _traced(job)
    else:
        model = job.task.model.config
        platform = job.topology.chip.platform
        activations = SAVED_COPIES[platform] * job.sequences * _saved(model, item) // job.mesh.shape["tensor"]
        copies = PARAMETER_COPIES[platform] * compute
        if platform == "gpu" and model.scan_length < 2:
            # Without a loop gradients and copies lie where the backward pass has used what was saved, or the other way
            # round: only the larger of both counts. Fitted to 5 layers of 12b and to 1b3 on 1 and 8 H100.
            if activations > copies + compute:
                copies, gradients = 0, gradients - compute
            else:
                activations = 0
        working = copies + _whole(model, item, job) + job.sequences * _working(model, item, job)
    return {**held, "gradients": gradients, "activations": activations, "temporaries": working}


def total(job: Job) -> int:
    """Of all kinds together."""
    return sum(by_kind(job).values())


def _saved(model: TransformerConfig, item: int) -> int:
    """Of one sequence."""
    stream = 2 * (jnp.dtype(stream_dtype(model.precision)).itemsize - item)  # more than in the compute dtype
    saved = model.num_layers * model.layout.length * model.width * (item * SAVED[model.remat] + stream)
    if model.remat == "none" and model.attention == "xla":
        saved += flops.attention(model) // (4 * model.head_size) * (4 + item) * SCORE_COPIES // 2
    return saved


def _whole(model: TransformerConfig, item: int, job: Job) -> int:
    """Weights and gradients that are there uncut: of a few layers, and of the tables and output heads."""
    mesh, platform = job.mesh, job.topology.chip.platform
    layer = 12 * model.width**2 // mesh.shape["tensor"]
    layout = model.layout
    tables = (layout.text_ids + layout.image_ids) * model.width * 4 // mesh.shape["tensor"]
    if mesh.shape["fsdp"] == 1:
        return tables
    layers = WHOLE_LAYERS[platform] + (model.period if _pipelined(model, job) else 0)
    return layers * layer * item + tables


def _working(model: TransformerConfig, item: int, job: Job) -> int:
    """Of one sequence in the layer at work: its wide activations and scores with their gradients, or the logits."""
    layout, tensor = model.layout, job.mesh.shape["tensor"]
    scores = 0
    if model.attention == "xla":
        scores = max(_scores(model, kind) for kind in set(model.kinds)) // tensor
    copies = SCORE_COPIES + (PIPELINED_SCORES if _pipelined(model, job) else 0)
    layer = WORKING * layout.length * model.width * item + copies * 4 * scores
    logits = 3 * 4 * layout.logits
    return max(layer, logits // tensor)


def _pipelined(model: TransformerConfig, job: Job) -> bool:
    return job.topology.chip.platform == "gpu" and job.mesh.shape["fsdp"] > 1 and model.scan_length > 1


def _scores(model: TransformerConfig, kind: str) -> int:
    """Scores of a layer as it computes them: image queries against all text and their block's own keys."""
    grid, text = model.grid, model.text_len
    keys = {"row": 2 * grid, "column": grid, "conv": 14 * grid, "full": grid * grid}[kind]
    return model.heads * (text * text + grid * grid * (text + keys))


def _traced(job: Job) -> tuple[int, int]:
    """For a model without a scan over layers: results of all products and what is computed from them, and of one."""
    results = flops.products(job.loss, job.task.model.abstract, job.example)
    sizes = [math.prod(r.shape) * r.dtype.itemsize for r in results]
    return job.sequences * 2 * sum(sizes), job.sequences * 2 * max(sizes)
