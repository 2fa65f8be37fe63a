"""Training and sampling speed next to another package, both at one shape, in turns, on two CPU threads, float32.

    python -m benchmarks.peers.compare --peer-python PEER/bin/python
    python -m benchmarks.peers.compare --peer emu3 --peer-python PEER/bin/python

`peer_dalle_pytorch.py` and `peer_emu3.py` say how to make their environments. Each round measures every work once,
ours and theirs in turns, so that what else the machine does hits both; a ratio is the middle one of the rounds.
`--slow-rounds` is for what takes the peer minutes (DALLE-pytorch's sampling as shipped). Writes
`results/dalle_pytorch.md` or `emu3.md`.

A training step is loss, gradients and AdamW on given image tokens; ours also keeps its moving average. A sample is
captions to pixels: image tokens drawn at temperature 1 and the dVAE's decoder. Width and blocks of our decoder are
chosen so that both do about the same arithmetic, which every run counts and reports. The peer's default filter keeps
half of text and image vocabulary together, which at this shape is nearly all image tokens. Emu3 stops at image tokens,
without pixels. Both sides keep freed memory (`harness.KEEP_FREED`).
"""

import functools
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.peers.peer_dalle_pytorch import BATCH, LEARNING_RATE, SHAPE, THREADS
from benchmarks.peers.process import PeerProcess, Works
from dalle_jax import sharding
from dalle_jax.layout import IMAGE_LOSS_WEIGHT, TEXT_LOSS_WEIGHT, Layout
from dalle_jax.mesh import local_mesh, make_mesh
from dalle_jax.models import build
from dalle_jax.models.dvae import decode_images
from dalle_jax.preflight import flops
from dalle_jax.sample.engine import Engine, image_keys
from dalle_jax.train.ema import Ema
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.objectives.transformer import token_losses
from dalle_jax.train.step import TrainStep

OURS = ("train_paper", "train_full", "sample_paper", "sample_full")
EACH = {"train": BATCH * (SHAPE["text_len"] + SHAPE["grid"] ** 2), "sample": BATCH}  # tokens, images
# name -> title, script, its works, those that take minutes, and rows of the table: our work, theirs, the ratio to reach
# or None if it is only reported.
PEERS = {
    "dalle_pytorch": (
        "DALLE-pytorch 1.6.6",
        "peer_dalle_pytorch",
        ("train_dense", "train_sparse", "sample_dense_cached"),
        ("sample_dense_shipped", "sample_sparse_shipped"),
        (
            ("train_paper", "train_dense", 1.0),
            ("train_paper", "train_sparse", 1.5),
            ("train_full", "train_dense", None),
            ("sample_paper", "sample_dense_cached", 8.0),
            ("sample_full", "sample_dense_cached", None),
            ("sample_paper", "sample_dense_shipped", 50.0),
            ("sample_paper", "sample_sparse_shipped", None),
        ),
    ),
    "emu3": (
        "Emu3 of transformers 5.24.0",
        "peer_emu3",
        ("train_eager", "train_compiled", "sample_cached"),
        (),
        (
            *(
                (ours, theirs, None)
                for ours in ("train_paper", "train_full")
                for theirs in ("train_eager", "train_compiled")
            ),
            *((ours, "sample_cached", None) for ours in OURS[2:]),
        ),
    ),
}


def build_work(work: str):
    """The function that does one of OURS once."""
    verb, pattern = work.split("_")
    return (trainer if verb == "train" else sampler)(pattern)


def transformer(pattern: str):
    sizes = {key: value for key, value in SHAPE.items() if key not in ("layers", "image_size")}
    sizes |= {"num_layers": SHAPE["layers"], "pattern": pattern, "remat": "none", "scan": False, "precision": "fp32"}
    return build("transformer", sizes)


def captions():
    """int32 [BATCH, text_len]: as many random tokens as there is room for."""
    layout = Layout(SHAPE["text_len"], SHAPE["text_vocab"], SHAPE["grid"], SHAPE["image_vocab"])
    tokens = np.random.default_rng(0).integers(layout.text_vocab, size=(BATCH, layout.caption_len))
    return np.stack([layout.caption_ids(row) for row in tokens])


def trainer(pattern: str):
    """A function that does one training step, as the training loop calls it."""
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
    sizes = {"image_size": SHAPE["image_size"], "vocab": SHAPE["image_vocab"]}
    return build("dvae", {**sizes, "width": 16, "blocks_per_group": 1, "stem": 64})


def decoder_multiply_adds() -> int:
    """Of our dVAE's decoder, one image."""
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
    model = transformer(pattern)
    dvae = dvae_model()
    assert dvae.config.grid == SHAPE["grid"]
    params, dvae_params = jax.jit(model.init)(jax.random.key(0)), jax.jit(dvae.init)(jax.random.key(1))
    text_CT, seed, engine = captions(), iter(range(1_000_000)), Engine(model, params, mesh=local_mesh())

    to_pixels = jax.jit(decode_images, static_argnums=0)

    def sample():
        batch = engine.begin(text_CT, image_keys(next(seed) + np.arange(BATCH)[:, None]))
        ids_CMI = engine.tokens(engine.advance(batch, 0, engine.config.grid))
        np.asarray(to_pixels(dvae, dvae_params, ids_CMI.reshape(BATCH, -1)))

    return sample


def run_rounds(peer: PeerProcess, fast, slow, args) -> dict[str, list[float]]:
    """work -> the middle of its seconds in each round."""
    ours, seconds = Works(build_work), {}
    for index in range(max(args.rounds, args.slow_rounds)):
        theirs = fast * (index < args.rounds) + slow * (index < args.slow_rounds)
        turns = [(ours, work) for work in OURS] + [(peer, work) for work in theirs]
        for side, work in sorted(turns, key=lambda turn: turn[1]):  # works of one kind of both sides in a row
            found = statistics.median(side.measure(work, args.train_steps if work.startswith("train") else 1))
            seconds.setdefault(work, []).append(found)
            harness.log(f"round {index + 1}: {work} {found:.3f} s")
    return seconds


def main() -> int:
    parser = harness.parser(__doc__, rounds=5, peer=True)
    parser.add_argument("--peer", choices=PEERS, default="dalle_pytorch")
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds that include the peer as shipped")
    parser.add_argument("--train-steps", type=int, default=5, help="training steps of each work in each round")
    args = parser.parse_args()
    harness.two_cpus(THREADS)
    machine = harness.machine()
    title, script, fast, slow, bars = PEERS[args.peer]
    peer = PeerProcess(args.peer_python, script, "--serve")
    seconds = run_rounds(peer, fast, slow, args)
    peer.close()
    rows, missed = [], False
    for ours, theirs, bar in bars:
        if theirs in seconds:
            verb = ours.partition("_")[0]
            unit, digits = ("tokens/s", 0) if verb == "train" else ("images/s", 3)
            rates = [f"{EACH[verb] / statistics.median(seconds[work]):,.{digits}f} {unit}" for work in (ours, theirs)]
            ratios = harness.ratios(seconds[theirs], seconds[ours])
            met = harness.met(statistics.median(ratios), bar)
            rows.append((ours, theirs, *rates, harness.spread(ratios), met))
            missed |= met.endswith("not met")
    lines = [
        f"{machine[:-1]}, torch {peer.about['torch']}.",
        f"Shape: {', '.join(f'{key} {value}' for key, value in SHAPE.items())}, batch {BATCH}; float32.",
        "",
        f"    {harness.command(args, peer_python='PEER/bin/python')}",
        "",
        arithmetic(peer.about),
        "",
        *harness.table("ours | theirs | our rate | their rate | ratio (lowest and highest round) | bar", rows),
    ]
    harness.write(args.results / f"{args.peer}.md", f"Speed next to {title}", lines)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
