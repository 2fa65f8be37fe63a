"""How long a run takes to its first update, cold and started again: what compiled programs kept in the workdir save.

    python -m benchmarks.reliability.restart --out runs/restart            # again until it prints the table

A case is a training that is killed (`kill -9`) after its first checkpoints and given again, in turns on copies of its
workdir: with the programs that the first start kept, and with a JAX that keeps and reads none. Both go on to the same
update, and the digests of the whole training state must be the same: programs that were read back compute the same
bits as compiled ones. Cold is the first start.

first update   from the start of the loop to the end of the first update, `init` and `compile` of the run's ledger
numbers        from the start of the command until the numbers of the first update are in metrics.jsonl; the imports
               and the data are in it

Each call makes as many rounds as fit into --seconds; rows are the middle of all rounds.
"""

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

from benchmarks import harness
from dalle_jax.train.monitor import goodput, metrics

COMMON = {
    "run.log_every": 1, "run.validate_every": None, "run.picture_every": None, "run.checkpoint_every": 1,
    "run.keep_checkpoints": 1, "optimizer.schedule.warmup_steps": 0,
    "run.data.validation": None, "run.mesh.replica": 1, "run.mesh.fsdp": 1,
}  # fmt: skip
# name -> the dVAE's sizes, the config, what differs from it, updates to the end.
CASES = {
    "demo": ("configs/dvae.py:demo", {}, "configs/transformer.py:demo", {"run.steps": 12}),
    "24 layers, 1280 tokens": (
        "configs/dvae.py:paper",
        {"width": 16, "stem": 16},
        "configs/transformer.py:1b3",
        {
            "run.steps": 4, "batch_size": 2, "model.precision": "fp32", "model.width": 64, "model.heads": 1,
            "run.data.train": "scenes:train@256", "data.augment": "center", "data.bpe_dropout": 0.0,
            "data.english_only": False, "data.drop_boilerplate": False, "model.text_vocab": 384, "ema.every": 1,
        },
    ),
}  # fmt: skip
WAYS = {"cold": {}, "kept programs": {}, "compiled": {"JAX_ENABLE_COMPILATION_CACHE": "false"}}


def main() -> int:
    parser = harness.parser(__doc__, rounds=3, out="a folder for the runs; again to go on")
    parser.add_argument("--seconds", type=float, default=210, help="begin no round after this")
    args = parser.parse_args()
    rounds, until = harness.Notes(args.out / "rounds.json"), time.monotonic() + args.seconds
    for name in CASES:
        while len(rounds.get(name, [])) < args.rounds and time.monotonic() < until:
            rounds[name] = [*rounds.get(name, []), one_round(args.out, name)]
    if any(len(rounds.get(name, [])) < args.rounds for name in CASES):
        print("not all there yet: give the command again")
        return 1
    harness.write(args.results / "restart.md", "To the first update: cold, and started again", report(args, rounds))
    return 0


def one_round(out: pathlib.Path, name: str) -> dict:
    """Seconds and digests of one cold start and the two restarts."""
    words, folder = prepared(out, name), out / "round"
    shutil.rmtree(folder, ignore_errors=True)
    found = {"load": round(os.getloadavg()[0], 2)}
    for way, environment in WAYS.items():
        workdir = folder / way.replace(" ", "-")
        if way != "cold":
            shutil.copytree(folder / "killed", workdir)
        found[way] = start(words, workdir, environment, kill=way == "cold")
        if way == "cold":
            workdir.rename(folder / "killed")
        print(f"{name}, {way}: {found[way]}", flush=True)
    return found


def prepared(out: pathlib.Path, name: str) -> list[str]:
    """The command of a case, after its tokenizer and random dVAE are there."""
    dvae, sizes, file, values = CASES[name]
    folder = out / "parts" / name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    values = COMMON | values | harness.transformer_inputs(folder, dvae, **sizes)
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return [sys.executable, "-m", "dalle_jax.cli", "train", "--config", file, *overrides]


def start(words: list[str], workdir: pathlib.Path, environment: dict[str, str], *, kill: bool) -> dict:
    """One start: until a checkpoint is there and then kill -9, or until its end. Seconds, and the digest at the end."""
    before, done = ledger(workdir), steps_done(workdir)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | environment
    began = time.monotonic()
    with (workdir.parent.parent / "starts.log").open("a") as log:
        process = subprocess.Popen([*words, "--workdir", str(workdir)], env=environment, stdout=log, stderr=log)
    while steps_done(workdir) <= done and process.poll() is None:
        time.sleep(0.01)
    numbers = time.monotonic() - began
    if kill:
        while not list((workdir / "checkpoints").glob("[0-9]*/sha256.json")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    elif process.wait():
        raise SystemExit(f"a start ended with {process.returncode}: see {workdir.parent.parent}/starts.log")
    spent = ledger(workdir)
    seconds = {kind: round(spent[kind] - before[kind], 2) for kind in ("init", "compile")}
    found = {"numbers": round(numbers, 2), **seconds, "first update": round(sum(seconds.values()), 2)}
    if not kill:
        inspect = [sys.executable, "-m", "dalle_jax.cli", "inspect", str(workdir), "--json"]
        found["digest"] = json.loads(subprocess.run(inspect, check=True, capture_output=True).stdout)["state_sha256"]
    return found


def steps_done(workdir: pathlib.Path) -> int:
    """The newest update whose numbers are there."""
    return max((line["step"] for line in metrics.read(workdir / "metrics.jsonl")), default=0)


def ledger(workdir: pathlib.Path) -> dict[str, float]:
    found = goodput.read(workdir)
    return found["seconds"] if found else {"init": 0.0, "compile": 0.0}


def middle(rounds: list[dict], way: str, kind: str) -> float:
    return statistics.median(one[way][kind] for one in rounds)


def report(args, rounds: dict) -> list[str]:
    same = all(len({one[way]["digest"] for way in list(WAYS)[1:]}) == 1 for name in CASES for one in rounds[name])
    loads = [one["load"] for name in CASES for one in rounds[name]]
    rows = []
    for name in CASES:
        cold = {kind: middle(rounds[name], "cold", kind) for kind in ("first update", "numbers")}
        for way in WAYS:
            found = {k: middle(rounds[name], way, k) for k in ("init", "compile", "first update", "numbers")}
            first, numbers = (f"{found[kind] / cold[kind]:.0%}" for kind in cold)
            seconds = [f"{value:.2f}" for value in found.values()]
            rows.append((name, f"{'again, ' * (way != 'cold')}{way}", *seconds[:3], first, seconds[3], numbers))
    return [
        harness.machine(f"load {min(loads)} to {max(loads)} before the rounds"),
        *harness.command(args),
        "Seconds, the middle of the rounds. First update: init and compile of the run's ledger. Numbers: from the",
        "start of the command until the numbers of the first update are in metrics.jsonl.",
        "",
        *harness.table("case | start | init | compile | first update | of cold | numbers | of cold", rows),
        "",
        "The training states after the same updates, with programs read back and with compiled ones, "
        f"{'are the same bits' if same else 'DIFFER'} in every round.",
    ]


if __name__ == "__main__":
    sys.exit(main())
