"""The dVAE next to OpenAI's modules in torch: training and encoding, both of one shape, in turns, on two CPU threads.

    python -m benchmarks.peers.dvae --peer-python PEER/bin/python

`peer_openai_dvae.py` says how to make that environment. The paper's network at a quarter of its width and with half of
its blocks, over pictures of a quarter of its side, with 1024 codes. A training step is loss, gradients and AdamW; ours
is the training's own, which also keeps the moving average and measures hard reconstruction of every eighth picture;
theirs is that loss in torch.

A table of single convolutions shows where the time goes: forward, gradient of the input and gradient of the weights, in
both layouts and precisions. `jax.lax.conv_general_dilated` alone is timed on our side, for a layout that the model does
not use as well. Each round measures every work once, ours and theirs in turns; a ratio is the middle one of the rounds.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path

from benchmarks.peers.peers import PeerProcess, machine
from benchmarks.peers.works import Works
from dalle_jax.cli import host_memory  # does not import JAX

RESULTS = Path(__file__).parent.parent / "results"
# As in peer_openai_dvae.py, which cannot be imported here: it imports torch.
SHAPE = dict(image_size=64, vocab=1024, width=64, stem=128, blocks_per_group=1)
BATCH, THREADS, LEARNING_RATE, BETA = 8, 2, 1e-4, 6.6
CONVOLUTIONS = ((64, 16, 64), (16, 64, 64), (512, 128, 8), (128, 512, 8))
OURS = ("train_fp32", "train_bf16", "encode_fp32", "encode_bf16")
THEIRS = ("train_nchw", "train_nhwc", "train_nhwc_bf16", "encode_nchw", "encode_nhwc", "encode_nhwc_bf16")
# Our work against theirs, at theirs' best in each precision.
BARS = (
    ("train_fp32", "train_nchw"),
    ("train_fp32", "train_nhwc"),
    ("train_bf16", "train_nhwc_bf16"),
    ("encode_fp32", "encode_nchw"),
    ("encode_fp32", "encode_nhwc"),
    ("encode_bf16", "encode_nhwc_bf16"),
)
PARTS = ("fwd", "dx", "dw")
WAYS = ("nhwc_fp32", "nchw_fp32", "nhwc_bf16")
CONV_REPEATS = 5


def build_work(work: str):
    """The function that does one of our works once."""
    verb, _, way = work.partition("_")
    return {"train": trainer, "encode": encoder, "conv": convolution}[verb](way)


def config_of(precision: str):
    from dalle_jax import config as configs

    values = {f"model.{key}": value for key, value in SHAPE.items()} | {
        "data.image_size": SHAPE["image_size"],
        "precision": precision,
        "batch_size": BATCH,
        "optimizer.learning_rate": LEARNING_RATE,
        "objective.beta.start": BETA,
        "objective.temperature.steps": 0,
        "objective.temperature.end": 1.0,
    }
    return configs.load("configs/dvae.py:paper", [f"--config.{key}={value}" for key, value in values.items()])


def pictures():
    import numpy as np

    shape = (BATCH, SHAPE["image_size"], SHAPE["image_size"], 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def trainer(precision: str):
    """A function that does one training step, as the training loop calls it."""
    import jax

    from dalle_jax import sharding
    from dalle_jax.mesh import make_mesh
    from dalle_jax.train.ema import Ema
    from dalle_jax.train.objectives.dvae import dvae_task
    from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
    from dalle_jax.train.step import TrainStep

    config = config_of(precision)
    task, mesh, key = dvae_task(config), make_mesh({}), jax.random.key(0)
    optimizer = build_optimizer(Optimizer(**config.optimizer), steps=config.steps, axes=task.model.axes)
    training = TrainStep(task, optimizer, mesh, ema=Ema(**config.ema))
    batch = sharding.shard_batch({"image": pictures()}, mesh)
    state = [training.init(key)]

    def step():
        state[0], metrics = training.update(state[0], {}, batch, key)
        jax.block_until_ready((state[0], metrics))

    return step


def encoder(precision: str):
    """A function that makes codes of a batch of pictures."""
    import functools

    import jax

    from dalle_jax.models import build
    from dalle_jax.models.dvae import encode_images

    model, image = build("dvae", config_of(precision).model), pictures()
    params, encode = jax.jit(model.init)(jax.random.key(0)), jax.jit(functools.partial(encode_images, model))
    return lambda: jax.block_until_ready(encode(params, image))


def convolution(way: str):
    """What one 3 x 3 convolution computes: `fwd`, `dx` or `dw` (gradients of its input and of its weights)."""
    import jax
    import jax.numpy as jnp

    part, index, layout, precision = way.split("_")
    before, after, side = CONVOLUTIONS[int(index)]
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    names, size = (layout.upper(), "HWIO", layout.upper()), dict(n=BATCH, h=side, w=side)
    shape = lambda channels: tuple((size | {"c": channels})[letter] for letter in layout)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = shape(before), (3, 3, before, after), shape(after)
    x, weight, cotangent = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))

    def forward(x, weight):
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=names)

    if part == "fwd":
        program = jax.jit(forward)
        return lambda: jax.block_until_ready(program(x, weight))
    place = PARTS.index(part) - 1
    program = jax.jit(lambda x, weight, cotangent: jax.vjp(forward, x, weight)[1](cotangent)[place])
    return lambda: jax.block_until_ready(program(x, weight, cotangent))


def run_rounds(peer: PeerProcess, args) -> dict[str, dict[str, list[float]]]:
    """side -> work -> for each round the middle of its seconds."""
    sides = {"ours": Works(build_work), "theirs": peer}
    turns = [(side, work, args.steps) for side, works in (("ours", OURS), ("theirs", THEIRS)) for work in works]
    turns += [
        (side, f"conv_{part}_{index}_{way}", CONV_REPEATS)
        for index in range(len(CONVOLUTIONS))
        for part in PARTS
        for way in WAYS
        for side in sides
    ]
    turns.sort(key=lambda turn: turn[1])  # works of one kind of both sides next to each other
    seconds = {side: {} for side in sides}
    for index in range(args.rounds):
        for side, work, repeats in turns:
            found = statistics.median(sides[side].measure(work, repeats))
            seconds[side].setdefault(work, []).append(found)
            if not work.startswith("conv"):
                print(f"round {index + 1}: {side} {work} {found:.3f} s", file=sys.stderr, flush=True)
    return seconds


def table(result: dict) -> str:
    """The result as Markdown."""
    seconds, lines = result["seconds"], []
    lines += [
        "# The dVAE next to OpenAI's modules in torch",
        "",
        f"{result['date']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}.",
        f"Shape: {', '.join(f'{key} {value}' for key, value in SHAPE.items())}, batch {BATCH}; the objective of the "
        f"paper (logit-Laplace, Gumbel-softmax at temperature 1, beta {BETA}), AdamW.",
        "",
        f"    {result['command']}",
        "",
        "| ours | theirs | our images/s | their images/s | ratio (lowest and highest round) |",
        "|---|---|---|---|---|",
    ]
    for ours, theirs in BARS:
        a, b = seconds["ours"][ours], seconds["theirs"][theirs]
        ratios = [t / o for o, t in zip(a, b, strict=True)]
        lines.append(
            f"| {ours} | {theirs} | {BATCH / statistics.median(a):.1f} | {BATCH / statistics.median(b):.1f} | "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    lines += [
        "",
        "Milliseconds of one 3 x 3 convolution, XLA's and torch's: forward (fwd), gradient of its input (dx) and of "
        "its weights (dw).",
        "",
        f"| convolution | layout | {' | '.join(f'{part} XLA | {part} torch' for part in PARTS)} |",
        f"|---|---|{'---|' * 2 * len(PARTS)}",
    ]
    for index, (before, after, side) in enumerate(CONVOLUTIONS):
        for way in WAYS:
            found = [
                f"{1e3 * statistics.median(seconds[who][f'conv_{part}_{index}_{way}']):.2f}"
                for part in PARTS
                for who in ("ours", "theirs")
            ]
            lines.append(f"| {before} to {after}, {side} x {side} | {way.replace('_', ' ')} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="the interpreter of the peer's environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each work in each round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    host_memory.keep_freed()
    if hasattr(os, "sched_setaffinity"):  # both sides get the same cores; the peer's process inherits them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    about = machine()
    peer = PeerProcess(args.peer_python, "peer_openai_dvae")
    seconds = run_rounds(peer, args)
    peer.close()
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.peers.dvae --peer-python PEER/bin/python "
        f"--rounds {args.rounds} --steps {args.steps}",
        "machine": {**about, "torch": peer.about["torch"]},
        "seconds": seconds,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "dvae.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "dvae.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
