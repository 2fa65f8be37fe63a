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

Each number of processes has a section of results/soak.md.
"""

import argparse
import json
import math
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import harness

STEPS, EVERY = 2_000, 50
ALONE = 200  # updates between checkpoints of the straight run: one is complete before the next begins
EXIT_RESTART = 75  # of a process whose peer was killed: the launchers start it again
MOMENTS = ("in training", "in a write", "at any moment", "in a write")
CONFIG = {
    "run.steps": STEPS, "batch_size": 8, "run.log_every": 50, "run.validate_every": None, "run.picture_every": None,
    "model.image_size": 32, "model.vocab": 8, "model.width": 8, "model.stem": 4,
    "model.patch": 4, "run.processes.start_seconds": 30, "run.processes.hang_seconds": 15,
    "run.processes.compile_seconds": 60,
    "data.image_size": 32, "run.data.train": "scenes:train@32", "run.data.validation": None, "run.data.threads": 1,
}  # fmt: skip
FAULTS = (3, 5, 10, 30)  # minutes between two
LIMIT = 600  # seconds that a single start may take


def main() -> int:
    parser = harness.parser(__doc__, out="a new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    machine = harness.machine()
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
    verdict = "the same" if same else "NOT THE SAME"
    spread = harness.spread(soak.restarts, ".1f", "")
    header = "kills | state sha256 | restarts measured | R, s | middle (lowest to highest) | d, s"
    row = (
        kills,
        verdict,
        len(soak.restarts),
        f"{restart:.1f}",
        spread,
        f"{write:.3f}",
    )
    rows = []
    for minutes in FAULTS:
        between, (every, share) = 60 * minutes, goodput(60 * minutes, restart, write)
        terms = f"{restart:.1f} + {every / 2:.1f} + {write * between / every:.1f}"
        rows.append((f"{minutes} min", f"{between} / ({between} + {terms})", f"{share:.1%}", f"{every:.0f} s"))
    lines = [
        machine,
        *harness.command(args),
        *harness.table(header, [row]),
        "",
        *harness.table("a fault every | T / (T + R + C / 2 + d T / C) | goodput | checkpoint every C", rows),
    ]
    section = f"{args.processes} process(es)"
    harness.write(args.results / "soak.md", "Killed and started again", lines, section=section)
    return 0 if same and kills == args.kills else 1


class Soak:
    def __init__(self, args: argparse.Namespace):
        self._args, self._random, self._processes = args, random.Random(args.seed), []
        self._environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.restarts = []  # seconds of those that could be measured

    def start(self, name: str, *, every: int = EVERY) -> None:
        """All processes of one run, in the background."""
        config = CONFIG | {"run.steps": self._args.steps, "run.checkpoint_every": every}
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


def goodput(between: float, restart: float, write: float) -> tuple[float, float]:
    """Seconds between checkpoints and goodput of a run with a fault every `between` seconds; terms as above."""
    every = math.sqrt(2 * write * between)
    return every, between / (between + restart + every / 2 + write * between / every)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
