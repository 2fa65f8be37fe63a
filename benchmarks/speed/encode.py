"""What the frozen dVAE costs a transformer's step, and what image tokens made by `dalle-jax encode` save.

    python -m benchmarks.speed.encode

FLOPs by the rules of `dalle-jax preflight` for each size, and the seconds of the demo's and the emoji's step on this
machine, on a batch of images and on one of image tokens, in turns; a share is the middle one of the rounds. Models and
data are random, which changes no time.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from dalle_jax.model_dir import ModelDir
from dalle_jax.models import build, image_tokenizer
from dalle_jax.preflight import flops
from dalle_jax.train.settings import load_settings

DVAE_OF = {"12b": "paper", "5b6": "paper", "2b8": "paper", "1b3": "paper", "400m": "paper"}  # others: their own name
COUNTED, TIMED = (*DVAE_OF, "emoji", "demo"), ("emoji", "demo")
STEPS, WARM_UP = 15, 3  # of each round


def configured(variant: str):
    """Settings of a transformer and its dVAE."""
    dvae = load_settings(f"configs/dvae.py:{DVAE_OF.get(variant, variant)}")
    return load_settings(f"configs/transformer.py:{variant}"), build("dvae", dvae.model)


def count(variant: str) -> dict[str, int]:
    """FLOPs of one sequence: the transformer's own, what is computed again, and the dVAE's."""
    settings, dvae = configured(variant)
    model, side = settings.model, dvae.config.image_size
    picture = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    encode = flops.traced(lambda params, image: image_tokenizer.encode(dvae, params, image), dvae.abstract, picture)
    return {"transformer": flops.transformer(model), "recomputed": flops.recomputed(model), "dvae": encode}


def measure(variant: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of one step on images and on image tokens, the middle one of each round."""
    settings, dvae = configured(variant)
    frozen = {"image_tokenizer": ModelDir({}, dvae, jax.jit(dvae.init)(jax.random.key(1)))}
    rng, size, side = np.random.default_rng(0), settings.batch_size, dvae.config.image_size
    text = {"text": np.tile(settings.model.layout.caption_ids([]), (size, 1))}
    batches = {
        "images": {"image": rng.integers(256, size=(size, side, side, 3), dtype=np.uint8)},
        "tokens": {"image_tokens": rng.integers(dvae.config.vocab, size=(size, dvae.config.grid**2), dtype=np.int32)},
    }
    steps = {name: harness.training_step(settings, batch | text, frozen) for name, batch in batches.items()}

    def middle(name: str) -> float:
        return statistics.median([harness.seconds(steps[name]) for _ in range(WARM_UP + STEPS)][WARM_UP:])

    return harness.in_turns({name: functools.partial(middle, name) for name in steps}, rounds)


def main() -> None:
    args = harness.parser(__doc__, rounds=5).parse_args()
    machine = harness.machine(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
    counted, timed = [], []
    for variant in COUNTED:
        flops_of = count(variant)
        figures = [f"{value / 1e9:,.4g}" for value in flops_of.values()]
        counted.append((f"`{variant}`", *figures, f"{flops_of['dvae'] / sum(flops_of.values()):.2%}"))
    for variant in TIMED:
        seconds = measure(variant, args.rounds)
        shares = [1 - ratio for ratio in harness.ratios(seconds["tokens"], seconds["images"])]
        middles = [f"{statistics.median(values):.4f}" for values in seconds.values()]
        timed.append((f"`{variant}`", *middles, harness.spread(shares, ".1%", "")))
    lines = [
        machine,
        *harness.command(args),
        *harness.table("config | transformer, GFLOP a sequence | computed again | dVAE | dVAE's share", counted),
        "",
        f"Seconds of a step here, the middle of {STEPS} in each round, images and image tokens in turns:",
        "",
        *harness.table("config | images | image tokens | dVAE's share (lowest and highest round)", timed),
    ]
    harness.write(args.results / "encode.md", "What the frozen dVAE costs a transformer's step", lines)


if __name__ == "__main__":
    main()
