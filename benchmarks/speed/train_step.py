"""Speed and memory of the training update: one call measures a list of variants and prints one table.

    python -m benchmarks.speed.train_step --config configs/transformer.py:demo --out runs/step --seconds 5 \
        --variants "" "batch_size=32" "model.remat=full" "model.pattern=full"
    python -m benchmarks.speed.train_step --suite sparse-dense --out runs/sparse-dense # again until it prints the table
    bash -c 'source launch/xla_flags.sh gpu; python -m benchmarks.speed.train_step --suite 1b3 --out runs/1b3'
    bash -c 'source launch/xla_flags.sh gpu; python -m benchmarks.speed.train_step --suite flags --out runs/flags'

A variant is `key=value` words that change the config, and flags of XLA (`--xla...`), which come after those of the
environment; '' is the config itself. `--config.key=value` changes all of them.
Each is measured in a process of its own by `train_step_measure.py`, which says how, and a variant that fails (out of
memory) is a row that says so. What was measured stays in --out as soon as it is there; a call that ran out of its
--minutes, by which its last variant is ended, goes on when it is given again, also on another machine that has the
folder. Where even JAX or the device is missing the call ends at once, and nothing is noted.

MFU counts the model's own products, forward and backward, and of attention only the pairs of query and key that the
mask allows (`preflight/flops.py`); HFU what is computed, rematerialization and the encoding of the pictures included.
Both are shares of the data sheet's peak for dense arithmetic in the config's precision; on a CPU, which has no such
sheet, of what one large matrix product reaches there. The roofline is the time that the peak, or the memory's
bandwidth, allows at best (`preflight/roofline.py`, at 100 %).
"""

import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import harness

MEASURE = ("-m", "benchmarks.speed.train_step_measure")
READY = "ready"  # what it prints when the devices are there
OVERRIDE = "--config."


@dataclasses.dataclass(frozen=True)
class Suite:
    """A fixed list of variants. common: changes of all. dvae: other sizes of the frozen dVAE. seconds: to time each
    program for. platform: JAX's name of what it is for; any by default."""

    config: str
    common: Mapping[str, Any]
    variants: tuple[str, ...]
    dvae: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 10.0
    platform: str = ""


SUITES = {
    # One H100 or H200, 1280 tokens. The first rows matter most, if time runs out.
    "1b3": Suite(
        "configs/transformer.py:1b3",
        {"batch_size": 16, "model.remat": "dots"},
        (
            "",
            "model.pattern=full",
            "model.attention=pallas",
            "model.scan=False",
            "model.scan=False batch_size=32",
            "model.scan=False model.attention=pallas",
            "model.scan=False model.pattern=full",
            "batch_size=24",
            "model.remat=full batch_size=64",
            "model.remat=attention batch_size=8",
            "model.remat=none batch_size=4",
            "model.remat=none batch_size=4 model.pattern=full",
            "optimizer.moments=bf16 storage.params=bf16",
            "batch_size=64 accumulate=4",
            "model.precision=fp32 batch_size=8",
        ),
        seconds=6.0,
        platform="gpu",
    ),
    # Layers of the paper's width on one H100 or H200. Heads, loss and dVAE are in the MFU, which is that of the layers
    # at least.
    "12b-layers": Suite(
        "configs/transformer.py:12b",
        {"batch_size": 16, "model.num_layers": 9, "model.remat": "dots", "run.mesh.replica": 1, "run.mesh.fsdp": 1},
        (
            "",
            "model.num_layers=5",
            "model.scan=False",
            "model.attention=pallas",
            "model.remat=full batch_size=32",
            "model.remat=none batch_size=4",
            "model.pattern=full",
        ),
        seconds=6.0,
        platform="gpu",
    ),
    # Each flag of launch/xla_flags.sh turned off, on all GPUs of a machine.
    "flags": Suite(
        "configs/transformer.py:1b3",
        {"batch_size": 16, "model.remat": "dots", "run.mesh.replica": 1, "run.mesh.fsdp": None},
        (
            "",
            "--xla_gpu_enable_latency_hiding_scheduler=false",
            "--xla_gpu_enable_pipelined_all_gather=false",
            "--xla_gpu_enable_pipelined_reduce_scatter=false",
            "--xla_gpu_enable_pipelined_all_reduce=false",
            "--xla_gpu_enable_while_loop_double_buffering=false",
            "--xla_gpu_all_gather_combine_threshold_bytes=31457280",
            "--xla_gpu_reduce_scatter_combine_threshold_bytes=31457280",
            "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN",
        ),
        seconds=6.0,
        platform="gpu",
    ),
    # The paper's pattern against dense causal attention of our own, all 1280 positions, narrow enough for a CPU.
    "sparse-dense": Suite(
        "configs/transformer.py:1b3",
        {"model.precision": "fp32", "model.num_layers": 8, "model.width": 128, "model.heads": 2, "batch_size": 2},
        (
            "model.remat=none",
            "model.remat=none model.pattern=full",
            "model.remat=full",
            "model.remat=full model.pattern=full",
        ),
        dvae={"width": 16, "stem": 16},
        seconds=4.0,
    ),
}  # fmt: skip


def main() -> int:
    parser = harness.parser(__doc__, out="a folder; again to go on")
    parser.add_argument("--suite", choices=SUITES, help="instead of --config and --variants")
    parser.add_argument("--config", metavar="FILE.py:VARIANT")
    parser.add_argument("--variants", nargs="+", default=[""], metavar="'key=value ...'")
    parser.add_argument("--seconds", type=float, help="to time each program for (default 10, or the suite's)")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default 9)")
    parser.add_argument("--name", help="of the file in benchmarks/results (default: the suite's); none without")
    words = sys.argv[1:]
    common = dict(word.removeprefix(OVERRIDE).split("=", 1) for word in words if word.startswith(OVERRIDE))
    args = parser.parse_args([word for word in words if not word.startswith(OVERRIDE)])
    if bool(args.suite) == bool(args.config):
        parser.error("expected one of --suite and --config")
    suite = SUITES[args.suite] if args.suite else Suite(args.config, {}, tuple(args.variants))
    if args.seconds:
        suite = dataclasses.replace(suite, seconds=args.seconds)
    suite = dataclasses.replace(suite, common={**suite.common, **common})
    rows = measured(suite, args.out, until=time.monotonic() + 60 * args.minutes)
    lines = table(suite, rows, harness.command(args))
    if missing := [variant for variant in suite.variants if variant not in rows]:
        print("\n".join(lines))
        print(f"not measured yet: {', '.join(map(title, missing))}; give the command again")
        return 1
    name = args.name or args.suite
    path = args.results / f"train_step_{name}.md" if name else args.out / "table.md"
    harness.write(path, f"The training step of {suite.config}", lines)
    return 0


def measured(suite: Suite, out: pathlib.Path, *, until: float) -> dict[str, dict]:
    """variant -> its figures, or {'failed': why}; those of earlier calls included. Ends by `until`, a monotonic time.

    Raises:
      SystemExit: a variant without flags of its own did not get as far as its devices, so none would.
    """
    rows = harness.Notes(out / "rows.json")
    alone = True  # whether the variant has the whole call
    for variant in suite.variants:
        began, load = time.monotonic(), os.getloadavg()[0]
        if variant in rows or began > until:
            continue
        row = measure(suite, variant, seconds=until - began)
        if "cut off" in row and not alone:
            break  # the next call begins with it
        about = {"date": datetime.date.today().isoformat(), "load_before": round(load, 2)}
        rows[variant], alone = row | about, False
        harness.log(f"{title(variant)}: {time.monotonic() - began:.0f} s")
    return rows


def measure(suite: Suite, variant: str, *, seconds: float) -> dict[str, Any]:
    """Figures of one variant, or {'failed': why}, also with 'cut off' where it was still at it after `seconds`."""
    changes, flags = parse(variant)
    asked = {
        "config": suite.config,
        "values": {**suite.common, **changes},
        "seconds": suite.seconds,
        "dvae": suite.dvae,
        "platform": suite.platform,
    }
    environment = os.environ | {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()}
    words = [sys.executable, *MEASURE, json.dumps(asked)]
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {seconds:.0f} s", "cut off": True}
    found = [line for line in done.stdout.splitlines() if line.startswith("{") and line.endswith("}")]
    if found:
        return json.loads(found[-1])
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith(" ")]
    why = (lines or [f"status {done.returncode}"])[-1][:200]
    if READY not in done.stdout and not flags:
        sys.exit(f"{title(variant)}: {why}")
    return {"failed": why}


def parse(variant: str) -> tuple[dict[str, str], list[str]]:
    """Changes of the config and flags of XLA."""
    words = variant.split()
    flags = [word for word in words if word.startswith("--xla")]
    return dict(word.split("=", 1) for word in words if word not in flags), flags


def title(variant: str) -> str:
    return variant.replace("model.", "") or "as it is"


def table(suite: Suite, rows: Mapping[str, dict], command: list[str]) -> list[str]:
    """Speed and memory of every variant as lines of Markdown."""
    good = {variant: row for variant, row in rows.items() if "failed" not in row}
    if not good:
        return [f"{title(variant)}: {row['failed']}" for variant, row in rows.items()]
    first = next(iter(good.values()))
    values = " ".join(f"{key}={value}" for key, value in suite.common.items())
    sizes = " ".join(f"{key} {value}" for key, value in suite.dvae.items())
    loads = [row["load_before"] for row in good.values()]
    best = {what: max(row[what] for row in good.values()) for what in ("matmul_flops", "copy_bytes_per_second")}
    reached = (
        f"a large matrix product reaches {best['matmul_flops'] / 1e12:,.4g} TFLOP/s, a copy "
        f"{best['copy_bytes_per_second'] / 1e9:,.4g} GB/s"
    )
    if first["chip"]:
        reached = f"the data sheet of {first['chip']} says {first['peak_flops'] / 1e12:,.4g} TFLOP/s; {reached}"
    return [
        f"{first['date']}; {first['device']}, {first['host']}, load average {min(loads)} to {max(loads)} before the "
        "variants.",
        *command,
        f"All with {values or 'nothing changed'}{f'; a dVAE of {sizes}' if sizes else ''}. "
        f"{reached[0].upper()}{reached[1:]}.",
        "",
        "MFU: the model's products, of attention only the pairs that the mask allows. HFU: with what is computed again",
        "and the encoding of images. Roofline: the time that peak and memory allow, of the time taken. Memory: what",
        "the compiler asks for, of one device, with everything the run holds there. Peak: the largest amount ever in",
        "use, of the device's memory or, on a CPU, of the process, compiling included.",
        "",
        *harness.table(
            "variant | batch | s a step | tokens/s | MFU | HFU | roofline | memory, GB | peak, GB | compile, s",
            [speed_row(variant, row, best) for variant, row in rows.items()],
        ),
    ]


def speed_row(variant: str, row: Mapping[str, Any], best: Mapping[str, float]) -> list[str]:
    """Cells of the first table. best: what the machine reached in any row; on a CPU that is the peak."""
    if "failed" in row:
        return [title(variant), "", f"failed: {row['failed']}", *[""] * 7]
    seconds, least = row["step_seconds"], dict(row["roofline_seconds"])
    if row["chip"]:
        peak = row["peak_flops"]
    else:
        peak = best["matmul_flops"]
        least["compute"] *= row["matmul_flops"] / peak
        least["memory"] *= row["copy_bytes_per_second"] / best["copy_bytes_per_second"]
    mfu, hfu = (row[f"{what}_flops_per_device"] / seconds / peak for what in ("model", "executed"))
    sizes = (f"{row[f'{what}_bytes'] / 1e9:.2f}" for what in ("memory", "peak"))
    return [
        title(variant), str(row["batch_size"]), f"{seconds:.4g}", f"{row['tokens_per_second']:,.0f}", f"{mfu:.1%}",
        f"{hfu:.1%}", f"{max(least.values()) / seconds:.0%}", *sizes, f"{row['compile_seconds']:.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
