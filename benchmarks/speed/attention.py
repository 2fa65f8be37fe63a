"""Is a fused attention kernel worth its code? Each kind at the model's shapes: dense, blockwise and fused.

    python -m benchmarks.speed.attention --out runs/attention          # on a GPU or TPU: checks, then measures
    python -m benchmarks.speed.attention --out runs/attention --tune   # other blocks, warps and stages too

Checked first, on two heads: output and gradients of every way against dense attention in float32 with exact products.
Measured: forward, and forward with backward, of 8 sequences of 256 text and 1,024 image tokens in bfloat16, 16 and 62
heads of 64; the median of rounds in which all ways take turns. `cudnn` is `jax.nn.dot_product_attention` with a causal
mask, which is the kind full and no other. A kernel stays if it takes at most 1 / 1.1 of the blockwise time, forward
with backward, for the layers that the paper's pattern has.

A call begins no kind after --minutes, and the next one goes on from there. A way that cannot run is a line that says
why.
"""

import functools
import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from dalle_jax import attention_pattern
from dalle_jax.models.attention import blockwise, pallas, splash
from dalle_jax.models.transformer import TransformerConfig

PAPER = TransformerConfig()
SHAPE = {"text_len": PAPER.text_len, "grid": PAPER.grid}
LENGTH, HEAD_SIZE, BATCH, HEADS = PAPER.layout.length, PAPER.head_size, 8, (16, 62)
KINDS = ("row", "column", "conv", "full")
LARGEST_ERROR = 2**-6  # of the largest value: bfloat16 rounds to 2**-9, weights, outputs and gradients of it once more
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

    def seconds(program) -> float:
        return harness.seconds(lambda: [program(*arguments) for _ in range(calls)][-1]) / calls

    for program in programs.values():
        jax.block_until_ready(program(*arguments))
    works = {name: functools.partial(seconds, program) for name, program in programs.items()}
    return {name: statistics.median(found) for name, found in harness.in_turns(works, rounds).items()}


def measured(kind: str, args) -> list[dict]:
    """The rows of one kind: every way that works here, at each number of heads."""
    able, errors, rows = {}, {}, []
    for name, way in ways(jax.default_backend(), kind, tune=args.tune).items():
        try:
            errors[name] = error(way, kind)
            able[name] = functools.partial(way, kind=kind)
        except Exception as refused:  # too much shared memory, no cuDNN, what a compiler does not know
            harness.log(f"{kind} {name}: {(str(refused).splitlines() or [repr(refused)])[0]}")
    for heads in HEADS:
        q, k, v, w = states(heads, args.batch)
        forward = {name: jax.jit(way) for name, way in able.items()}
        both = {name: jax.jit(functools.partial(both_passes, way)) for name, way in able.items()}
        timing = {"rounds": args.rounds, "calls": args.calls}
        one, two = measure(forward, (q, k, v), **timing), measure(both, (q, k, v, w), **timing)
        rows += [
            {"kind": kind, "heads": heads, "way": name, "error": errors[name], "forward": one[name]}
            | {"both": two[name], "wins": two["xla"] / two[name]}
            for name in able
        ]
    return rows


def verdict(rows: list[dict]) -> list[str]:
    """Of each kernel for the paper's layers together (47 row, 16 column, 1 convolution), once all are measured."""
    layers = {kind: count for kind in KINDS if (count := PAPER.kinds.count(kind))}
    lines = []
    for heads, way in itertools.product(HEADS, ("pallas", "splash")):
        of = {(row["kind"], row["way"]): row for row in rows if row["heads"] == heads}
        if all((kind, way) in of for kind in layers):
            xla, own = (sum(n * of[kind, w]["both"] for kind, n in layers.items()) for w in ("xla", way))
            wrong = any(row["way"] == way and not row["error"] <= LARGEST_ERROR for row in rows)
            fate = "is wrong" if wrong else "stays" if xla / own >= NEEDED else f"goes: less than {NEEDED}"
            lines.append(f"The paper's 64 layers at {heads} heads: {way} is {xla / own:.2f} times as fast; it {fate}.")
    return lines


def main() -> int:
    parser = harness.parser(__doc__, rounds=7, out="a folder; again to go on")
    parser.add_argument("--tune", action="store_true", help="other blocks, warps and stages too")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no kind after this (default 8)")
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        parser.error("expected a GPU or TPU, got cpu: there is nothing to measure here")
    notes, until = harness.Notes(args.out / "attention.json"), time.monotonic() + 60 * args.minutes
    names = {kind: f"{kind}, batch {args.batch}" for kind in sorted(KINDS, key=PAPER.kinds.count, reverse=True)}
    for kind, name in names.items():
        if name not in notes and time.monotonic() <= until:
            notes[name] = measured(kind, args)
    rows = [row for name in names.values() for row in notes.get(name, [])]
    cells = [
        (row["kind"], row["heads"], row["way"], f"{row['error']:.1e}", f"{1e3 * row['forward']:.3f}")
        + (f"{1e3 * row['both']:.3f}", f"{row['wins']:.2f}")
        for row in rows
    ]
    lines = [
        harness.machine(jax.devices()[0].device_kind),
        *harness.command(args),
        f"{LENGTH} tokens, heads of {HEAD_SIZE}, bfloat16, {args.batch} sequences.",
        "",
        *harness.table("kind | heads | way | error | forward ms | with backward ms | of xla's speed", cells),
        "",
        *verdict(rows),
    ]
    harness.write(args.results / "attention.md", "Attention kernels", lines)
    if missing := [name for name in names.values() if name not in notes]:
        print(f"not measured yet: {'; '.join(missing)}; give the command again")
    if wrong := [(row["kind"], row["way"], row["error"]) for row in rows if not row["error"] <= LARGEST_ERROR]:
        print(f"expected errors up to {LARGEST_ERROR}, got {wrong}")
    return int(bool(missing or wrong))


if __name__ == "__main__":
    sys.exit(main())
