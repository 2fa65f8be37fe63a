"""Does the demo transformer learn as well with less precise arithmetic? Loss curves against float32, three seeds.

    dalle-jax demo --workdir demo                                       # its dVAE and tokenizer are used
    PYTHONPATH=. python docs/make/numerics.py --demo demo --out runs/numerics       # again until it prints the table
    NPROC=8 XLA_FLAGS=--xla_force_host_platform_device_count=2 \
        PYTHONPATH=. python docs/make/numerics.py --demo demo --out runs/numerics --variants "fp32 on two" "powersgd 16"
    PYTHONPATH=. python docs/make/numerics_plots.py --out runs/numerics

Every variant trains `configs/transformer.py:demo` with AdamW instead of Muon for 2,000 updates from the same initial
parameters on the same batches as float32 does with that seed. A call makes what fits into --seconds and stops; the
same call goes on. What is compared is the training loss, averaged over the last 200 updates, and the validation loss:
the mean over the seeds of the difference to float32, next to the standard deviation of float32 over the seeds, which
is the noise between seeds. "fp32 on two" are two replicas on two emulated devices: sums in another order, so its
difference is what chance makes of the same run. "powersgd 16" are two that send 81 % less, "powersgd 24 in 2 pieces"
two of two devices each that send as little, each device a factorisation of rank 12 of its half of a matrix (it takes
four emulated devices). NPROC is the number of XLA's threads: emulated devices that share those of two cores wait for
each other for ever. The table has those seeds of a variant that are done.
"""

import os
import pathlib
import signal
import statistics
import time

import jax

from benchmarks import harness
from dalle_jax.train.monitor import metrics
from dalle_jax.train.run import train
from dalle_jax.train.settings import load_settings

STEPS, LAST = 2_000, 200
SEEDS = (0, 1, 2)
REFERENCE = "fp32"
TWO = {"run.mesh.replica": 2, "run.mesh.fsdp": 1}
VARIANTS = {
    REFERENCE: {},
    "moments bf16": {"optimizer.moments": "bf16"},
    "moments paper": {"optimizer.moments": "paper"},
    "fp16-global": {"model.precision": "fp16-global"},
    "fp16-paper": {"model.precision": "fp16-paper"},
    "fp32 on two": TWO,
    "powersgd 16": TWO | {"compression.rank": 16, "compression.format": "paper"},
    "powersgd 24 in 2 pieces": TWO | {"run.mesh.fsdp": 2, "compression.rank": 24, "compression.format": "paper"},
}
COMMON = {
    "run.steps": STEPS,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "run.log_every": 50,
    "run.validate_every": STEPS,
    "run.picture_every": None,
    "run.checkpoint_every": 500,
    "run.keep_checkpoints": 1,
}


def main() -> None:
    parser = harness.parser(__doc__, out="the runs; again to go on")
    parser.add_argument("--demo", type=pathlib.Path, required=True, help="a workdir of `dalle-jax demo`")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["fp32", "moments paper"])
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "programs"))
    deadline = time.monotonic() + args.seconds

    def stop_in_time(step, state):
        if time.monotonic() > deadline:
            os.kill(os.getpid(), signal.SIGTERM)  # the loop saves and returns

    for seed in args.seeds:
        for variant in args.variants:
            workdir = folder(args.out, variant, seed)
            if losses(workdir):
                continue
            if time.monotonic() > deadline:
                print("not done: the same command goes on")
                return
            words = COMMON | {
                "seed": seed,
                "frozen.image_tokenizer": args.demo / "dvae",
                "tokenizer": args.demo / "tokenizer.model",
            }
            words |= VARIANTS[variant]
            settings = load_settings("configs/transformer.py:demo", [f"--config.{k}={v}" for k, v in words.items()])
            result = train(settings, workdir, hooks=[(10, stop_in_time)], progress=False)
            print(f"{variant}, seed {seed}: {result.step} of {STEPS} updates, now {result.seconds:.0f} s", flush=True)
    found = {v: [losses(folder(args.out, v, seed)) for seed in SEEDS] for v in VARIANTS}
    variants = {variant: runs for variant, runs in found.items() if any(runs)}
    lines = [
        harness.machine(f"{len(jax.devices())} x {jax.devices()[0].device_kind}"),
        *harness.command(args, demo="DIR"),
        *table(variants),
    ]
    title = "Less precise arithmetic: does the demo learn as well?"
    harness.write(args.results / "numerics.md", title, lines)


def folder(out: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
    return out / f"{variant.replace(' ', '_')}_{seed}"


def losses(workdir: pathlib.Path) -> dict[str, float] | None:
    """Training loss over the LAST updates, validation loss and skipped updates of a finished run, else None."""
    lines = metrics.read(workdir / "metrics.jsonl")
    training = [line for line in lines if "train/loss" in line]
    validation = [line["validation/loss"] for line in lines if "validation/loss" in line and line["step"] == STEPS]
    if not validation:
        return None
    end = [line["train/loss"] for line in training if line["step"] > STEPS - LAST]
    return {"train": statistics.fmean(end), "validation": validation[-1], "skipped": training[-1]["train/skipped"]}


def by_seed(runs: list[dict | None], name: str, form: str) -> str:
    """The numbers of all seeds; '-' for one that is not done."""
    return ", ".join(format(run[name], form) if run else "-" for run in runs)


def table(variants: dict[str, list[dict | None]]) -> list[str]:
    """Differences to float32 seed by seed, their mean, and the noise."""
    reference, rows = variants.get(REFERENCE), []
    for variant, runs in variants.items():
        cells = []
        for kind in ("train", "validation"):
            both = [(run, base) for run, base in zip(runs, reference or runs, strict=True) if run and base]
            mean = statistics.fmean(run[kind] - base[kind] for run, base in both) if both else None
            cells += [by_seed(runs, kind, ".4f"), "-" if mean is None else f"{mean:+.4f}"]
        rows.append((variant, *cells, by_seed(runs, "skipped", ".0f")))
    lines = [
        f"`configs/transformer.py:demo` with AdamW, {STEPS:,} steps, seeds {', '.join(map(str, SEEDS))}. Losses in "
        f"nats; training: mean of the last {LAST} steps.",
        "",
        *harness.table(
            "variant | training loss, by seed | minus float32, mean | validation loss, by seed | minus float32, mean | "
            "skipped steps",
            rows,
        ),
    ]
    if reference and all(reference):
        noise = {kind: statistics.stdev(run[kind] for run in reference) for kind in ("train", "validation")}
        lines += [
            "",
            f"Noise, the standard deviation of float32 over the seeds: {noise['train']:.4f} in training, "
            f"{noise['validation']:.4f} in validation.",
        ]
    return lines


if __name__ == "__main__":
    main()
