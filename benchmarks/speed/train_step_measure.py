"""Measures the training update of one variant of a config on the devices that are here; `train_step.py` calls it.

    python -m benchmarks.speed.train_step_measure \
        '{"config": "configs/transformer.py:demo", "values": {}, "seconds": 5}'

The step is the training's own (`preflight/job.py` on real devices), on made-up images and captions. Printed are READY
when the devices are there, then the figures as a line of JSON. For the time of single operations take a trace
(`dalle-jax train --profile 100:105`).
"""

import dataclasses
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.speed import chips
from benchmarks.speed.train_step import READY
from dalle_jax import sharding
from dalle_jax.cli import host_memory
from dalle_jax.cli.preflight import image_tokenizers
from dalle_jax.models import build
from dalle_jax.models.layers import compute_dtype
from dalle_jax.preflight import roofline
from dalle_jax.preflight.hardware import Chip
from dalle_jax.preflight.job import Job, shard_bytes
from dalle_jax.preflight.topology import Topology
from dalle_jax.train.settings import TrainSettings, load_settings

MIN_TIMES, MAX_TIMES = 3, 50
MATMUL_SIDE = {"cpu": 1_536}  # of the product that says what the device reaches; 8192 elsewhere


def main() -> None:
    host_memory.keep_freed()
    asked = json.loads(sys.argv[1])
    wanted, found = asked.pop("platform", ""), jax.default_backend()
    if wanted and found != wanted:
        sys.exit(f"expected JAX to find a {wanted}, got {found}: install what JAX needs for it")
    print(READY, flush=True)
    overrides = [f"--config.{key}={value}" for key, value in asked.pop("values").items()]
    settings = load_settings(asked.pop("config"), overrides)
    print(json.dumps(measure(settings, **asked)), flush=True)


def measure(settings: TrainSettings, *, seconds: float, dvae: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All figures of one variant. seconds: to time it for. dvae: other sizes of the frozen dVAE."""
    devices = tuple(jax.devices())
    precision = settings.model.precision.partition("-")[0]
    known = chips.of_device(devices[0])
    chip = known or Chip("unknown", "gpu", 0, {}, 0.0, 0.0)
    job = Job(settings, Topology(chip, (1, len(devices))), devices, image_tokenizers=image_tokenizers())
    if dvae and job.image_tokenizer is not None:
        change_dvae(job, dvae)
    update = Update(job)
    whole, peak = update.time(seconds), peak_bytes()
    matmul, copy = matmul_flops(compute_dtype(settings.model.precision)), copy_bandwidth()
    chip = known or Chip("measured", "gpu", 0, {precision: matmul}, copy, copy)
    rated = dataclasses.replace(job, topology=Topology(chip, (1, len(devices))))
    vars(rated)["image_tokenizer"] = job.image_tokenizer
    guess = roofline.estimate(rated, [])
    sequences = settings.batch_size / len(devices)
    least = {
        "compute": guess.seconds["compute"] * roofline.COMPUTE_SHARE,
        "memory": guess.seconds["memory"] * roofline.MEMORY_SHARE,
    }
    figures = {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "host": f"{harness.cores()} CPU cores ({platform.machine()})",
        "chip": known and known.name,
        "peak_flops": chip.peak_flops[precision],
        "matmul_flops": matmul,
        "copy_bytes_per_second": copy,
        "parameters": job.task.model.num_params,
        "batch_size": settings.batch_size,
        "compile_seconds": update.compile_seconds,
        "step_seconds": whole,
        "tokens_per_second": guess.tokens / whole,
        "model_flops_per_device": rated.work.model_flops * sequences,
        "executed_flops_per_device": rated.work.executed_flops * sequences,
        "roofline_seconds": least,
        "host_seconds": update.host_seconds,
        "memory_bytes": update.memory_bytes,
        "peak_bytes": peak,
    }
    return figures


class Update:
    """The compiled step with its arguments, and what the compiler says it needs."""

    def __init__(self, job: Job):
        self.job = job
        began = time.monotonic()
        self._program = job.lower().compile()
        self.compile_seconds = time.monotonic() - began
        found = self._program.memory_analysis()
        held = shard_bytes([job.state, job.frozen, job.batch])
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        arguments = max(held, found.argument_size_in_bytes)
        self.memory_bytes = arguments + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes
        self.state = job.step.init(jax.random.key(0))
        if job.image_tokenizer is not None:
            frozen = jax.jit(job.image_tokenizer.init, out_shardings=sharding.replicated(job.mesh))
            self.frozen = {"image_tokenizer": frozen(jax.random.key(1))}
        else:
            self.frozen = {}
        self._made = made_up(job)
        self.batch = sharding.shard_batch(self._made, job.mesh)
        self.key = jax.random.key(2)

    def __call__(self) -> Any:
        self.state, measured = self._program(self.state, self.frozen, self.batch, self.key)
        return measured

    def time(self, seconds: float) -> float:
        """Of one update, as the loop makes them: the next is dispatched before this one is waited for."""
        jax.block_until_ready([self() for _ in range(2)])
        began = time.perf_counter()
        jax.block_until_ready(self())
        once = time.perf_counter() - began
        count = int(np.clip(seconds / 3 / once, 1, MAX_TIMES))
        found = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(count):
                measured = self()
            jax.block_until_ready((measured, self.state))
            found.append((time.perf_counter() - began) / count)
        copies = []
        for _ in range(MIN_TIMES):
            began = time.perf_counter()
            jax.block_until_ready(sharding.shard_batch(self._made, self.job.mesh))
            copies.append(time.perf_counter() - began)
        self.host_seconds = statistics.median(copies)
        return statistics.median(found)


def change_dvae(job: Job, sizes: Mapping[str, Any]) -> None:
    """Gives a new job a frozen dVAE of other sizes."""
    vars(job)["image_tokenizer"] = build("dvae", {**dataclasses.asdict(job.image_tokenizer.config), **sizes})


def made_up(job: Job) -> dict[str, np.ndarray]:
    """A batch of random pictures, and captions that are half as long as they may be."""
    rng, arrays = np.random.default_rng(0), {}
    for name, a in job.batch.items():
        if name == "image":
            arrays[name] = rng.integers(256, size=a.shape, dtype=np.uint8)
        else:
            layout = job.task.model.config.layout
            captions = rng.integers(layout.text_vocab, size=(a.shape[0], layout.caption_len // 2))
            arrays[name] = np.stack([layout.caption_ids(row) for row in captions])
    return arrays


def peak_bytes() -> int:
    """The most that was ever in use: of the device's memory, or where it does not say, of this process's."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_flops(dtype) -> float:
    """FLOP/s of one large square product, the best of a few."""
    side = MATMUL_SIDE.get(jax.default_backend(), 8_192)
    a = jnp.ones((side, side), dtype)
    return 2 * side**3 / _best(jax.jit(lambda a: a @ a), a)


def copy_bandwidth() -> float:
    """Bytes per second read and written by the best of a few additions of 256 MB."""
    x = jnp.ones(2**26, jnp.float32)
    return 2 * x.nbytes / _best(jax.jit(lambda x: x + 1.0), x)


def _best(program, x) -> float:
    jax.block_until_ready(program(x))
    found = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(program(x))
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
