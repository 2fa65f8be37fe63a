"""The time of a step, by a roofline: that of the slowest of four resources, the others hidden behind it.

Each resource runs at the share of its peak that good programs reach:

    compute    matrix products and convolutions, with what rematerialization and the frozen image tokenizer add
    memory     gathered weights, activations, attention scores and the optimizer's arrays, read and written
    inside     bytes that a chip receives from its own slice (TPU) or NVLink domain
    outside    bytes that it receives from others
"""

import dataclasses
from collections.abc import Mapping, Sequence

from dalle_jax.models.layers import compute_dtype
from dalle_jax.preflight.collectives import Collective
from dalle_jax.preflight.job import Job, shard_bytes

# Large matrix products reach about 0.7 to 0.8 of the peak on H100, H200 and TPU, copies 0.9 of the memory's, rings 0.8
# of the links'.
COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.7, 0.85, 0.8
SCORE_BYTES = 26  # memory traffic of one attention score, forward and backward, where scores are arrays
TOKEN_BYTES = 2 * 34 * 3  # of one token, layer and unit of width: 34 numbers of two bytes, three times there and back
RESULT_TRIPS = 6  # of a convolution's result to memory and back, forward and backward
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step of the whole job.

    seconds: by resource. tokens: of one step, all chips. steps: of the whole training.
    """

    seconds: Mapping[str, float]
    tokens: int
    steps: int

    @property
    def binding(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

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
    """The roofline of a job. found: the compiled program's collectives, or `expected`."""
    chip, settings, work = job.topology.chip, job.settings, job.work
    sequences = job.sequences * settings.accumulate  # of one chip and step
    peak = chip.peak_flops[settings.model.precision.partition("-")[0]]
    seconds = {
        "compute": work.executed_flops * sequences / job.mesh.shape["tensor"] / (peak * COMPUTE_SHARE),
        "memory": _memory_traffic(job) / (chip.memory_bandwidth * MEMORY_SHARE),
    }
    inside = sum(c.bytes for c in found if c.inside)
    outside = sum(c.bytes for c in found if not c.inside)
    if inside:
        seconds["inside"] = inside / (chip.inside_bandwidth * LINK_SHARE)
    if outside:
        seconds["outside"] = outside / (chip.outside_bandwidth * LINK_SHARE)
    return Estimate(seconds, work.tokens * settings.batch_size, settings.run.steps)


def expected(job: Job) -> list[Collective]:
    """The exchanges that a mesh makes necessary in a step, to rank layouts before any of them is compiled.

    For each microbatch weights are gathered forward and backward, gradients are reduced along fsdp and then along
    replica (compressed ones once a step). A tensor axis sums two results of each layer, forward, backward and where
    they are computed again.
    """
    (replica, fsdp, tensor), slice_size = job.mesh.devices.shape, job.topology.slice_size
    model, times = job.task.model, job.settings.accumulate
    item = compute_dtype(job.settings.model.precision)(0).dtype.itemsize
    weights = model.num_params * item // tensor
    amounts = {
        ("all-gather", "fsdp", fsdp): 2 * weights,
        ("reduce-scatter", "fsdp", fsdp): weights,
        ("all-reduce", "replica", replica): 2 * job.across_replicas[0],
    }
    if not job.work.result_bytes:
        passes = 3 if model.config.remat == "full" else 2
        sums = 2 * passes * 2 * model.config.num_layers * job.sequences
        amounts["all-reduce", "tensor", tensor] = sums * job.work.tokens * model.config.width * item
    inside = {
        "tensor": tensor <= slice_size,
        "fsdp": fsdp * tensor <= slice_size,
        "replica": job.topology.count == slice_size,
    }
    counts = {"tensor": times, "fsdp": times, "replica": 1 if job.settings.compression.rank else times}
    return [
        Collective(kind, axis, inside=inside[axis], count=counts[axis], bytes=counts[axis] * size * (ways - 1) // ways)
        for (kind, axis, ways), size in amounts.items()
    ]


def _memory_traffic(job: Job) -> float:
    """Bytes that one chip reads and writes in a step."""
    model, work = job.task.model, job.work
    sequences = job.sequences * job.settings.accumulate / job.mesh.shape["tensor"]
    traffic = 2 * shard_bytes(job.state) + 2 * shard_bytes(job.state["params"])  # state and gradients, in and out
    if work.result_bytes:
        return traffic + sequences * RESULT_TRIPS * sum(work.result_bytes)
    passes = 2 if model.config.remat == "none" else 3  # over the weights, each gathered and read
    weights = passes * 2 * 2 * model.num_params / job.mesh.shape["tensor"] * job.settings.accumulate
    tokens = TOKEN_BYTES * model.config.num_layers * work.tokens * model.config.width
    return traffic + weights + sequences * (SCORE_BYTES * work.scores + tokens)
