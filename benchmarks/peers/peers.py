"""What comparisons with another package share: a process of its environment, answering in turns, and the machine.

A peer's script, `peer_*.py`, reads `WORK REPEATS` lines from stdin under `--serve` and answers each with one line of
JSON that has `seconds`, of each repeat, and whatever else it says about itself.
"""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers.peer_dalle_pytorch import THREADS
from dalle_jax.cli import host_memory  # does not import JAX

ROOT = Path(__file__).resolve().parent.parent.parent


class PeerProcess:
    """The peer's script in its own environment; its models stay built between rounds. about: of its last answer."""

    def __init__(self, python: str, script: str):
        command = [python, "-W", "ignore", "-m", f"benchmarks.peers.{script}", "--serve"]
        environment = os.environ | {name: str(value) for name, (_, value) in host_memory.SETTINGS.items()}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT
        )
        self.about: dict[str, Any] = {}

    def measure(self, work: str, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        print(work, repeats, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended while measuring {work}: its message is above")
        self.about = json.loads(line)
        return self.about["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def machine() -> dict[str, Any]:
    """Processor, threads, load and versions."""
    import jax

    model = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "threads": THREADS,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
