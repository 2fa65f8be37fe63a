"""Starts and ends the processes of a job on this machine, for tests."""

import os
import socket
import subprocess
import sys
import time

from tests.support import ROOT


def free_port():
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


def start(driver, folder, count, *words, devices=1):
    """`count` processes of one job; their output goes to FOLDER/RANK.log."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
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
