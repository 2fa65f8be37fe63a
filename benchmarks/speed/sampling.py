"""Sampling speed: shared text and windows against neither, int8 weights, large models on an accelerator.

    python -m benchmarks.speed.sampling     # on whatever JAX finds here

On a processor (two threads, the shape of `peers/compare.py`): 64 candidates of one caption, `ours`; the same number of
images as 64 captions of which each keeps its own text and all image positions, `plain`; all of a step but attention and
its cache, `rest`, which draws nonsense and bounds what sharing and windows can gain; and the engine's options. All take
turns, and a ratio is the middle one of the rounds. On an accelerator: the models of `sampling_bounds.py` with random
weights in bfloat16, and their share of the roofline. Each of the two writes its section of `results/sampling.md`; on an
accelerator, a call that was cut off goes on where --out has its rows.
"""

import functools
import os
import pathlib
import statistics
import sys
import unittest.mock

from benchmarks import harness
from benchmarks.peers.process import SHAPE, THREADS

CANDIDATES, MIN_RATIO = 64, 3.0
COUNTS = (1, 64, 512)  # candidates of one caption, on an accelerator
# Name -> pattern, precision, and options of the engine.
WORKS = {
    "ours": ("paper", "fp32", {}),
    "plain": ("full", "fp32", {}),
    "rest": ("full", "fp32", {}),
    "bf16": ("paper", "bf16", {}),
    "int8 weights": ("paper", "fp32", {"weights": "int8"}),
}
AIMS = {("12B", 512): 16, ("1.3B", 512): 150}  # images a second, of one H200; 512 of the 12B in 32 s
ONE_SHARE = 0.6  # of the bound, which for a single image is the reading of the weights


def on_processor(args) -> list[str]:
    """Speed, bytes and logit errors of all works."""
    import jax
    import numpy as np

    from benchmarks.speed import sampling_bounds
    from dalle_jax.mesh import local_mesh
    from dalle_jax.models import build
    from dalle_jax.models.attention import cached
    from dalle_jax.sample.engine import Engine, image_keys
    from tests.support.abstract_engine import weight_bytes

    sizes = {key: value for key, value in SHAPE.items() if key not in ("layers", "image_size")}
    sizes |= {"num_layers": SHAPE["layers"], "remat": "none", "scan": False}
    works, about, exact = {}, {}, None
    for name, (pattern, precision, options) in WORKS.items():
        model = build("transformer", {**sizes, "pattern": pattern, "precision": precision})
        engine = Engine(model, sampling_bounds.random_params(model, jax.random.key(0)), mesh=local_mesh(), **options)
        layout = model.config.layout
        text_T = layout.caption_ids(np.random.default_rng(0).integers(layout.text_vocab, size=layout.caption_len))
        captions = CANDIDATES if name == "plain" else 1
        text_CT, shape = np.stack([text_T] * captions), (captions, CANDIDATES // captions)
        step, error = sampling_bounds.step(engine, *shape), ""
        if name in ("ours", "bf16", "int8 weights"):
            found = logits(engine, text_CT[:1])
            exact = found if exact is None else exact
            error = f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.1%}"
        read = step.weights + (0 if name == "rest" else step.text + step.windows)
        operations = step.products + (0 if name == "rest" else step.attention)
        stored = sampling_bounds.cache_bytes(model.config)
        about[name] = *(f"{size / 1e6:.2f}" for size in (weight_bytes(engine), stored, read, operations)), error
        attend = (lambda q, k, v, text, cache, *_, **__: (v, cache)) if name == "rest" else cached.attend
        with unittest.mock.patch.object(cached, "attend", attend):
            draw(engine, text_CT, image_keys(np.zeros(shape)), steps=1)  # compiles
        keys_CM = image_keys(np.arange(CANDIDATES).reshape(shape))
        works[name] = functools.partial(harness.seconds, functools.partial(draw, engine, text_CT, keys_CM))
    seconds = harness.in_turns(works, args.rounds)
    gain, bound = (harness.ratios(seconds["plain"], seconds[name]) for name in ("ours", "rest"))
    rows = []
    for name, found in seconds.items():
        speed = harness.spread(harness.ratios(seconds["ours"], found))
        rows.append((name, f"{CANDIDATES / statistics.median(found):.2f}", speed, *about[name]))
    return [
        "64 images of one caption. `plain` keeps a text of its own for every image and all image positions, which",
        "every layer reads. Bytes are of the weights, of one candidate's cache, and of what a step of all 64 reads.",
        "The error is of the logits of one image against `ours`, norm by norm, with random weights of a trained",
        "model's scale. A processor computes 16- and 8-bit numbers through float32, so what they save in memory is not",
        "time saved here.",
        "",
        f"`plain` over `ours`: {harness.spread(gain)}; bar {harness.met(statistics.median(gain), MIN_RATIO)}. Over "
        f"`rest`, a step without attention and its cache: {harness.spread(bound)}, the most that sharing and windows "
        "can give here.",
        "",
        *harness.table(
            "engine | images/s | speed, `ours` = 1 | weights MB | cache MB | step MB | step MFLOP | logit error", rows
        ),
    ]


def draw(engine, text_CT, keys_CM, *, steps: int | None = None, batches: int = 1) -> None:
    """Image tokens of batches, up to a step."""
    for _ in range(batches):
        engine.tokens(engine.advance(engine.begin(text_CT, keys_CM), 0, steps or engine.config.grid))


def logits(engine, text_CT):
    """float32 [I, V] of one image of random tokens, from the engine's own weights and cache."""
    import jax
    import numpy as np

    from dalle_jax.models import decoding

    config = engine.config
    tokens_I = np.random.default_rng(1).integers(config.image_vocab, size=config.layout.image_len).astype(np.int32)
    previous_I1 = np.concatenate([[config.layout.start_of_image], tokens_I[:-1]]).astype(np.int32)[:, None]

    @jax.jit
    def run(weights, text_CT):
        stores = decoding.prefill(config, *weights, text_CT)

        def one(cache, inputs):
            logits_VB, cache = decoding.decode(config, *weights, stores, cache, *reversed(inputs))
            return cache, logits_VB[:, 0]

        empty = decoding.empty_cache(config, 1)
        return jax.lax.scan(one, empty, (np.arange(config.layout.image_len), previous_I1))[1]

    return np.asarray(run(engine._weights, text_CT))


def on_accelerator(args) -> list[str]:
    """Images per second of each model and number of candidates, in batches that fit, on one device."""
    import jax
    import numpy as np

    from benchmarks.speed import chips, sampling_bounds
    from dalle_jax.mesh import make_mesh
    from dalle_jax.sample import batches
    from dalle_jax.sample.engine import Engine, image_keys

    device, rows = jax.devices()[0], harness.Notes(args.out / "sampling.json")
    chip, mesh = chips.named_or_found(args.chip, device), make_mesh({}, devices=[device])
    for name in args.models:
        model = sampling_bounds.model(name)
        layout = model.config.layout
        engine = Engine(model, sampling_bounds.random_params(model, jax.random.key(0)), mesh=mesh, weights=args.weights)
        text_CT = layout.caption_ids(np.random.default_rng(0).integers(layout.text_vocab, size=64))[None]
        capacity, _ = engine.capacity(guided=False)
        for count in args.candidates:
            plans = batches.plan({0: count}, capacity=capacity)
            keys_CM = image_keys(np.arange(plans[0].prompts * plans[0].candidates).reshape(plans[0].prompts, -1))
            text = np.repeat(text_CT, plans[0].prompts, axis=0)
            draw(engine, text, keys_CM, steps=1)  # compiles
            work, seconds = functools.partial(draw, engine, text, keys_CM, batches=len(plans)), []
            while len(seconds) < args.rounds and sum(seconds) < args.enough:
                seconds.append(harness.seconds(work))
            taken, bound = statistics.median(seconds), sampling_bounds.seconds(engine, plans, chip)
            aim = {1: (ONE_SHARE, bound / taken, f"{ONE_SHARE:.0%} of the bound")}.get(count)
            if (name, count) in AIMS:
                aim = (AIMS[name, count], count / taken, f"{AIMS[name, count]} images/s")
            peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)  # so far, ascending sizes
            rows[f"{name} {count}"] = [
                name, count, f"{len(plans)} x {plans[0].prompts * plans[0].candidates}", f"{count / taken:.2f}",
                f"{taken:.2f}", f"{count / bound:.2f}", f"{bound / taken:.0%}", f"{peak / 1e9:.1f}",
                f"{aim[2]}: {'met' if aim[1] >= aim[0] else 'not met'}" if aim else "",
            ]  # fmt: skip
        del engine, work
    return [
        f"{device.device_kind}, figures of {chip.platform}:{chip.name}; random weights. The bound is the roofline of "
        "`sampling_bounds.py`; the peak is of the process so far. Aims are for one H200 in bfloat16.",
        "",
        *harness.table(
            "model | candidates | batches x images | images/s | seconds | bound images/s | share | peak GB | aim",
            rows.values(),
        ),
    ]


def main() -> None:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--chip", help="figures of the chip that is here, such as gpu:h200, if it is not known")
    parser.add_argument("--models", nargs="+", default=["0.4B", "1.3B", "12B"], help="of an accelerator's part")
    parser.add_argument("--candidates", nargs="+", type=int, default=list(COUNTS), help="of an accelerator's part")
    parser.add_argument("--weights", default="model", help="model or int8, of an accelerator's part")
    parser.add_argument("--enough", type=float, default=20.0, help="seconds after which a large batch is not repeated")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/sampling"), help="rows of an accelerator"
    )
    args = parser.parse_args()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        harness.two_cpus(THREADS)
    import jax

    on_cpu = jax.default_backend() == "cpu"
    part, section = (on_processor, "On a processor") if on_cpu else (on_accelerator, "On an accelerator")
    lines = [harness.machine(), *harness.command(args), *part(args)]
    harness.write(args.results / "sampling.md", "Sampling speed", lines, section=section)


if __name__ == "__main__":
    sys.exit(main())
