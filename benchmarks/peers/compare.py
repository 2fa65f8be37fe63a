"""Training and sampling speed next to another package, both at one shape, in turns, on two CPU threads, float32.

    python -m benchmarks.peers.compare --peer-python PEER/bin/python
    python -m benchmarks.peers.compare --peer emu3 --peer-python PEER/bin/python
    python -m benchmarks.peers.compare --peer dvae --peer-python PEER/bin/python
    python -m benchmarks.peers.compare --peer vqgan --peer-python PEER/bin/python --steps 1

`peer_dalle_pytorch.py`, `peer_emu3.py`, `peer_openai_dvae.py` and `peer_taming.py` say how to make their environments.
Each round measures every work once, ours and theirs in turns, so that what else the machine does hits both; a ratio is
the middle one of the rounds. `--slow-rounds` is for what takes the peer minutes (DALLE-pytorch's sampling as shipped).
Writes `results/PEER.md`, or a section of it. The dVAE's works are in `dvae.py`, those of a VQGAN in `vqgan.py`, the
transformer's here:

A training step is loss, gradients and AdamW on given image tokens; ours also keeps its moving average. A sample is
captions to pixels: image tokens drawn at temperature 1 and the dVAE's decoder. Width and blocks of our decoder are
chosen so that both do about the same arithmetic, which every run counts and reports. The peer's default filter keeps
half of text and image vocabulary together, which at this shape is nearly all image tokens. Emu3 stops at image tokens,
without pixels. Both sides keep freed memory (`harness.KEEP_FREED`).
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.peers import dvae, vqgan
from benchmarks.peers.process import BATCH, LEARNING_RATE, SHAPE, THREADS, PeerProcess, Works
from dalle_jax.layout import Layout
from dalle_jax.mesh import local_mesh
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import build
from dalle_jax.models.dvae import decode_images
from dalle_jax.preflight import flops
from dalle_jax.sample.engine import Engine, image_keys
from dalle_jax.train.settings import load_settings


@dataclasses.dataclass(frozen=True)
class Peer:
    """Works of ours beside those of a peer's script.

    rows: our work, theirs, and the ratio to reach, or None if it is only reported. slow: their works that take minutes.
    build: makes our works. does: what a work's name begins with -> how much it does, the unit, and digits to show.
    notes: lines about what both sides compute, from the peer's last answer. section: of the results, if it is one.
    """

    title: str
    script: str
    rows: tuple[tuple[str, str, float | None], ...]
    build: Callable[[str], Callable[[], None]]
    does: Mapping[str, tuple[float, str, int]]
    notes: Callable[[Mapping[str, Any]], list[str]]
    slow: tuple[str, ...] = ()
    section: str = ""


def build_work(work: str):
    """The function that does one of our works once."""
    verb, pattern = work.split("_")
    return (trainer if verb == "train" else sampler)(pattern)


def settings_of(pattern: str):
    sizes = {key: value for key, value in SHAPE.items() if key not in ("layers", "image_size")}
    values = {f"model.{key}": value for key, value in sizes.items()} | {
        "model.num_layers": SHAPE["layers"],
        "model.pattern": pattern,
        "data.image_size": SHAPE["image_size"],
        "batch_size": BATCH,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.clip_norm": None,
    }
    return load_settings("configs/transformer.py:demo").changed(values)


def captions():
    """int32 [BATCH, text_len]: as many random tokens as there is room for."""
    layout = Layout(SHAPE["text_len"], SHAPE["text_vocab"], SHAPE["grid"], SHAPE["image_vocab"])
    tokens = np.random.default_rng(0).integers(layout.text_vocab, size=(BATCH, layout.caption_len))
    return np.stack([layout.caption_ids(row) for row in tokens])


def trainer(pattern: str):
    codes = np.random.default_rng(1).integers(SHAPE["image_vocab"], size=(BATCH, SHAPE["grid"] ** 2), dtype=np.int32)
    frozen = {"image_tokenizer": ModelDir({}, dvae_model(), {})}  # only its sizes matter
    return harness.training_step(settings_of(pattern), {"text": captions(), "image_tokens": codes}, frozen)


def dvae_model():
    """The dVAE whose decoder makes our pixels."""
    sizes = {"image_size": SHAPE["image_size"], "vocab": SHAPE["image_vocab"]}
    return build("dvae", {**sizes, "width": 16, "blocks_per_group": 1, "stem": 64})


def sampler(pattern: str):
    """A function that draws one batch of pictures, pixels included."""
    model, dvae = build("transformer", settings_of(pattern).model), dvae_model()
    assert dvae.config.grid == SHAPE["grid"]
    params, dvae_params = jax.jit(model.init)(jax.random.key(0)), jax.jit(dvae.init)(jax.random.key(1))
    text_CT, seed, engine = captions(), iter(range(1_000_000)), Engine(model, params, mesh=local_mesh())

    to_pixels = jax.jit(decode_images, static_argnums=0)

    def sample():
        batch = engine.begin(text_CT, image_keys(next(seed) + np.arange(BATCH)[:, None]))
        ids_CMI = engine.tokens(engine.advance(batch, 0, engine.config.grid))
        np.asarray(to_pixels(dvae, dvae_params, ids_CMI.reshape(BATCH, SHAPE["grid"], -1)))

    return sample


def notes(about: Mapping[str, Any]) -> list[str]:
    """The shape, and how much both sides compute. about: the peer's last answer."""
    if "parameters" in about:
        ours, theirs = build("transformer", settings_of("full").model).num_params, about["parameters"]
        sides = f"Parameters: ours {ours / 1e6:.2f} and theirs {theirs / 1e6:.2f} million. "
        sides += "Samples end at pixels on our side and at image tokens on theirs."
    else:
        model, ids_BRC = dvae_model(), jax.ShapeDtypeStruct((1, SHAPE["grid"], SHAPE["grid"]), jnp.int32)
        ours = flops.traced(functools.partial(decode_images, model), model.abstract, ids_BRC) // 2
        sides = f"Decoders of the dVAEs: ours {ours / 1e6:.1f} and theirs {about['decoder_multiply_adds'] / 1e6:.1f} "
        sides += "million multiply-adds an image."
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    return [f"Shape: {shape}, batch {BATCH}; float32.", "", sides]


DOES = {"train": (BATCH * (SHAPE["text_len"] + SHAPE["grid"] ** 2), "tokens/s", 0), "sample": (BATCH, "images/s", 3)}
PEERS = {
    "dalle_pytorch": Peer(
        "Speed next to DALLE-pytorch 1.6.6",
        "peer_dalle_pytorch",
        (
            ("train_paper", "train_dense", 1.0),
            ("train_paper", "train_sparse", 1.5),
            ("train_full", "train_dense", None),
            ("sample_paper", "sample_dense_cached", 8.0),
            ("sample_full", "sample_dense_cached", None),
            ("sample_paper", "sample_dense_shipped", 50.0),
            ("sample_paper", "sample_sparse_shipped", None),
        ),
        build_work,
        DOES,
        notes,
        slow=("sample_dense_shipped", "sample_sparse_shipped"),
    ),
    "emu3": Peer(
        "Speed next to Emu3 of transformers 5.24.0",
        "peer_emu3",
        (
            ("train_paper", "train_eager", None),
            ("train_paper", "train_compiled", None),
            ("train_full", "train_eager", None),
            ("train_full", "train_compiled", None),
            ("sample_paper", "sample_cached", None),
            ("sample_full", "sample_cached", None),
        ),
        build_work,
        DOES,
        notes,
    ),
    "dvae": Peer(
        "The dVAE next to OpenAI's modules in torch",
        "peer_openai_dvae",
        (
            ("train_fp32", "train_nchw", None),
            ("train_fp32", "train_nhwc", None),
            ("train_bf16", "train_nhwc_bf16", None),
            ("encode_fp32", "encode_nchw", None),
            ("encode_fp32", "encode_nhwc", None),
            ("encode_bf16", "encode_nhwc_bf16", None),
        ),
        dvae.build_work,
        dict.fromkeys(("train", "encode"), (dvae.BATCH, "images/s", 1)),
        dvae.notes,
    ),
    "vqgan": Peer(
        vqgan.TITLE,
        "peer_taming",
        tuple(
            (work, f"{work}_{layout}", 0.9 if layout == "nchw" and not work.startswith("train") else None)
            for work in vqgan.WORKS
            for layout in ("nchw", "nhwc")
        ),
        vqgan.build_work,
        dict.fromkeys(("train", "encode", "decode"), (vqgan.PIXELS / 1000, "kpixel/s", 1)),
        vqgan.notes,
        section="Speed",
    ),
}


def main() -> int:
    parser = harness.parser(__doc__, rounds=5, peer=True)
    parser.add_argument("--peer", choices=PEERS, default="dalle_pytorch")
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds that include the peer as shipped")
    parser.add_argument("--steps", type=int, default=5, help="of each work but sampling in each round")
    args = parser.parse_args()
    harness.two_cpus(THREADS)
    machine, this = harness.machine(), PEERS[args.peer]
    peer, ours = PeerProcess(args.peer_python, this.script, "--serve"), Works(this.build)
    sides = {row[0]: ours for row in this.rows} | {row[1]: peer for row in this.rows}

    def middle(work: str) -> float:
        return statistics.median(sides[work].measure(work, 1 if work.startswith("sample") else args.steps))

    works = {work: functools.partial(middle, work) for work in sorted(sides)}  # those of one kind in a row
    seconds = harness.in_turns(works, args.rounds, slow=dict.fromkeys(this.slow, args.slow_rounds))
    peer.close()
    rows, missed = [], False
    for own, theirs, bar in this.rows:
        if seconds[theirs]:
            amount, unit, digits = this.does[own.partition("_")[0]]
            rates = [f"{amount / statistics.median(seconds[work]):,.{digits}f} {unit}" for work in (own, theirs)]
            ratios = harness.ratios(seconds[theirs], seconds[own])
            met = harness.met(statistics.median(ratios), bar)
            rows.append((own, theirs, *rates, harness.spread(ratios), met))
            missed |= met.endswith("not met")
    lines = [
        f"{machine[:-1]}, torch {peer.about['torch']}.",
        *this.notes(peer.about),
        *harness.command(args, peer_python="PEER/bin/python"),
        *harness.table("ours | theirs | our rate | their rate | ratio (lowest and highest round) | bar", rows),
    ]
    harness.write(args.results / f"{args.peer}.md", this.title, lines, section=this.section)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
