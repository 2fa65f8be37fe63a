"""Is a fused attention kernel worth its code? Each kind at the model's shapes: dense, blockwise and fused.

    python -m benchmarks.speed.attention                   # on a GPU or TPU: checks, then measures, then the table
    python -m benchmarks.speed.attention --tune            # also other blocks, warps and stages of the GPU kernels
    python -m benchmarks.speed.attention --predict gpu:h100   # anywhere: only what the shapes say

Checked first, on two heads: output and gradients of every way against dense attention in float32 with exact products.
Measured: forward, and forward with backward, of 8 sequences of 256 text and 1,024 image tokens in bfloat16, 16 and 62
heads of 64; the median of rounds in which all ways take turns. `cudnn` is `jax.nn.dot_product_attention` with a causal
mask, which is the kind full and no other.

A kernel stays if it takes at most 1 / 1.1 of the blockwise time, forward with backward, for the layers that the paper's
pattern has. The prediction counts bytes to and from memory and multiply-adds from the shapes:

    scores       12 bytes each forward, 26 with backward (preflight's figure), where they are arrays
    states       q, k, v, output and their gradients: 4 passes forward and 11 with backward; fused 4 and 16, as two
                 kernels of the backward pass read them again
    products     of all blocks that are computed, the masked part of them included; fused 2 forward and 9 with backward,
                 else 2 and 6

and takes the slower of both, at 85 % of the memory's peak and 35 % of the arithmetic's for small products.
The figures go to benchmarks/results/attention.json and .md after each kind and number of heads. A call begins no kind
after --minutes, and the next one goes on from there. A way that cannot run is a line that says why.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import attention_pattern
from dalle_jax.models.attention import blockwise, pallas, splash
from dalle_jax.models.attention.block_lists import block_lists
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight.estimate import MEMORY_SHARE, SCORE_BYTES
from dalle_jax.preflight.hardware import Chip, find_chip

RESULTS = pathlib.Path(__file__).parent.parent / "results"
PAPER = TransformerConfig()
SHAPE = {"text_len": PAPER.text_len, "grid": PAPER.grid}
LENGTH, HEAD_SIZE, BATCH, HEADS = PAPER.layout.length, PAPER.head_size, 8, (16, 62)
KINDS = attention_pattern.KINDS
LARGEST_ERROR = 2**-6  # of the largest value: bfloat16 rounds to 2**-9, weights, outputs and gradients of it once more
FORWARD_SCORE_BYTES = 12  # written in float32, read twice; weights in bfloat16 written and read, less what fuses
SMALL_PRODUCT_SHARE = 0.35
NEEDED = 1.1


# Ways to compute attention: (q, k, v, kind) -> output.


def dense(q, k, v, kind):
    mask = attention_pattern.allowed(kind, **SHAPE)
    return blockwise._attend_densely(q, k, v, mask)


def cudnn(q, k, v, kind):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def tuned(block, warps, stages, q, k, v, kind):
    return pallas.attend(q, k, v, kind, block=block, warps=warps, stages=stages, **SHAPE)


def ways(platform: str, kind: str, *, tune: bool) -> dict:
    found = {"dense": dense, "xla": functools.partial(_with_shape, blockwise.attend)}
    if platform == "tpu":
        return found | {"splash": functools.partial(_with_shape, splash.attend)}
    if platform == "gpu":
        found["pallas"] = functools.partial(_with_shape, pallas.attend)
        if kind == "full":
            found["cudnn"] = cudnn
        if tune:
            options = [(b, w, s) for b in (32, 64, 128) for w in (4, 8) for s in (1, 2, 3)]
            found |= {"pallas " + "/".join(map(str, o)): functools.partial(tuned, *o) for o in options}
    return found


def _with_shape(attend, q, k, v, kind):
    return attend(q, k, v, kind, **SHAPE)


def states(heads: int, batch: int):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (batch, LENGTH, heads, HEAD_SIZE)
    return [jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16) for key in keys]


def both_passes(attend, q, k, v, w):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(w)


def error(attend, kind: str) -> float:
    """Largest of output and gradients, of the largest value there, on two heads of one sequence."""
    given = states(2, 1)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(functools.partial(both_passes, functools.partial(dense, kind=kind)))(
            *(x.astype(jnp.float32) for x in given)
        )
    found = jax.jit(functools.partial(both_passes, functools.partial(attend, kind=kind)))(*given)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()) for a, b in pairs)


def measure(programs: dict, arguments, *, rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of one call, all programs taking turns."""
    seconds = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program(*arguments))
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            for _ in range(calls):
                out = program(*arguments)
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measured(args, rows: list[dict]) -> Iterator[list[dict]]:
    """The rows of each kind and number of heads that is not yet among `rows`, the paper's kinds first."""
    until = time.monotonic() + 60 * args.minutes
    for kind in sorted(KINDS, key=PAPER.kinds.count, reverse=True):
        left = [heads for heads in HEADS if (kind, heads) not in {(row["kind"], row["heads"]) for row in rows}]
        if not left or time.monotonic() > until:
            continue
        able, errors = {}, {}
        for name, way in ways(jax.default_backend(), kind, tune=args.tune).items():
            try:
                errors[name] = error(way, kind)
                able[name] = functools.partial(way, kind=kind)
            except Exception as refused:  # too much shared memory, no cuDNN, what a compiler does not know
                print(f"{kind} {name}: {(str(refused).splitlines() or [repr(refused)])[0]}", flush=True)
        for heads in left:
            q, k, v, w = states(heads, args.batch)
            forward = {name: jax.jit(way) for name, way in able.items()}
            both = {name: jax.jit(functools.partial(both_passes, way)) for name, way in able.items()}
            timing = {"rounds": args.rounds, "calls": args.calls}
            one, two = measure(forward, (q, k, v), **timing), measure(both, (q, k, v, w), **timing)
            print(f"{kind} {heads}: " + ", ".join(f"{name} {1e3 * two[name]:.3f} ms" for name in able), flush=True)
            yield [
                {"kind": kind, "heads": heads, "way": name, "error": errors[name], "forward": one[name]}
                | {"both": two[name], "wins": two["xla"] / two[name]}
                for name in able
            ]


# What the shapes say.


def scores(way: str, kind: str) -> int:
    """Pairs of one head and sequence that this way computes, allowed or not."""
    text, image = SHAPE["text_len"], SHAPE["grid"] ** 2
    if way == "dense":
        return LENGTH**2
    if way == "xla":
        rows, before = (1, 0) if kind == "column" else blockwise._block_rows(kind, SHAPE["grid"])
        return text**2 + image * (text + (rows + before) * SHAPE["grid"])
    block = {"pallas": pallas.BLOCK, "splash": splash.BLOCK}[way]
    order = attention_pattern.compact_order(kind, **SHAPE)
    return block**2 * block_lists(attention_pattern.allowed(kind, **SHAPE)[order][:, order], size=block).steps


def predicted(chip: Chip, batch: int) -> list[dict]:
    rows, fused = [], "splash" if chip.platform == "tpu" else "pallas"
    for kind in KINDS:
        for heads in HEADS:
            found = []
            for way in ("dense", "xla", fused):
                pairs = batch * heads * scores(way, kind)
                state = 2 * batch * heads * LENGTH * HEAD_SIZE
                moved = [4 * state, (16 if way == fused else 11) * state]
                if way != fused:
                    moved = [moved[0] + FORWARD_SCORE_BYTES * pairs, moved[1] + SCORE_BYTES * pairs]
                work = [2 * HEAD_SIZE * pairs * products for products in (2, 9 if way == fused else 6)]
                by_memory = [b / (MEMORY_SHARE * chip.memory_bandwidth) for b in moved]
                by_work = [f / (SMALL_PRODUCT_SHARE * chip.peak_flops["bf16"]) for f in work]
                forward, both = map(max, by_memory, by_work)
                found.append(
                    {"kind": kind, "heads": heads, "way": way, "bytes_forward": moved[0], "bytes_both": moved[1]}
                    | {"forward": forward, "both": both}
                )
            baseline = next(row["both"] for row in found if row["way"] == "xla")
            rows += [row | {"wins": baseline / row["both"]} for row in found]
    return rows


# The results file.


def table(parts: dict) -> str:
    lines = ["# Attention kernels", "", f"Model shapes: {LENGTH} tokens, heads of {HEAD_SIZE}, bfloat16.", ""]
    if "measured" in parts:
        about = parts["measured"]
        lines += [f"## Measured on {about['device']}, batch {about['batch']}", "", f"`{about['command']}`", ""]
        lines += ["| kind | heads | way | error | forward ms | with backward ms | of xla's speed |"]
        lines += ["|---|---:|---|---:|---:|---:|---:|"]
        lines += [
            f"| {r['kind']} | {r['heads']} | {r['way']} | {r['error']:.1e} | {1e3 * r['forward']:.3f} | "
            f"{1e3 * r['both']:.3f} | {r['wins']:.2f} |"
            for r in about["rows"]
        ]
        lines += ["", *verdict(about["rows"]), ""]
    else:
        lines += [
            "**Not run on a GPU or TPU yet.** Until a measurement shows 1.1 times the speed of `xla` or more, `xla` is",
            "the default and the kernels are there to be tried; one that does not reach it goes.",
            "",
        ]
    for name, about in parts.items():
        if name.startswith("predicted"):
            lines += [f"## Predicted for {about['chip']}, batch {about['batch']}", "", f"`{about['command']}`", ""]
            lines += ["| kind | heads | way | GB forward | GB with backward | ms forward | ms with backward | wins |"]
            lines += ["|---|---:|---|---:|---:|---:|---:|---:|"]
            lines += [
                f"| {r['kind']} | {r['heads']} | {r['way']} | {r['bytes_forward'] / 1e9:.2f} | "
                f"{r['bytes_both'] / 1e9:.2f} | {1e3 * r['forward']:.2f} | {1e3 * r['both']:.2f} | {r['wins']:.2f} |"
                for r in about["rows"]
            ]
            lines += [""]
    return "\n".join(lines)


def verdict(rows: list[dict]) -> list[str]:
    """Of each kernel for the paper's layers together (47 row, 16 column, 1 convolution), once all are measured."""
    layers = {kind: PAPER.kinds.count(kind) for kind in KINDS}
    lines = []
    for heads in HEADS:
        of = {(r["kind"], r["way"]): r["both"] for r in rows if r["heads"] == heads}
        total = lambda way, of=of: sum(n * of[kind, way] for kind, n in layers.items() if n)  # noqa: E731
        for way in ("pallas", "splash"):
            if all((kind, way) in of for kind, n in layers.items() if n):
                wins = total("xla") / total(way)
                wrong = any(r["way"] == way and not r["error"] <= LARGEST_ERROR for r in rows)
                fate = "is wrong" if wrong else "stays" if wins >= NEEDED else "goes: less than 1.1"
                lines.append(f"The paper's 64 layers at {heads} heads: {way} is {wins:.2f} times as fast; it {fate}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", metavar="CHIP", help="no measurement; a chip such as gpu:h100 or tpu:v5p")
    parser.add_argument("--tune", action="store_true", help="other blocks, warps and stages too")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no kind after this (default 8)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    path = args.out / "attention.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "date": datetime.date.today().isoformat(),
        "batch": args.batch,
        "command": "python -m benchmarks.speed.attention",
    }
    if args.predict:
        chip = find_chip(*args.predict.split(":"))
        about["command"] += f" --predict {args.predict}"
        parts[f"predicted {chip.name}"] = about | {"chip": chip.name, "rows": predicted(chip, args.batch)}
    elif jax.default_backend() == "cpu":
        parser.error("expected a GPU or TPU, got cpu: use --predict gpu:h100 for what the shapes say")
    else:
        about |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        about["command"] += " --tune" * args.tune
        before = parts.get("measured", {})
        rows = before["rows"] if before.get("missing") and about.items() <= before.items() else []
        for more in measured(args, rows):
            rows += more
            done = {(row["kind"], row["heads"]) for row in rows}
            missing = [f"{kind} {heads}" for kind in KINDS for heads in HEADS if (kind, heads) not in done]
            parts["measured"] = about | {"rows": rows, "missing": missing}
            write(parts, path)
    write(parts, path)
    print(path.with_suffix(".md").read_text())
    found = parts.get("measured", {"rows": [], "missing": []})
    if wrong := [(r["kind"], r["way"], r["error"]) for r in found["rows"] if not r["error"] <= LARGEST_ERROR]:
        sys.exit(f"expected errors up to {LARGEST_ERROR}, got {wrong}")
    if found["missing"] and not args.predict:
        sys.exit(f"not measured yet: {', '.join(found['missing'])}; give the command again")


def write(parts: dict, path: pathlib.Path) -> None:
    path.write_text(json.dumps(parts, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(parts))


if __name__ == "__main__":
    main()
