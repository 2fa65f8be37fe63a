"""Kill a training run at random moments, start it again, and see whether it ends as if nothing had happened.

    python -m benchmarks.reliability.soak --out runs/soak                  # 20 kills -9 of one process
    python -m benchmarks.reliability.soak --out runs/soak --processes 2    # of one or of all of two

A straight run of a tiny dVAE on generated scenes gives the digest of its whole training state. A second one is killed
with SIGKILL, in turns at a random moment of training, while a checkpoint is being written (its temporary folder is
there), and at a random moment from the start of the process on; each time the same command goes on. With several
processes one of them, or all, are killed; the survivors must end by themselves. Passes if the digests are the same.

Goodput. A tiny model makes an update in milliseconds and writes a checkpoint a second, so its own goodput says nothing
about a run whose updates take seconds. What a fault and a checkpoint cost is therefore measured, and the time between
faults, T, is simulated:

    R  seconds from a kill to the end of the first update after it (the ledger's down + init + compile, without what
       the killed process did after its last entry), the mean over the restarts that no further kill cut off; programs
       come from the workdir, where the first start kept them
    d  seconds that the loop waits for a checkpoint, of the straight run; its wait for the last one's end is in it
    C  seconds between checkpoints, the best for these: sqrt(2 d T) (Young 1974)

    goodput = T / (T + R + C / 2 + d T / C)        C / 2: the updates that a fault loses

The figures go into benchmarks/results/soak.md and .json, one row for each number of processes.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

STEPS, EVERY = 2_000, 50
ALONE = 200  # updates between checkpoints of the straight run: one is complete before the next begins
EXIT_RESTART = 75  # of a process whose peer was killed: the launchers start it again
MOMENTS = ("in training", "in a write", "at any moment", "in a write")
CONFIG = {
    "steps": STEPS, "batch_size": 8, "log_every": 50, "validate_every": 0, "picture_every": 0,
    "model.image_size": 32, "model.vocab": 8, "model.width": 8, "model.stem": 4,
    "model.patch": 4, "processes.start_seconds": 30, "processes.hang_seconds": 15, "processes.compile_seconds": 60,
    "data.image_size": 32, "data.train": "scenes:train@32", "data.validation": "", "data.threads": 1,
}  # fmt: skip
FAULTS = (3, 5, 10, 30)  # minutes between two
RESULTS = pathlib.Path(__file__).parent.parent / "results"
LIMIT = 600  # seconds that a single start may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    load = os.getloadavg()[0]
    soak = Soak(args)
    print(f"straight run of {args.steps} updates on {args.processes} process(es)", flush=True)
    start = time.monotonic()
    soak.start("straight", every=ALONE)
    if soak.wait() != 0:
        raise SystemExit(f"the straight run ended with {soak.codes()}: see {args.out}/straight.log")
    seconds = time.monotonic() - start
    wanted = soak.inspect("straight")
    print(f"  {seconds:.0f} s, state sha256 {wanted['state_sha256']}", flush=True)
    kills = soak.kill_and_resume("killed", wanted["goodput"]["seconds"]["step"])
    found = soak.inspect("killed")
    same = all(found[key] == wanted[key] for key in ("state_sha256", "parameters_sha256", "step", "data"))
    print(f"{kills} kills, state sha256 {found['state_sha256']}: {'the same' if same else 'NOT THE SAME'}")
    restart = statistics.mean(soak.restarts)
    write = wanted["goodput"]["seconds"]["checkpoint"] / math.ceil(args.steps / ALONE)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.reliability.soak --processes {args.processes} --kills {args.kills} "
        f"--steps {args.steps} --seed {args.seed} --out DIR",
        "machine": f"{os.cpu_count()} CPU cores, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after, "
        f"Python {platform.python_version()}",
        "kills": kills,
        "same": same,
        "state_sha256": [wanted["state_sha256"], found["state_sha256"]],
        "seconds_straight": wanted["goodput"]["seconds"],
        "seconds_killed": found["goodput"]["seconds"],
        "restarts": [round(seconds, 2) for seconds in soak.restarts],
        "restart_cpu": round(statistics.mean(soak.cpu), 2),
        "R": round(restart, 2),
        "d": round(write, 3),
        "goodput": {str(minutes): goodput(60 * minutes, restart, write) for minutes in FAULTS},
    }
    write_results(args.results, args.processes, result)
    return 0 if same and kills == args.kills else 1


class Soak:
    def __init__(self, args: argparse.Namespace):
        self._args, self._random, self._processes = args, random.Random(args.seed), []
        self._environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.restarts, self.cpu = [], []  # seconds of those that could be measured

    def start(self, name: str, *, every: int = EVERY) -> None:
        """All processes of one run, in the background."""
        config = CONFIG | {"steps": self._args.steps, "checkpoint_every": every}
        words = [sys.executable, "-m", "dalle_jax.cli", "train", "--config", "configs/dvae.py:demo"]
        words += [f"--config.{key}={value}" for key, value in config.items()]
        words += ["--workdir", str(self._args.out / name)]
        count, self._processes = self._args.processes, []
        port = _free_port()
        for index in range(count):
            together = [f"--coordinator=localhost:{port}", f"--num-processes={count}", f"--process-id={index}"]
            with (self._args.out / f"{name}.log").open("a") as log:
                process = subprocess.Popen(
                    words + together * (count > 1), env=self._environment, stdout=log, stderr=subprocess.STDOUT
                )
            self._processes.append(process)

    def wait(self) -> int:
        """Until all have ended; the first status that is not 0, or 0."""
        until = time.monotonic() + LIMIT
        for process in self._processes:
            process.wait(max(1, until - time.monotonic()))
        return next((code for code in self.codes() if code), 0)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def inspect(self, name: str) -> dict:
        words = [sys.executable, "-m", "dalle_jax.cli", "inspect", str(self._args.out / name), "--json"]
        return json.loads(subprocess.run(words, env=self._environment, check=True, capture_output=True).stdout)

    def kill_and_resume(self, name: str, seconds: float) -> int:
        """Kills until there were enough and lets the run end; how many there were. seconds: of all its updates."""
        kills, folder, before = 0, self._args.out / name / "checkpoints", None
        while True:
            self.start(name)
            kind, newest = MOMENTS[kills % len(MOMENTS)], self._newest(folder)
            if kills == self._args.kills or not self._wait_for(kind, folder, seconds / self._args.kills):
                code = self.wait()
                if code == 0:
                    return kills
                if code == EXIT_RESTART:
                    before = None
                    continue
                raise SystemExit(f"a start after {kills} kills ended with {self.codes()}: see {name}.log")
            chosen = self._processes if self._random.random() < 0.5 else [self._random.choice(self._processes)]
            killed = time.time()
            for process in chosen:
                process.send_signal(signal.SIGKILL)
            self.wait()
            kills += 1
            trained = kind != "at any moment" and self._newest(folder) > newest
            before = self._measure(self._args.out / name, killed, before) if trained else None
            left = sorted(path.name for path in folder.glob("*tmp*")) if folder.is_dir() else []
            print(
                f"  kill {kills} of {len(chosen)} process(es) {kind}: update {self._newest(folder)} is safe, "
                f"unfinished: {', '.join(left) or 'nothing'}",
                flush=True,
            )

    def _measure(self, workdir: pathlib.Path, killed: float, before: tuple[float, float] | None) -> tuple[float, float]:
        """Notes what the start that was just killed took until it trained, if the kill before it is known too.

        Returns the ledger's seconds of restarting, and those of this process that it doesn't have.
        """
        ledger = json.loads((workdir / "goodput.json").read_text())
        spent = sum(ledger["seconds"][kind] for kind in ("down", "init", "compile"))
        if before is not None:
            self.restarts.append(spent - before[0] - before[1])
        return spent, max(0.0, killed - ledger["time"])

    def _wait_for(self, kind: str, folder: pathlib.Path, seconds: float) -> bool:
        """Sleeps until it is time to kill; False if the run ended before. seconds: of training between two kills."""
        if kind == "at any moment":
            return self._sleep(lambda: False, self._random.uniform(0, 10))
        newest = self._newest(folder)
        alive = self._sleep(lambda: self._newest(folder) > newest, LIMIT)  # it has made its way
        self.cpu += [_cpu_seconds(process.pid) for process in self._processes[:1] if alive]
        alive = alive and self._sleep(lambda: False, self._random.uniform(0, seconds / 2))
        if kind == "in a write":
            alive = alive and self._sleep(lambda: bool(list(folder.glob("*tmp*"))), LIMIT)
            time.sleep(self._random.uniform(0, 0.1))
        return alive

    def _sleep(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Until the condition or the time; False if all processes ended before."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not condition():
            if all(code is not None for code in self.codes()):
                return False
            time.sleep(0.001)
        return True

    def _newest(self, folder: pathlib.Path) -> int:
        return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def goodput(between: float, restart: float, write: float) -> dict[str, float]:
    """Of a run with a fault every `between` seconds; the terms of the docstring above."""
    every = math.sqrt(2 * write * between)
    share = between / (between + restart + every / 2 + write * between / every)
    return {"checkpoint_every": round(every, 1), "goodput": round(share, 4)}


def write_results(folder: pathlib.Path, processes: int, result: dict) -> None:
    """soak.json keeps the newest result of each number of processes; soak.md shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak.json"
    results = (json.loads(path.read_text()) if path.exists() else {}) | {str(processes): result}
    path.write_text(json.dumps(results, indent=1) + "\n")
    lines = ["# Killed and started again", ""]
    for count, found in sorted(results.items()):
        lines += [f"{count} process(es), {found['date']}; {found['machine']}.", "", f"    {found['command']}", ""]
    lines += [
        "| processes | kills | state sha256 | restarts measured | R, s (lowest to highest) | CPU s of one | d, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for count, found in sorted(results.items()):
        same = "the same" if found["same"] else "NOT THE SAME"
        low, high = min(found["restarts"]), max(found["restarts"])
        lines.append(
            f"| {count} | {found['kills']} | {same} | {len(found['restarts'])} | {found['R']:.1f} ({low:.1f} to "
            f"{high:.1f}) | {found['restart_cpu']:.1f} | {found['d']:.3f} |"
        )
    lines += [
        "",
        "CPU seconds: from the start of the process to its first new checkpoint.",
        "",
        "| processes | a fault every | T / (T + R + C / 2 + d T / C) | goodput | checkpoint every C |",
        "|---|---|---|---|---|",
    ]
    for count, found in sorted(results.items()):
        for minutes, row in found["goodput"].items():
            between, every = 60 * int(minutes), row["checkpoint_every"]
            terms = f"{found['R']:.1f} + {every / 2:.1f} + {found['d'] * between / every:.1f}"
            cells = f"{between} / ({between} + {terms}) | {row['goodput']:.1%} | {every:.0f} s"
            lines.append(f"| {count} | {minutes} min | {cells} |")
    (folder / "soak.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cpu_seconds(pid: int) -> float:
    """Of a process that runs, by Linux; its threads included."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
