"""How long an update takes, as a roofline: the slowest of four resources, each at the share of its peak that good
programs reach, everything else hidden behind it.

    compute    matrix products and convolutions, with what rematerialization and the frozen dVAE add
    memory     gathered weights, activations, attention scores and the optimizer's arrays, read and written
    inside     bytes that the collectives inside an island bring to a chip
    outside    bytes that arrive from other islands
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from dalle_jax.models import Model
from dalle_jax.models.dvae import encode_images
from dalle_jax.models.layers import compute_dtype
from dalle_jax.preflight import flops
from dalle_jax.preflight.collectives import Collective
from dalle_jax.preflight.job import Job, shard_bytes

# Large matrix products reach about 0.7 to 0.8 of the peak on H100, H200 and TPU; copies 0.9 of the memory's; rings 0.8
# of the links'.
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.7, 0.85, 0.8
SCORE_BYTES = 26  # memory traffic of one attention score, forward and backward, where scores are arrays
TOKEN_BYTES = 2 * 34 * 3  # of one token, layer and unit of width: 34 numbers of two bytes, three times to and fro
RESULT_TRIPS = 6  # of a convolution's result to memory and back, forward and backward
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one update of the whole job.

    seconds: by resource. flops_per_sequence: the model's own, forward and backward, by the rule in `flops.py`.
    executed_flops_per_sequence: with recomputation and the frozen helper. tokens: of one update, all chips.
    """

    seconds: Mapping[str, float]
    flops_per_sequence: int
    executed_flops_per_sequence: int
    tokens: int
    steps: int

    @property
    def binding(self) -> str:
        return max(self.seconds, key=self.seconds.get)

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / SECONDS_PER_DAY


def estimate(job: Job, found: Sequence[Collective]) -> Estimate:
    """found: the compiled program's collectives, or `expected`."""
    chip, config = job.topology.chip, job.config
    model_flops, executed, tokens, traffic = _work(job)
    sequences = job.sequences * config.accumulate  # of one chip and update
    tensor = job.mesh.shape["tensor"]
    peak = chip.peak_flops[config.model.precision.partition("-")[0]]
    seconds = {
        "compute": executed * sequences / tensor / (peak * COMPUTE_SHARE),
        "memory": traffic / (chip.memory_bandwidth * MEMORY_SHARE),
    }
    inside = sum(c.bytes for c in found if c.inside)
    outside = sum(c.bytes for c in found if not c.inside)
    if inside:
        seconds["inside"] = inside / (chip.inside_bandwidth * LINK_SHARE)
    if outside:
        seconds["outside"] = outside / (chip.outside_bandwidth * LINK_SHARE)
    return Estimate(seconds, model_flops, executed, tokens * config.batch_size, config.steps)


def expected(job: Job) -> list[Collective]:
    """The bytes that an update must exchange by its mesh alone, to rank layouts before any of them is compiled.

    For each microbatch weights are gathered forward and backward, gradients are reduced along fsdp, and what is left
    of them along replica, but once an update where they are compressed; a tensor axis sums two results of each layer,
    forward and backward and computed again.
    """
    (replica, fsdp, tensor), island = job.mesh.devices.shape, job.topology.island
    model, times = job.task.model, job.config.accumulate
    item = compute_dtype(job.config.model.precision)(0).dtype.itemsize
    weights = model.num_params * item // tensor
    amounts = {
        ("all-gather", "fsdp", fsdp): 2 * weights,
        ("reduce-scatter", "fsdp", fsdp): weights,
        ("all-reduce", "replica", replica): 2 * job.across_replicas[0],
    }
    if job.helper is not None:
        passes = 3 if model.config.remat == "full" else 2
        sums = 2 * passes * 2 * model.config.num_layers * job.sequences
        amounts["all-reduce", "tensor", tensor] = sums * model.config.layout.length * model.config.width * item
    inside = {"tensor": tensor <= island, "fsdp": fsdp * tensor <= island, "replica": job.topology.count == island}
    counts = {"tensor": times, "fsdp": times, "replica": 1 if job.config.compression.rank else times}
    return [
        Collective(kind, axis, inside=inside[axis], count=counts[axis], bytes=counts[axis] * size * (ways - 1) // ways)
        for (kind, axis, ways), size in amounts.items()
    ]


def _work(job: Job) -> tuple[int, int, int, float]:
    """FLOPs of a sequence, those executed, its tokens, and bytes of memory traffic of one chip and update."""
    model, tensor = job.task.model.config, job.mesh.shape["tensor"]
    sequences = job.sequences * job.config.accumulate / tensor
    state = 2 * shard_bytes(job.state) + 2 * shard_bytes(job.state["params"])  # read and written; and the gradients
    if job.helper is None:
        products = flops.TRAINING_PASSES * flops.traced(job.loss, job.task.model.abstract, job.example)
        results = sum(r.size * r.dtype.itemsize for r in flops.products(job.loss, job.task.model.abstract, job.example))
        return products, products, model.grid**2, state + sequences * RESULT_TRIPS * results
    total = flops.transformer(model)
    executed = total + flops.recomputed(model) + _encode_flops(job)
    passes = 2 if model.remat == "none" else 3
    weights = passes * 2 * 2 * job.task.model.num_params / tensor * job.config.accumulate  # gathered, then read
    scores = SCORE_BYTES * flops.attention(model) / (4 * model.head_size) if model.attention == "xla" else 0
    tokens = TOKEN_BYTES * model.num_layers * model.layout.length * model.width
    return total, executed, model.layout.length, state + weights + sequences * (scores + tokens)


def _encode_flops(job: Job) -> int:
    """Of encoding one picture with the frozen dVAE; nothing where the data are codes."""
    return 0 if job.has_codes else _encode_flops_of(job.helper)


@functools.cache
def _encode_flops_of(dvae: Model) -> int:
    side = dvae.config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    return flops.traced(lambda params, image: encode_images(dvae, params, image), dvae.abstract, image)
