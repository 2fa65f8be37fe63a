"""What the frozen dVAE costs a transformer's update, and what codes made by `dalle-jax encode` save.

    python -m benchmarks.speed.encode

FLOPs by the rules of `dalle-jax preflight` for each size, and the seconds of the demo's and the emoji's update on this
machine, on a batch of pictures and on one of codes, in turns; a share is the middle one of the rounds. Models and data
are random, which changes no time. Writes the table and the raw seconds to `benchmarks/results/`.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.peers import machine
from dalle_jax import config as configs
from dalle_jax import sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build
from dalle_jax.models.dvae import encode_images
from dalle_jax.preflight import flops
from dalle_jax.train.ema import Ema
from dalle_jax.train.objectives.transformer import transformer_task
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from dalle_jax.train.step import TrainStep

RESULTS = Path(__file__).parent.parent / "results"
DVAE_OF = {"12b": "paper", "5b6": "paper", "2b8": "paper", "1b3": "paper", "400m": "paper"}  # others: their own name
COUNTED, TIMED = (*DVAE_OF, "emoji", "demo"), ("emoji", "demo")
UPDATES, WARM_UP = 15, 3  # of each round


def configured(variant: str):
    """Config of a transformer and its dVAE."""
    dvae = configs.load(f"configs/dvae.py:{DVAE_OF.get(variant, variant)}")
    return configs.load(f"configs/transformer.py:{variant}"), build("dvae", dvae.model)


def count(variant: str) -> dict[str, int]:
    """FLOPs of one sequence: the transformer's own, what is computed again, and the dVAE's."""
    config, dvae = configured(variant)
    model, side = build("transformer", config.model).config, dvae.config.image_size
    picture = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    encode = flops.traced(lambda params, image: encode_images(dvae, params, image), dvae.abstract, picture)
    return {"transformer": flops.transformer(model), "recomputed": flops.recomputed(model), "dvae": encode}


def measure(variant: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of one update on pictures and on codes, the middle one of each round."""
    config, dvae = configured(variant)
    task = transformer_task(config, dvae, jax.jit(dvae.init)(jax.random.key(1)))
    mesh = make_mesh({})
    optimizer = build_optimizer(Optimizer(**config.optimizer), steps=100, axes=task.model.axes)
    rng, size, side = np.random.default_rng(0), config.batch_size, dvae.config.image_size
    text = np.tile(task.model.config.layout.caption_ids([]), (size, 1))
    batches = {
        "pictures": {"image": rng.integers(256, size=(size, side, side, 3), dtype=np.uint8), "text": text},
        "codes": {
            "image_tokens": rng.integers(dvae.config.vocab, size=(size, dvae.config.grid**2), dtype=np.int32),
            "text": text,
        },
    }
    batches = {name: sharding.shard_batch(batch, mesh) for name, batch in batches.items()}
    step = TrainStep(task, optimizer, mesh, ema=Ema(**config.ema))
    states = {name: step.init(jax.random.key(0)) for name in batches}
    seconds = {name: [] for name in batches}
    for number in range(rounds):
        for name, batch in batches.items():
            times = []
            for _ in range(UPDATES + (0 if number else WARM_UP)):
                began = time.perf_counter()
                states[name], metrics = step.update(states[name], task.frozen, batch, jax.random.key(1))
                jax.block_until_ready((states[name], metrics))
                times.append(time.perf_counter() - began)
            seconds[name].append(statistics.median(times[-UPDATES:]))
    return seconds


def share(seconds: dict[str, list[float]]) -> list[float]:
    return [1 - codes / pictures for pictures, codes in zip(seconds["pictures"], seconds["codes"], strict=True)]


def table(result: dict) -> str:
    """The result as markdown."""
    lines = [
        "# What the frozen dVAE costs a transformer's update",
        "",
        f"{result['date']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}.",
        "",
        f"    {result['command']}",
        "",
        "| config | transformer, GFLOP a sequence | computed again | dVAE | dVAE's share |",
        "|---|---|---|---|---|",
    ]
    for name, counted in result["flops"].items():
        figures = [f"{counted[key] / 1e9:,.4g}" for key in ("transformer", "recomputed", "dvae")]
        lines.append(f"| `{name}` | {' | '.join(figures)} | {counted['dvae'] / sum(counted.values()):.2%} |")
    lines += [
        "",
        f"Seconds of an update here, the middle of {UPDATES} in each round, pictures and codes in turns:",
        "",
        "| config | pictures | codes | dVAE's share (lowest and highest round) |",
        "|---|---|---|---|",
    ]
    for name, seconds in result["seconds"].items():
        shares, middle = share(seconds), {key: statistics.median(values) for key, values in seconds.items()}
        lines.append(
            f"| `{name}` | {middle['pictures']:.4f} | {middle['codes']:.4f} | {statistics.median(shares):.1%} "
            f"({min(shares):.1%} to {max(shares):.1%}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.speed.encode --rounds {args.rounds}",
        "machine": {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", **machine()},
        "flops": {variant: count(variant) for variant in COUNTED},
        "seconds": {variant: measure(variant, args.rounds) for variant in TIMED},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "encode.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "encode.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
