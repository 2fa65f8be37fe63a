"""Several processes of a job on this machine: tests start and end them, drivers join the others."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from dalle_jax import distributed
from tests.support import QUICK, ROOT


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def start(driver, folder, count, *words, devices=1):
    """`count` processes of one job; their output goes to FOLDER/RANK.log."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    started = []
    for rank in range(count):
        command = [sys.executable, "-m", f"tests.support.{driver}", folder, port, count, rank, *words]
        with (folder / f"{rank}.log").open("w") as log:
            started.append(
                subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=environ, cwd=ROOT)
            )
    return started


def statuses(started, *, seconds=240):
    until = time.monotonic() + seconds
    try:
        return [process.wait(max(until - time.monotonic(), 0.1)) for process in started]
    finally:
        for process in started:
            process.kill()


def join(folder, port, count, rank, *words, start_seconds=60):
    """In a driver, with the words of its command line: join the others. Returns FOLDER, rank and further words."""
    distributed.initialize(
        coordinator=f"localhost:{port}",
        num_processes=int(count),
        process_id=int(rank),
        start_seconds=start_seconds,
        hang_seconds=60,
    )
    return pathlib.Path(folder), int(rank), words


def write(folder, rank, measured, arrays):
    """What a driver's training measured, and the arrays after it, for `read`."""
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    np.savez(folder / f"{rank}.npz", *jax.tree.leaves(arrays))


def read(folder, rank):
    with np.load(folder / f"{rank}.npz") as saved:
        return json.loads((folder / f"{rank}.json").read_text()), list(saved.values())
