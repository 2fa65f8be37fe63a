"""What a VQGAN's time and memory go into, on two CPU threads; sections of `results/vqgan.md`.

    python -m benchmarks.peers.vqgan_cost layers
    python -m benchmarks.peers.vqgan_cost memory --peer-python PEER/bin/python

`layers` measures each kind of product of our f16 alone, and norms with swish: what they leave of the whole is the rest.
It counts the seconds that cores worked, so that what else the machine does matters less. `memory` runs each work of
`vqgan.py`, ours and the peer's (`peer_taming.py`), in a process of its own and says how large that became, with what
compiling takes.
"""

import collections
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness
from benchmarks.peers import vqgan
from benchmarks.peers.process import THREADS
from dalle_jax.models.vq.vqgan import GroupNorm
from dalle_jax.preflight import flops

NETWORK, SIDE, REPEATS = "f16", 256, 5
MATRIX = 2048  # rows and columns of a product to compare with
NORM, MATRICES = "norm and swish", "products of matrices: 1x1, attention, distances to codes"
OURS = (
    "import sys; from benchmarks.peers import process, vqgan; process.Works(vqgan.build_work).measure(sys.argv[1], 1)"
)


def core_seconds(work: Callable[[], Any]) -> float:
    """The middle of some calls, after one that compiles: seconds that cores worked for this process."""

    def once() -> float:
        began = time.process_time()
        jax.block_until_ready(work())
        return time.process_time() - began

    once()
    return statistics.median(once() for _ in range(REPEATS))


def layers() -> list[str]:
    """Lines with a table for each of encoding and decoding."""
    factor = jnp.ones((MATRIX, MATRIX))
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    rate = 2 * MATRIX**3 / core_seconds(lambda: product(factor, factor)) / 1e9
    lines = [f"For comparison, a product of two matrices of {MATRIX:,} rows: {rate:.0f} GFLOP/s a core."]
    (model, params), pictures = vqgan.tokenizer(NETWORK), vqgan.in_range(vqgan.pictures(SIDE))
    tokens = vqgan.tokens(NETWORK, SIDE).astype(np.int32)
    for verb, method, given in (("Encoding", "encode_tokens", pictures), ("Decoding", "decode_tokens", tokens)):
        whole = functools.partial(model.apply, method=method)
        rows = list(parts(jax.make_jaxpr(whole)(params, given).jaxpr))
        taken = core_seconds(functools.partial(jax.jit(whole), params, given))
        gflop, alone = (sum(row[i] for row in rows) for i in (2, 3))
        rows += [("the rest", "", 0.0, taken - alone), ("all", "", gflop, taken)]
        cells = [
            (what, times, *((f"{work:.1f}", f"{seconds:.3f}", f"{work / seconds:.0f}") if work else
                            ("", f"{seconds:.3f}", "")), f"{seconds / taken:.0%}")
            for what, times, work, seconds in rows
        ]  # fmt: skip
        header = (
            f"{verb}, {NETWORK}, a picture of {SIDE} x {SIDE} | times | GFLOP | core-seconds | GFLOP/s a core | share"
        )
        lines += ["", *harness.table(header, cells)]
    return lines


def parts(jaxpr) -> Iterator[tuple[str, int, float, float]]:
    """What a trace is made of: its name, how often it is there, and all its GFLOP and core-seconds."""
    found: dict[str, list] = {}
    for equation in equations(jaxpr):
        if name := name_of(equation):
            found.setdefault(name, []).append(equation)
    for name, alike in found.items():
        kinds = collections.Counter(str((e.params, [v.aval.shape for v in e.invars])) for e in alike)
        examples = {str((e.params, [v.aval.shape for v in e.invars])): e for e in alike}
        gflop = seconds = 0.0
        for kind, times in kinds.items():
            equation = examples[kind]
            work, args = alone(equation)
            seconds += times * core_seconds(functools.partial(jax.jit(work), *args))
            if not name.startswith(NORM):
                gflop += times * flops.traced(work, *args) / 1e9
        yield name, len(alike), gflop, seconds


def equations(jaxpr) -> Iterator[Any]:
    """Every equation of a trace that has no others inside."""
    for equation in jaxpr.eqns:
        held = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [value for value in held if hasattr(value, "eqns")]
        for each in inner:
            yield from equations(each)
        if not inner:
            yield equation


def name_of(equation) -> str:
    """Of the row that an equation counts in; '' for what is in the rest."""
    shapes = [value.aval.shape for value in equation.invars]
    match equation.primitive.name:
        case "conv_general_dilated":
            (_, H, W, _), (kernel, _, inputs, outputs) = shapes
            stride = ", stride 2" if equation.params["window_strides"][0] == 2 else ""
            return f"{kernel}x{kernel} convolution{stride}, {H} x {W}, {inputs} to {outputs} channels"
        case "dot_general" if math.prod(equation.outvars[0].aval.shape) > 1 << 14:
            return MATRICES
        case "logistic":  # every swish follows a norm
            _, H, W, channels = shapes[0]
            return f"{NORM}, {H} x {W}, {channels} channels"
    return ""


def alone(equation) -> tuple[Callable, list]:
    """What computes the same as an equation, or for a swish the norm before it too, and its arguments."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=value.aval.shape), value.aval.dtype) for value in equation.invars]
    if equation.primitive.name == "logistic":
        norm = GroupNorm(args[0].shape[-1], nnx.Rngs(0))
        return lambda x_BHWC: jax.nn.silu(norm(x_BHWC)), args
    return functools.partial(equation.primitive.bind, **equation.params), args


def memory(peer_python: str) -> list[str]:
    """Lines with how large the processes became that do each work once, ours and theirs."""
    rows = []
    for work in vqgan.WORKS:
        commands = (
            [sys.executable, "-c", OURS, work],
            [peer_python, "-W", "ignore", "-m", "benchmarks.peers.peer_taming", f"{work}_nchw", "--repeats", "1"],
        )
        ours, theirs = map(peak_gib, commands)
        rows.append((work, f"{ours:.2f} GiB", f"{theirs:.2f} GiB", f"{theirs / ours:.2f}x"))
        harness.log(f"{work}: {ours:.2f} and {theirs:.2f} GiB")
    return harness.table("work | ours | theirs, nchw | ratio", rows)


def peak_gib(command: list[str]) -> float:
    """The largest resident size of a process."""
    environment = os.environ | harness.KEEP_FREED
    with subprocess.Popen(command, cwd=harness.ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: its message is above")
    return usage.ru_maxrss / 2**20  # Linux counts KiB


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("what", choices=("layers", "memory"))
    parser.add_argument("--peer-python", help="the interpreter of the peer's environment, for memory")
    args = parser.parse_args()
    if args.what == "memory" and not args.peer_python:
        parser.error("memory needs --peer-python")
    harness.two_cpus(THREADS)
    lines = [harness.machine(), *harness.command(args, peer_python="PEER/bin/python")]
    lines += layers() if args.what == "layers" else memory(args.peer_python)
    harness.write(args.results / "vqgan.md", vqgan.TITLE, lines, section=args.what.capitalize())


if __name__ == "__main__":
    main()
