"""The dVAE next to OpenAI's modules in torch: training and encoding, both of one shape, in turns, on two CPU threads.

    python -m benchmarks.peers.dvae --peer-python PEER/bin/python

`peer_openai_dvae.py` says how to make that environment. The paper's network at a quarter of its width and with half of
its blocks, over pictures of a quarter of its side, with 1024 codes. A training step is loss, gradients and AdamW; ours
is the training's own, which also keeps the moving average and measures hard reconstruction of every eighth picture;
theirs is that loss in torch.

Each round measures every work once, ours and theirs in turns; a ratio is the middle one of the rounds.
"""

import statistics
import sys

from benchmarks import harness
from benchmarks.peers.process import PeerProcess, Works

# Of both sides; groups and kernels are the paper's.
SHAPE = dict(image_size=64, vocab=1024, width=64, stem=128, blocks_per_group=1)
BATCH, THREADS, LEARNING_RATE, BETA = 8, 2, 1e-4, 6.6
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


def build_work(work: str):
    """The function that does one of our works once."""
    verb, _, way = work.partition("_")
    return {"train": trainer, "encode": encoder}[verb](way)


def settings_of(precision: str):
    from dalle_jax.train.settings import load_settings

    values = {f"model.{key}": value for key, value in SHAPE.items()} | {
        "data.image_size": SHAPE["image_size"],
        "model.precision": precision,
        "batch_size": BATCH,
        "optimizer.learning_rate": LEARNING_RATE,
        "objective.beta.start": BETA,
        "objective.temperature.steps": 0,
        "objective.temperature.end": 1.0,
    }
    return load_settings("configs/dvae.py:paper").changed(values)


def pictures():
    import numpy as np

    shape = (BATCH, SHAPE["image_size"], SHAPE["image_size"], 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def trainer(precision: str):
    """A function that does one training step, as the training loop calls it."""
    import jax

    from dalle_jax import sharding
    from dalle_jax.mesh import make_mesh
    from dalle_jax.train import run
    from dalle_jax.train.objectives import build_task

    settings, mesh, key = settings_of(precision), make_mesh({}), jax.random.key(0)
    training = run.step_for(settings, build_task(settings, {}), mesh)
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

    model, image = build("dvae", settings_of(precision).model), pictures()
    params, encode = jax.jit(model.init)(jax.random.key(0)), jax.jit(functools.partial(encode_images, model))
    return lambda: jax.block_until_ready(encode(params, image))


def run_rounds(peer: PeerProcess, args) -> dict[str, dict[str, list[float]]]:
    """side -> work -> the middle of its seconds in each round."""
    sides = {"ours": Works(build_work), "theirs": peer}
    turns = [(side, work, args.steps) for side, works in (("ours", OURS), ("theirs", THEIRS)) for work in works]
    turns.sort(key=lambda turn: turn[1])  # works of one kind of both sides in a row
    seconds = {side: {} for side in sides}
    for index in range(args.rounds):
        harness.log(f"round {index + 1}")
        for side, work, repeats in turns:
            seconds[side].setdefault(work, []).append(statistics.median(sides[side].measure(work, repeats)))
    return seconds


def main() -> None:
    parser = harness.parser(__doc__, rounds=5, peer=True)
    parser.add_argument("--steps", type=int, default=3, help="of each work in each round")
    args = parser.parse_args()
    harness.two_cpus(THREADS)
    machine = harness.machine()
    peer = PeerProcess(args.peer_python, "peer_openai_dvae", "--serve")
    seconds = run_rounds(peer, args)
    peer.close()
    rows = []
    for names in BARS:
        ours, theirs = (seconds[side][work] for side, work in zip(("ours", "theirs"), names, strict=True))
        rates = [f"{BATCH / statistics.median(found):.1f}" for found in (ours, theirs)]
        rows.append((*names, *rates, harness.spread(harness.ratios(theirs, ours))))
    lines = [
        f"{machine[:-1]}, torch {peer.about['torch']}.",
        f"Shape: {', '.join(f'{key} {value}' for key, value in SHAPE.items())}, batch {BATCH}; the objective of the "
        f"paper (logit-Laplace, Gumbel-softmax at temperature 1, beta {BETA}), AdamW.",
        "",
        f"    {harness.command(args, peer_python='PEER/bin/python')}",
        "",
        *harness.table("ours | theirs | our images/s | their images/s | ratio (lowest and highest round)", rows),
    ]
    harness.write(args.results / "dvae.md", "The dVAE next to OpenAI's modules in torch", lines)


if __name__ == "__main__":
    sys.exit(main())
