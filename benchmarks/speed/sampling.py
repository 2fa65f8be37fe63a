"""Sampling speed: shared text and windows against neither, 8-bit options, large models on an accelerator.

    python benchmarks/sampling.py                            # on whatever JAX finds here: processor or accelerator
    python benchmarks/sampling.py --compile-for gpu:h200:1x1 # needs JAX's CUDA plugin, no GPU

On a processor (two threads, the shape of `compare.py`): 64 candidates of one caption, `ours`; the same number of images
as 64 captions of which each keeps its own text and all image positions, `plain`; all of a step but attention and its
cache, `rest`, which draws nonsense and bounds what sharing and windows can gain; and the engine's options. Each round
measures these three in turns, the first round the options too, and a
ratio is the middle one of the rounds. On an accelerator: the models of `sampling_bounds.py` with random weights in
bfloat16, and their share of the roofline. `--compile-for` asks the compiler of a chip that is not here for the bytes of
the same programs. Each of the three writes its own part of `benchmarks/results/sampling.json`, and the table of all
parts.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
import unittest.mock
from pathlib import Path

from peer_dalle_pytorch import SHAPE, THREADS
from peers import machine

from dalle_jax.cli import host_memory  # does not import JAX

RESULTS = Path(__file__).parent / "results"
CANDIDATES, LEAST = 64, 3.0
BARRED = ("ours", "plain", "rest")  # the second over the first has to reach LEAST, the second over the third can
COUNTS = (1, 64, 512)  # candidates of one caption, on an accelerator
# Name -> pattern, precision, and options of the engine.
WORKS = {
    "ours": ("paper", "fp32", {}),
    "plain": ("full", "fp32", {}),
    "rest": ("full", "fp32", {}),
    "bf16": ("paper", "bf16", {}),
    "int8 weights": ("paper", "fp32", {"weights": "int8"}),
}


def on_processor(args) -> dict:
    """Seconds of each round, bytes and logit errors of all works."""
    import jax
    import numpy as np

    from benchmarks.speed import sampling_bounds as bounds
    from benchmarks.speed.abstract_engine import weight_bytes
    from dalle_jax.models import build
    from dalle_jax.models.attention import cached
    from dalle_jax.sample.engine import Engine, image_keys

    sizes = {key: value for key, value in SHAPE.items() if key not in ("layers", "image_size")}
    sizes |= {"num_layers": SHAPE["layers"], "remat": "none", "scan": False}
    key, runs, works = jax.random.key(0), {}, {}
    for name, (pattern, precision, options) in WORKS.items():
        model = build("transformer", {**sizes, "pattern": pattern, "precision": precision})
        params = bounds.random_params(model, key)
        engine = Engine(model, params, **options)
        layout = model.config.layout
        text_T = layout.caption_ids(np.random.default_rng(0).integers(layout.text_vocab, size=layout.caption_len))
        captions = CANDIDATES if name == "plain" else 1
        text_CT, shape = np.stack([text_T] * captions), (captions, CANDIDATES // captions)
        step = bounds.step(engine, *shape)
        works[name] = {
            "weight_bytes": weight_bytes(engine),
            "cache_bytes_per_candidate": bounds.cache_bytes(model.config),
            "text_bytes": step.text,
            "step_bytes": step.weights + (0 if name == "rest" else step.text + step.windows),
            "step_operations": step.products + (0 if name == "rest" else step.attention),
            "seconds": [],
        }
        if name == "ours":
            exact = logits(engine, text_CT[:1])
        elif name not in BARRED:
            error = np.linalg.norm(logits(engine, text_CT[:1]) - exact) / np.linalg.norm(exact)
            works[name]["logit_error"] = float(error)
        runs[name] = lambda engine=engine, text=text_CT, shape=shape: engine.generate(
            text, image_keys(np.arange(CANDIDATES).reshape(shape))
        )
        attend = (lambda q, k, v, text, cache, *_, **__: (v, cache)) if name == "rest" else cached.attend
        with unittest.mock.patch.object(cached, "attend", attend):
            engine.tokens(engine.advance(engine.begin(text_CT, image_keys(np.zeros(shape))), 0, 1))  # compiles
    for index in range(args.rounds):
        for name in BARRED if index else WORKS:
            run = runs[name]
            began = time.perf_counter()
            run()
            works[name]["seconds"].append(time.perf_counter() - began)
            print(f"round {index + 1}: {name} {works[name]['seconds'][-1]:.2f} s", file=sys.stderr, flush=True)
    for work in works.values():
        work["images_per_second"] = CANDIDATES / statistics.median(work["seconds"])
        ratios = [other / own for own, other in zip(work["seconds"], works["ours"]["seconds"], strict=False)]
        work["speed_of_ours"] = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}

    def plain_over(name: str) -> dict:
        ratios = [p / o for p, o in zip(works["plain"]["seconds"], works[name]["seconds"], strict=True)]
        return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}

    ratio = plain_over("ours")
    met = {"least": LEAST, "met": ratio["ratio"] >= LEAST, "most": plain_over("rest")}
    return {"works": works, "against_plain": ratio | met}


def logits(engine, text_CT):
    """float32 [I, V] of one image of random codes, from the engine's own weights and cache."""
    import jax
    import numpy as np

    from dalle_jax.models import decoding

    config = engine.config
    codes_I = np.random.default_rng(1).integers(config.image_vocab, size=config.layout.image_len).astype(np.int32)
    previous_I1 = np.concatenate([[config.layout.start_of_image], codes_I[:-1]]).astype(np.int32)[:, None]

    @jax.jit
    def run(weights, text_CT):
        stores = decoding.prefill(config, *weights, text_CT)

        def one(cache, inputs):
            logits_VB, cache = decoding.decode(config, *weights, stores, cache, *reversed(inputs))
            return cache, logits_VB[:, 0]

        empty = decoding.empty_cache(config, 1)
        return jax.lax.scan(one, empty, (np.arange(config.layout.image_len), previous_I1))[1]

    return np.asarray(run(engine._weights, text_CT))


def on_accelerator(args) -> None:
    """Images per second of each model and number of candidates, in batches that fit, on one device."""
    import jax
    import numpy as np

    from benchmarks.speed import sampling_bounds as bounds
    from dalle_jax.mesh import make_mesh
    from dalle_jax.sample import batches
    from dalle_jax.sample.engine import Engine, image_keys

    device = jax.devices()[0]
    chip, mesh, rows = bounds.chip_of(device, args.chip), make_mesh({}, devices=[device]), []
    for name in args.models:
        model = bounds.model(name)
        layout, grid = model.config.layout, model.config.grid
        engine = Engine(model, bounds.random_params(model, jax.random.key(0)), mesh=mesh, **args.options)
        text_CT = layout.caption_ids(np.random.default_rng(0).integers(layout.text_vocab, size=64))[None]
        capacity, told = engine.capacity(guided=False)
        for count in args.candidates:
            plans = batches.plan({0: count}, capacity=capacity)
            keys_CM = image_keys(np.arange(plans[0].prompts * plans[0].candidates).reshape(plans[0].prompts, -1))
            text = np.repeat(text_CT, plans[0].prompts, axis=0)
            engine.tokens(engine.advance(engine.begin(text, keys_CM), 0, 1))  # compiles
            seconds = []
            while len(seconds) < args.rounds and sum(seconds) < args.enough:
                began = time.perf_counter()
                for _ in plans:
                    engine.tokens(engine.advance(engine.begin(text, keys_CM), 0, grid))
                seconds.append(time.perf_counter() - began)
            rows.append(
                {
                    **predicted(engine, name, count, plans, chip),
                    "seconds": seconds,
                    "images_per_second": count / statistics.median(seconds),
                    "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),  # so far, ascending sizes
                    "wave_told": told,
                }
            )
            rows[-1]["share"] = rows[-1]["images_per_second"] / rows[-1]["bound_images_per_second"]
            keep(args, "accelerator", {"device": device.device_kind, "chip": f"{chip.platform}:{chip.name}"}, rows)
        del engine


def predicted(engine, name: str, count: int, plans, chip) -> dict:
    """The roofline of `count` candidates in these batches."""
    from benchmarks.speed import sampling_bounds as bounds

    step = bounds.step(engine, plans[0].prompts, plans[0].candidates)
    seconds = engine.config.layout.image_len * step.seconds(chip) * len(plans)
    return {
        "model": name,
        "candidates": count,
        "waves": len(plans),
        "wave": plans[0].prompts * plans[0].candidates,
        "step": {"weights": step.weights, "text": step.text, "windows": step.windows, "operations": step.operations},
        "bound_images_per_second": count / seconds,
    }


def compile_for(args) -> None:
    """Bytes that the compiler of a chip wants for the same batches, and the roofline there."""
    from dalle_jax.preflight import topology as topologies

    pod = topologies.parse(args.compile_for)
    os.environ.update(topologies.environment(pod))  # before JAX is imported

    from benchmarks.speed import sampling_bounds as bounds
    from benchmarks.speed.abstract_engine import AbstractEngine, weight_bytes
    from dalle_jax.mesh import make_mesh
    from dalle_jax.sample import batches

    mesh, rows = make_mesh({}, devices=topologies.devices(pod)[:1]), []
    for name in args.models:
        engine = AbstractEngine(bounds.model(name), mesh=mesh, **args.options)
        free = pod.usable_bytes - weight_bytes(engine)
        capacity, told = engine.capacity(guided=False, free=free)
        for count in args.candidates:
            plans = batches.plan({0: count}, capacity=capacity)
            shape = plans[0].prompts, plans[0].candidates
            programs = {}
            for program, compiled in engine.compile(*shape).items():
                memory = compiled.memory_analysis()
                results = memory.output_size_in_bytes - memory.alias_size_in_bytes
                parts = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
                programs[program] = parts | {"total": sum(parts.values()) + results}
            # The compiler counts what a program reads, which is not all that is there: `begin` leaves the head alone.
            total = max(weight_bytes(engine), programs["begin"]["arguments"]) + programs["begin"]["total"]
            total = max(total - programs["begin"]["arguments"], programs["advance"]["total"])
            rows.append(
                {
                    **predicted(engine, name, count, plans, pod.chip),
                    "programs": programs,
                    "weight_bytes": weight_bytes(engine),
                    "counted_bytes": weight_bytes(engine) + engine.batch_bytes(*shape, guided=False),
                    "total_bytes": total,
                    "fits": total <= pod.usable_bytes,
                    "wave_told": told,
                }
            )
            keep(args, "compiled", {"topology": str(pod), "usable_bytes": pod.usable_bytes}, rows)


def keep(args, part: str, measured: dict, rows: list[dict]) -> None:
    """Write this part and the table. Its rows of other models and numbers of candidates, from earlier calls on the
    same chip, stay: a call that was cut off is gone on with by `--models`."""
    from sampling_report import table

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sampling.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    command = " ".join(["python benchmarks/sampling.py", *sys.argv[1:]])
    before = parts.get(part, {})
    if all(before.get(name) == value for name, value in measured.items()):
        of = lambda row: (row["model"], row["candidates"])  # noqa: E731
        rows = [row for row in before.get("rows", []) if of(row) not in set(map(of, rows))] + rows
        rows = sorted(rows, key=lambda row: (float(row["model"].rstrip("B")), row["candidates"]))
    about = {"date": datetime.date.today().isoformat(), "command": command, "machine": machine(), **measured}
    parts[part] = about | ({"rows": rows} if rows else {})
    path.write_text(json.dumps(parts, indent=1) + "\n")
    (args.out / "sampling.md").write_text(table(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile-for", metavar="POD", help="a chip that is not here, such as gpu:h200:1x1")
    parser.add_argument("--chip", help="figures of the chip that is here, such as gpu:h200, if it is not known")
    parser.add_argument("--models", nargs="+", default=["0.4B", "1.3B", "12B"], help="of an accelerator's part")
    parser.add_argument("--candidates", nargs="+", type=int, default=list(COUNTS), help="of an accelerator's part")
    parser.add_argument("--weights", default="model", help="model or int8, of an accelerator's part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--enough", type=float, default=20.0, help="seconds after which a large wave is not repeated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.options = {"weights": args.weights}
    if args.compile_for:
        compile_for(args)
    else:
        if hasattr(os, "sched_setaffinity") and os.environ.get("JAX_PLATFORMS") == "cpu":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
        host_memory.keep_freed()  # as every `dalle-jax` command does
        import jax

        if jax.default_backend() == "cpu":
            keep(args, "processor", on_processor(args), [])
        else:
            on_accelerator(args)
    print((args.out / "sampling.md").read_text())
    parts = json.loads((args.out / "sampling.json").read_text())
    return 0 if parts.get("processor", {}).get("against_plain", {}).get("met", True) else 1


if __name__ == "__main__":
    sys.exit(main())
