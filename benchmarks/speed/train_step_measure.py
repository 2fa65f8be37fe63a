"""Measures the training update of one variant of a config on the devices that are here; `train_step.py` calls it.

    python -m benchmarks.speed.train_step_measure \
        '{"config": "configs/transformer.py:demo", "values": {}, "seconds": 5}'

The update is the training's own (`preflight/job.py` on real devices), on made-up pictures and captions. Its parts are
timed as programs of their own, forward and backward, with what their remat step computes again: one layer of each
kind, and of it the MLP and the attention's scores, times the number of layers; the two heads with the loss; the
encoding of the pictures; all gradients. The optimizer, with the moving average, is the update without the gradients,
and the rest what the gradients take beyond their parts: embeddings, the stacking of layers, what is not overlapped.
A program alone may be faster or slower than the same inside the update, so the parts are a guide; the whole is exact.

Printed are READY when the devices are there, then the figures as a line of JSON, then the same with the parts: what
ends in its parts has given the whole.
"""

import dataclasses
import functools
import json
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.speed import chips
from benchmarks.speed.train_step import READY
from dalle_jax import config as configs
from dalle_jax import sharding
from dalle_jax.cli import host_memory
from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT
from dalle_jax.models import blocks, build
from dalle_jax.models.attention import kernels
from dalle_jax.models.dvae import encode_images
from dalle_jax.models.layers import compute_dtype, stream_dtype
from dalle_jax.preflight import roofline
from dalle_jax.preflight.hardware import Chip
from dalle_jax.preflight.job import Job, shard_bytes
from dalle_jax.preflight.topology import Topology
from dalle_jax.train import step as steps
from dalle_jax.train.objectives.transformer import token_losses

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
    config = configs.load(asked.pop("config"), overrides)
    for figures in measure(config, **asked):
        print(json.dumps(figures), flush=True)


def measure(
    config, *, seconds: float, split: bool = True, dvae: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """All figures of one variant but the parts, then with them.

    seconds: to time each program for. split: time the parts, of a transformer in fp32 or bf16. dvae: other sizes of the
    frozen dVAE.
    """
    devices = tuple(jax.devices())
    precision = config.precision.partition("-")[0]
    known = chips.of_device(devices[0])
    job = Job(config, Topology(known or Chip("unknown", "gpu", 0, {}, 0.0, 0.0), (1, len(devices))), devices)
    if dvae and job.helper is not None:
        change_dvae(job, dvae)
    update = Update(job)
    whole, peak = update.time(seconds), peak_bytes()
    matmul, copy = matmul_flops(compute_dtype(config.precision)), copy_bandwidth()
    chip = known or Chip("measured", "gpu", 0, {precision: matmul}, copy, copy)
    rated = dataclasses.replace(job, topology=Topology(chip, (1, len(devices))))
    vars(rated)["helper"] = job.helper
    guess = roofline.estimate(rated, [])
    sequences = config.batch_size / len(devices)
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
        "batch_size": config.batch_size,
        "compile_seconds": update.compile_seconds,
        "step_seconds": whole,
        "tokens_per_second": guess.tokens / whole,
        "model_flops_per_device": guess.flops_per_sequence * sequences,
        "executed_flops_per_device": guess.executed_flops_per_sequence * sequences,
        "roofline_seconds": least,
        "seconds": {"host": update.host_seconds},
        "memory_bytes": update.memory_bytes,
        "peak_bytes": peak,
    }
    yield figures
    if split and job.helper is not None and precision != "fp16":
        yield figures | {"seconds": Parts(update).time(seconds, whole=whole) | figures["seconds"]}


class Update:
    """The compiled update with its arguments, and what the compiler says it needs."""

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
        if job.helper is not None:
            frozen = jax.jit(job.helper.init, out_shardings=sharding.replicated(job.mesh))
            self.frozen = frozen(jax.random.key(1))
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


class Parts:
    """Parts of a transformer's update as programs of their own."""

    def __init__(self, update: Update):
        self._update, self._job = update, update.job
        self._config = update.job.task.model.config
        micro = update.job.config.batch_size // update.job.config.accumulate
        self._batch = sharding.shard_batch({n: a[:micro] for n, a in update._made.items()}, update.job.mesh)

    def time(self, seconds: float, *, whole: float) -> dict[str, float]:
        """Seconds of one update by part. whole: of all of it."""
        job, config, update = self._job, self._config, self._update
        params, frozen, batch, times = update.state["params"], update.frozen, self._batch, job.config.accumulate
        clock = functools.partial(self._clock, seconds=seconds)

        def loss(params, frozen, batch):
            return job.task.loss(params, frozen, batch, key=update.key, step=jnp.zeros([], jnp.int32))[0]

        gradients = times * clock(jax.value_and_grad(loss), params, frozen, batch)
        encode = times * clock(functools.partial(encode_images, job.helper), frozen, batch["image"])
        shape = len(batch["text"]), config.layout.length, config.width
        x = np.random.default_rng(3).normal(size=shape).astype(stream_dtype(config.precision))
        x_BSD = sharding.shard_batch({"x": x}, job.mesh)["x"]
        both = {name: params[name] for name in ("text_head", "image_head")}
        heads = times * clock(jax.value_and_grad(self._heads_loss, (0, 1)), both, x_BSD, params, batch["text"])
        counts = Counter(config.kinds)
        of_kind = {kind: clock(self._gradient(self._layer(kind)), params, x_BSD) for kind in counts}
        scores = {kind: clock(self._gradient_of_scores(kind), *self._qkv(x_BSD)) for kind in counts}
        mlp = times * config.num_layers * clock(self._gradient(self._mlp), params, x_BSD)
        layers = times * sum(of_kind[kind] * count for kind, count in counts.items())
        return {
            "encode": encode,
            "attention": layers - mlp,
            "scores": times * sum(scores[kind] * count for kind, count in counts.items()),
            "mlp": mlp,
            "heads": heads,
            "rest": gradients - encode - layers - heads,
            "optimizer": whole - gradients,
        }

    def _clock(self, function, *args, seconds: float) -> float:
        """Middle of the seconds of a call, compiled and warm."""

        def on_mesh(*args):
            with sharding.use(self._job.mesh):
                return function(*args)

        program = jax.jit(on_mesh, compiler_options=steps.COMPILER_OPTIONS.get(jax.default_backend()))
        jax.block_until_ready(program(*args))
        found, until = [], time.monotonic() + seconds / 3
        while len(found) < MIN_TIMES or (time.monotonic() < until and len(found) < MAX_TIMES):
            began = time.perf_counter()
            jax.block_until_ready(program(*args))
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def _gradient(self, part):
        """Of a scalar of part(block, x), for the parameters of one layer in the compute dtype and for x."""
        dtype, stream = compute_dtype(self._config.precision), stream_dtype(self._config.precision)

        def narrowed(name, array):
            return array if name.startswith("norm") else array.astype(stream if name.endswith("bias") else dtype)

        def call(params, x_BSD):
            block = {name: narrowed(name, array[0]) for name, array in params["blocks"].items()}
            y_BSD, pull = jax.vjp(part, block, x_BSD)
            return y_BSD, pull(y_BSD)

        return call

    def _attend(self, kind: str):
        """Attention of the layers of this kind, by the code that the config asks for."""
        config = self._config
        whole = kernels.attend(config.attention)
        return functools.partial(whole, kind=kind, text_len=config.text_len, grid=config.grid)

    def _layer(self, kind: str):
        config = self._config
        ways = {"attend": self._attend(kind), "remat": config.remat}
        return functools.partial(blocks.sequence_layer, **ways)

    def _mlp(self, block, x_BSD):
        ops = blocks.Rows(len(x_BSD), self._config.remat)
        rows = x_BSD.reshape(-1, x_BSD.shape[-1])
        return ops.add(block, rows, blocks.MLP, functools.partial(blocks.mlp, ops=ops)).reshape(x_BSD.shape)

    def _gradient_of_scores(self, kind: str):
        attend = self._attend(kind)
        again = any(part in blocks.REMAT[self._config.remat] for part in ("attend", "attention"))

        def call(q, k, v):
            out, pull = jax.vjp(jax.checkpoint(attend) if again else attend, q, k, v)
            return out, pull(out)

        return call

    def _qkv(self, x_BSD):
        config, dtype = self._config, compute_dtype(self._config.precision)
        shape = (*x_BSD.shape[:2], config.heads, config.head_size)
        made = {"qkv"[i]: np.random.default_rng(i).normal(size=shape).astype(dtype) for i in range(3)}
        return sharding.shard_batch(made, self._job.mesh).values()

    def _heads_loss(self, heads, x_BSD, params, text_BT):
        """The two output heads and the loss, of random image tokens; the last norm is in the rest."""
        config = self._config
        image_BI = jax.random.randint(self._update.key, (len(text_BT), config.layout.image_len), 0, config.image_vocab)
        logits = self._job.task.model.apply({**params, **heads}, x_BSD, method="logits")
        text, image = token_losses(*logits, text_BT, image_BI)
        return TEXT_LOSS_WEIGHT * text + IMAGE_LOSS_WEIGHT * image


def change_dvae(job: Job, sizes: Mapping[str, Any]) -> None:
    """Gives a new job a frozen dVAE of other sizes."""
    vars(job)["helper"] = build("dvae", {**dataclasses.asdict(job.helper.config), **sizes})


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
