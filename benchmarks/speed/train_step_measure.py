"""Measures the training update of one variant of a config on the devices that are here; `train_step.py` calls it.

    python -m benchmarks.speed.train_step_measure \
        '{"config": "configs/transformer.py:demo", "values": {}, "seconds": 5}'

The step is the training's own (`preflight/job.py` on real devices), on made-up images and captions. Printed are READY
when the devices are there, then the figures as a line of JSON. For the time of single operations take a trace
(`dalle-jax train --profile 100:105`).
"""

import dataclasses
import functools
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
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.layers import compute_dtype
from dalle_jax.preflight import roofline
from dalle_jax.preflight.hardware import Chip
from dalle_jax.preflight.job import Job, shard_bytes
from dalle_jax.preflight.topology import Topology
from dalle_jax.train.settings import TrainSettings, load_settings

REPEATS, MAX_TIMES = 3, 50
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
    precision, device = settings.model.precision.partition("-")[0], jax.devices()[0]
    known = chips.of_device(device)
    job = job_of(settings, known or Chip("unknown", "gpu", 0, {}, 0.0, 0.0), dvae or {})
    timed = update(job, seconds)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    matmul, copy = matmul_flops(compute_dtype(settings.model.precision)), copy_bandwidth()
    chip = known or Chip("measured", "gpu", 0, {precision: matmul}, copy, copy)
    rated = dataclasses.replace(job, topology=dataclasses.replace(job.topology, chip=chip))
    guess, sequences = roofline.estimate(rated, []), settings.batch_size / len(job.devices)
    shares = {"compute": roofline.COMPUTE_SHARE, "memory": roofline.MEMORY_SHARE}
    return timed | {
        "device": f"{len(job.devices)} x {device.device_kind}",
        "host": f"{harness.cores()} CPU cores ({platform.machine()})",
        "chip": known and known.name,
        "peak_flops": chip.peak_flops[precision],
        "matmul_flops": matmul,
        "copy_bytes_per_second": copy,
        "batch_size": settings.batch_size,
        "tokens_per_second": guess.tokens / timed["step_seconds"],
        "model_flops_per_device": rated.work.model_flops * sequences,
        "executed_flops_per_device": rated.work.executed_flops * sequences,
        "roofline_seconds": {name: guess.seconds[name] * share for name, share in shares.items()},
        # The largest amount ever in use: of the device's memory, or where it does not say, of this process's.
        "peak_bytes": peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def job_of(settings: TrainSettings, chip: Chip, dvae: Mapping[str, Any]) -> Job:
    """The training on all devices that are here. dvae: other sizes of the frozen dVAE."""
    devices = tuple(jax.devices())
    known = (sizes for sizes in image_tokenizers() if isinstance(sizes, DVAEConfig))
    tokenizers = tuple(dataclasses.replace(sizes, **dvae) for sizes in known)
    return Job(settings, Topology(chip, (1, len(devices))), devices, image_tokenizers=tokenizers)


def update(job: Job, seconds: float) -> dict[str, float]:
    """Times the compiled step for so long, and says what the compiler needs for it."""
    began = time.monotonic()
    program = job.lower().compile()
    compile_seconds, found = time.monotonic() - began, program.memory_analysis()
    held = max(shard_bytes([job.state, job.frozen, job.batch]), found.argument_size_in_bytes)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    state, frozen = job.step.init(jax.random.key(0)), {}
    if job.image_tokenizer is not None:
        new = jax.jit(job.image_tokenizer.init, out_shardings=sharding.replicated(job.mesh))
        frozen = {"image_tokenizer": new(jax.random.key(1))}
    batch, key = sharding.shard_batch(made_up(job), job.mesh), jax.random.key(2)

    def updates(count: int) -> Any:
        """As the loop makes them: the next is dispatched before this one is waited for."""
        nonlocal state
        for _ in range(count):
            state, measured = program(state, frozen, batch, key)
        return state, measured

    harness.seconds(lambda: updates(2))
    count = int(np.clip(seconds / REPEATS / harness.seconds(lambda: updates(1)), 1, MAX_TIMES))
    return {
        "compile_seconds": compile_seconds,
        "step_seconds": statistics.median(harness.seconds(lambda: updates(count)) for _ in range(REPEATS)) / count,
        "memory_bytes": held + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
    }


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


def matmul_flops(dtype) -> float:
    """FLOP/s of one large square product, the best of a few."""
    side = MATMUL_SIDE.get(jax.default_backend(), 8_192)
    return 2 * side**3 / _best(lambda a: a @ a, jnp.ones((side, side), dtype))


def copy_bandwidth() -> float:
    """Bytes per second read and written by the best of a few additions of 256 MB."""
    x = jnp.ones(2**26, jnp.float32)
    return 2 * x.nbytes / _best(lambda x: x + 1.0, x)


def _best(function, x) -> float:
    return min(harness.seconds(functools.partial(jax.jit(function), x)) for _ in range(6))  # the first compiles


if __name__ == "__main__":
    main()
