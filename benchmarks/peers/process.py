"""A peer's process, and the timing that both sides of a comparison use.

A peer's script, `peer_*.py`, runs in an environment of its own that has torch but neither JAX nor this package. Under
`--serve` it reads `WORK REPEATS` lines from stdin and answers each with a line of JSON: `seconds` of each repeat, and
what else it says about itself.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import KEEP_FREED, ROOT


class Works:
    """Works by name. Each is built at its first use, run a few times so that it is compiled, and kept."""

    def __init__(self, build: Callable[[str], Callable[[], None]], *, first_runs: int = 2):
        self._build, self._first_runs, self._works = build, first_runs, {}

    def measure(self, work: str, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        if work not in self._works:
            self._works[work] = self._build(work)
            for _ in range(self._first_runs):
                self._works[work]()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            self._works[work]()
            seconds.append(time.perf_counter() - start)
        return seconds


class PeerProcess:
    """A peer's script in its own environment; its models stay built between rounds. about: of its last answer."""

    def __init__(self, python: str, script: str, *words: object):
        command = [python, "-W", "ignore", "-m", f"benchmarks.peers.{script}", *map(str, words)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | KEEP_FREED
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
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


def serve(doc: str, measure: Callable[[str, int], dict[str, Any]]) -> None:
    """The command line of a peer's script: measure the works that are named, or those that stdin asks for.

    measure: (work, repeats) -> 'seconds' and more.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("works", nargs="*", help="what to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help="read `WORK REPEATS` lines from stdin")
    args = parser.parse_args()
    requests = (line.split() for line in sys.stdin) if args.serve else ((work, args.repeats) for work in args.works)
    for work, repeats in requests:
        print(json.dumps({"work": work, **measure(work, int(repeats))}), flush=True)
