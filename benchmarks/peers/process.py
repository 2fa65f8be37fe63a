"""A peer's process, and the shape and the timing that both sides of a comparison use.

A peer's script, `peer_*.py`, runs in an environment of its own that has torch but neither JAX nor this package. Under
`--serve` it reads `WORK REPEATS` lines from stdin and answers each with a line of JSON: `seconds` of each repeat, and
what else it says about itself.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import harness

# Of the transformers that are compared.
SHAPE = dict(
    layers=4, width=256, heads=4, head_size=64, text_len=64, text_vocab=1000, grid=16, image_vocab=1024, image_size=128
)
BATCH, THREADS, LEARNING_RATE = 4, 2, 3e-4
FIRST_RUNS = 2  # of a work, so that it is compiled


class Works:
    """Works by name. Each is built and run FIRST_RUNS times at its first use, and kept."""

    def __init__(self, build: Callable[[str], Callable[[], None]]):
        self._build, self._works = build, {}

    def measure(self, work: str, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        if work not in self._works:
            self._works[work] = self._build(work)
            for _ in range(FIRST_RUNS):
                harness.seconds(self._works[work])
        return [harness.seconds(self._works[work]) for _ in range(repeats)]


class PeerProcess:
    """A peer's script in its own environment; its models stay built between rounds. about: of its last answer."""

    def __init__(self, python: str, script: str, *words: object):
        command = [python, "-W", "ignore", "-m", f"benchmarks.peers.{script}", *map(str, words)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | harness.KEEP_FREED
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=harness.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.about: dict[str, Any] = {}

    def ask(self, *words: object) -> dict[str, Any]:
        """The answer to one line of words."""
        print(*words, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended while measuring {words}: its message is above")
        self.about = json.loads(line)
        return self.about

    def measure(self, work: str, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        return self.ask(work, repeats)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(doc: str, build: Callable[[str], Callable[[], None]], about: Callable[[], dict[str, Any]] = dict) -> None:
    """The command line of a peer's script: measure the works that are named, or those that stdin asks for.

    build: the name of a work -> what does it once. about: what else each answer says.
    """
    import torch

    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("works", nargs="*", help="what to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="read `WORK REPEATS` lines from stdin")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    works, said = Works(build), {"torch": torch.__version__, **about()}
    requests = (line.split() for line in sys.stdin) if args.serve else ((work, args.repeats) for work in args.works)
    for work, repeats in requests:
        print(json.dumps({"work": work, "seconds": works.measure(work, int(repeats)), **said}), flush=True)
