"""Training and sampling speed next to another package, both at one shape, in turns, on two CPU threads, float32.

    python -m benchmarks.peers.compare --peer-python PEER/bin/python
    python -m benchmarks.peers.compare --peer emu3 --peer-python PEER/bin/python

`peer_dalle_pytorch.py` and `peer_emu3.py` say how to make their environments. Each round measures every work once,
ours and theirs in turns, so that what else the machine does hits both; a ratio is the middle one of the rounds.
`--slow-rounds` is for what takes the peer minutes (DALLE-pytorch's sampling as shipped). Writes the table and the raw
seconds to `benchmarks/results/`.

A training step is loss, gradients and AdamW on given image tokens; ours also keeps its moving average. A sample is
captions to pixels: image tokens drawn at temperature 1 and the dVAE's decoder. Width and blocks of our decoder are
chosen so that both do about the same arithmetic, which every run counts and reports. The peer's default filter keeps
half of text and image vocabulary together, which at this shape is nearly all image tokens. Emu3 stops at image tokens,
without pixels. `sample_products` is no sampler: it does the matrix products of the image tokens alone, as fast as XLA
does them in float32, and so bounds the ratio. Both sides keep freed memory (`dalle_jax/cli/host_memory.py`, as every
`dalle-jax` command does; the peer by the same settings in its environment).
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
from pathlib import Path

from benchmarks.peers.peer_dalle_pytorch import BATCH, LEARNING_RATE, SHAPE, THREADS
from benchmarks.peers.peers import PeerProcess, machine
from benchmarks.peers.works import Works
from dalle_jax.cli import host_memory  # does not import JAX

RESULTS = Path(__file__).parent.parent / "results"
OURS = ("train_paper", "train_full", "sample_paper", "sample_full", "sample_products")


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of the table: our work against theirs; `least` is the ratio to reach, None if it is only reported."""

    ours: str
    peer: str
    least: float | None


@dataclasses.dataclass(frozen=True)
class Peer:
    """A package to compare with. slow: works of it that take minutes."""

    title: str
    script: str
    fast: tuple[str, ...]
    slow: tuple[str, ...]
    bars: tuple[Bar, ...]


PEERS = {
    "dalle_pytorch": Peer(
        "DALLE-pytorch 1.6.6",
        "peer_dalle_pytorch",
        ("train_dense", "train_sparse", "sample_dense_cached"),
        ("sample_dense_shipped", "sample_sparse_shipped"),
        (
            Bar("train_paper", "train_dense", 1.0),
            Bar("train_paper", "train_sparse", 1.5),
            Bar("train_full", "train_dense", None),
            Bar("sample_paper", "sample_dense_cached", 8.0),
            Bar("sample_full", "sample_dense_cached", None),
            Bar("sample_products", "sample_dense_cached", None),
            Bar("sample_paper", "sample_dense_shipped", 50.0),
            Bar("sample_paper", "sample_sparse_shipped", None),
        ),
    ),
    "emu3": Peer(
        "Emu3 of transformers 5.24.0",
        "peer_emu3",
        ("train_eager", "train_compiled", "sample_cached"),
        (),
        (
            Bar("train_paper", "train_eager", None),
            Bar("train_paper", "train_compiled", None),
            Bar("train_full", "train_eager", None),
            Bar("train_full", "train_compiled", None),
            Bar("sample_paper", "sample_cached", None),
            Bar("sample_full", "sample_cached", None),
            Bar("sample_products", "sample_cached", None),
        ),
    ),
}


def build_work(work: str):
    """The function that does one of OURS once."""
    if work == "sample_products":
        return products()
    verb, pattern = work.split("_")
    return (trainer if verb == "train" else sampler)(pattern)


def transformer(pattern: str):
    from dalle_jax.models import build

    sizes = {key: value for key, value in SHAPE.items() if key not in ("layers", "image_size")}
    return build(
        "transformer",
        {
            **sizes,
            "num_layers": SHAPE["layers"],
            "pattern": pattern,
            "remat": "none",
            "scan": False,
            "precision": "fp32",
        },
    )


def captions():
    """int32 [BATCH, text_len]: as many random tokens as there is room for."""
    import numpy as np

    from dalle_jax.layout import Layout

    layout = Layout(SHAPE["text_len"], SHAPE["text_vocab"], SHAPE["grid"], SHAPE["image_vocab"])
    tokens = np.random.default_rng(0).integers(layout.text_vocab, size=(BATCH, layout.caption_len))
    return np.stack([layout.caption_ids(row) for row in tokens])


def trainer(pattern: str):
    """A function that does one training step, as the training loop calls it."""
    import jax
    import numpy as np
    import optax

    from dalle_jax import sharding
    from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT
    from dalle_jax.mesh import make_mesh
    from dalle_jax.train.ema import Ema
    from dalle_jax.train.objectives.task import Task
    from dalle_jax.train.objectives.transformer import token_losses
    from dalle_jax.train.step import TrainStep

    model = transformer(pattern)

    def loss(params, frozen, batch, *, key, step):
        del frozen, key, step
        text, image = token_losses(*model.apply(params, batch["text"], batch["image"]), batch["text"], batch["image"])
        return TEXT_LOSS_WEIGHT * text + IMAGE_LOSS_WEIGHT * image, {}

    task = Task(name="transformer", model=model, loss=loss)
    mesh = make_mesh({"replica": 1, "fsdp": 1, "tensor": 1})
    optimizer = optax.with_extra_args_support(optax.adamw(LEARNING_RATE))
    training = TrainStep(task, optimizer, mesh, ema=Ema(decay=0.99))
    key = jax.random.key(0)
    codes = np.random.default_rng(1).integers(SHAPE["image_vocab"], size=(BATCH, SHAPE["grid"] ** 2), dtype=np.int32)
    batch = sharding.shard_batch({"text": captions(), "image": codes}, mesh)
    state = [training.init(key)]

    def step():
        state[0], metrics = training.update(state[0], {}, batch, key)
        jax.block_until_ready((state[0], metrics))

    return step


def dvae_model():
    """The dVAE whose decoder makes our pixels."""
    from dalle_jax.models import build

    sizes = {"image_size": SHAPE["image_size"], "vocab": SHAPE["image_vocab"]}
    return build("dvae", {**sizes, "width": 16, "blocks_per_group": 1, "stem": 64})


def decoder_multiply_adds() -> int:
    """Of our dVAE's decoder, one image."""
    import functools

    import jax
    import jax.numpy as jnp

    from dalle_jax.models.dvae import decode_images
    from dalle_jax.preflight import flops

    dvae = dvae_model()
    ids_BI = jax.ShapeDtypeStruct((1, SHAPE["grid"] ** 2), jnp.int32)
    return flops.traced(functools.partial(decode_images, dvae), dvae.abstract, ids_BI) // 2


def arithmetic(about: dict) -> str:
    """How much both sides compute, in a sentence. about: the peer's last answer."""
    if "decoder_multiply_adds" in about:
        sides = {"ours": decoder_multiply_adds(), "theirs": about["decoder_multiply_adds"]}
        counts = " and ".join(f"{side} {count / 1e6:.1f}" for side, count in sides.items())
        return f"Decoders of the dVAEs: {counts} million multiply-adds an image."
    sides = {"ours": transformer("full").num_params, "theirs": about["parameters"]}
    counts = " and ".join(f"{side} {count / 1e6:.2f}" for side, count in sides.items())
    return f"Parameters: {counts} million. Samples end at pixels on our side and at image tokens on theirs."


def sampler(pattern: str):
    """A function that draws one batch of pictures, pixels included."""
    import jax
    import numpy as np

    from dalle_jax.models.dvae import decode_images
    from dalle_jax.sample.engine import Engine, image_keys

    model = transformer(pattern)
    dvae = dvae_model()
    assert dvae.config.grid == SHAPE["grid"]
    params, dvae_params = jax.jit(model.init)(jax.random.key(0)), jax.jit(dvae.init)(jax.random.key(1))
    text_CT, seed, engine = captions(), iter(range(1_000_000)), Engine(model, params)

    to_pixels = jax.jit(decode_images, static_argnums=0)

    def sample():
        ids_CMI = engine.generate(text_CT, image_keys(next(seed) + np.arange(BATCH)[:, None]))
        np.asarray(to_pixels(dvae, dvae_params, ids_CMI.reshape(BATCH, -1)))

    return sample


def products():
    """A function that does the matrix products of one batch's image tokens, one after another, and nothing else."""
    import jax

    width, depth, codes = SHAPE["heads"] * SHAPE["head_size"], SHAPE["layers"], SHAPE["image_vocab"]
    sizes = depth * [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] + [(width, codes)]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    *hidden, head = [jax.random.normal(key, size) / size[0] ** 0.5 for key, size in zip(keys, sizes, strict=True)]

    def narrowed(x_BD):
        """As wide as the stream, and so that all of it is needed; of the same size, so that nothing overflows."""
        parts_BPD = x_BD.reshape(BATCH, -1, width)
        return parts_BPD.sum(1) / parts_BPD.shape[1] ** 0.5

    def token(_, x_BD):
        for i in range(0, len(hidden), 4):
            qkv, out, up, down = hidden[i : i + 4]
            x_BD = narrowed(x_BD @ qkv) @ out @ up @ down
        return narrowed(x_BD @ head)

    run = jax.jit(lambda x_BD: jax.lax.fori_loop(0, SHAPE["grid"] ** 2, token, x_BD))
    x_BD = jax.random.normal(jax.random.key(1), (BATCH, width))
    return lambda: run(x_BD).block_until_ready()


def run_rounds(peer: Peer, process: PeerProcess, args) -> dict[str, list[list[float]]]:
    """work -> for each round, the seconds of its repeats. A work that has no round is missing."""
    ours, seconds = Works(build_work), {}
    for index in range(max(args.rounds, args.slow_rounds)):
        theirs = peer.fast * (index < args.rounds) + peer.slow * (index < args.slow_rounds)
        turns = [(ours, work) for work in OURS] + [(process, work) for work in theirs]
        turns.sort(key=lambda turn: turn[1])  # sample_* and train_* of both sides next to each other
        for side, work in turns:
            repeats = args.train_steps if work.startswith("train") else 1
            seconds.setdefault(work, []).append(side.measure(work, repeats))
            print(
                f"round {index + 1}: {work} {statistics.median(seconds[work][-1]):.3f} s", file=sys.stderr, flush=True
            )
    return seconds


def summarise(peer: Peer, seconds: dict[str, list[list[float]]]) -> dict:
    """Rates of every work and the ratio of every bar whose works were measured."""
    each = {"train": BATCH * (SHAPE["text_len"] + SHAPE["grid"] ** 2), "sample": BATCH}
    middles = {work: [statistics.median(round_) for round_ in rounds] for work, rounds in seconds.items()}
    rates = {work: each[work.split("_")[0]] / statistics.median(middle) for work, middle in middles.items()}
    bars = []
    for bar in peer.bars:
        if bar.peer in middles:
            pairs = zip(middles[bar.peer], middles[bar.ours], strict=False)  # slow works have fewer rounds
            ratios = [theirs / ours for theirs, ours in pairs]
            ratio = statistics.median(ratios)
            met = None if bar.least is None else ratio >= bar.least
            bars.append(
                {**dataclasses.asdict(bar), "ratio": ratio, "low": min(ratios), "high": max(ratios), "met": met}
            )
    return {"rates": rates, "bars": bars}


def table(peer: Peer, result: dict) -> str:
    """The result as markdown."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [
        f"# Speed next to {peer.title}",
        "",
        f"{result['date']}; {about}.",
        f"Shape: {', '.join(f'{key} {value}' for key, value in SHAPE.items())}, batch {BATCH}; float32.",
        "",
        f"    {result['command']}",
        "",
        result["about"],
        "",
        "| ours | theirs | our rate | their rate | ratio (lowest and highest round) | bar |",
        "|---|---|---|---|---|---|",
    ]
    for bar in result["bars"]:
        unit, digits = ("tokens/s", 0) if bar["ours"].startswith("train") else ("images/s", 3)
        ours, theirs = (f"{result['rates'][bar[side]]:,.{digits}f} {unit}" for side in ("ours", "peer"))
        least = "" if bar["least"] is None else f"{bar['least']:g}x: {'met' if bar['met'] else 'not met'}"
        ratio = f"{bar['ratio']:.2f}x ({bar['low']:.2f} to {bar['high']:.2f})"
        lines.append(f"| {bar['ours']} | {bar['peer']} | {ours} | {theirs} | {ratio} | {least} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, default="dalle_pytorch")
    parser.add_argument("--peer-python", required=True, help="the interpreter of the peer's environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds that include the peer as shipped")
    parser.add_argument("--train-steps", type=int, default=5, help="training steps of each work in each round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    host_memory.keep_freed()
    if hasattr(os, "sched_setaffinity"):  # both sides get the same cores; the peer's process inherits them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    about = machine()
    if about["load_before"] > 0.5:
        print(f"warning: the machine is busy (load {about['load_before']}), which hurts both sides", file=sys.stderr)
    peer = PEERS[args.peer]
    process = PeerProcess(args.peer_python, peer.script)
    seconds = run_rounds(peer, process, args)
    process.close()
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.peers.compare --peer {args.peer} --peer-python PEER/bin/python "
        f"--rounds {args.rounds} --slow-rounds {args.slow_rounds} --train-steps {args.train_steps}",
        "machine": {**about, "torch": process.about["torch"]},
        "about": arithmetic(process.about),
        **summarise(peer, seconds),
        "seconds": seconds,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.peer}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"{args.peer}.md").write_text(table(peer, result))
    print(table(peer, result))
    return 0 if all(bar["met"] is not False for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
