"""How the processes of a job find each other: flags, environment variables, SLURM or the machine itself."""

import argparse
import glob
import importlib.util
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from dalle_jax.distributed import kv_store
from dalle_jax.errors import EXIT_RESTART, UserError, say

DEFAULT_PORT = 8476  # of a coordinator that is given without one
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three flags of a command that may be one of several processes."""
    several = parser.add_argument_group(
        "several processes",
        "found by themselves under SLURM, on TPU pods and in JobSets (docs/pods.md); else all three",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 .. N-1")


def initialise(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    start_seconds: int = 300,
    hang_seconds: int = 300,
) -> None:
    """Join the other processes of this job, if there are any. Call before anything touches a device.

    The job is looked for in this order; without any of them this is the only process and nothing happens.

    1. The three arguments: coordinator is HOST:PORT of process 0, process_id counts from 0.
    2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; in a Kubernetes Job or JobSet the pod's
       JOB_COMPLETION_INDEX may stand for the last.
    3. SLURM: tasks started by one `srun`. JAX gives each the one GPU of its number on the node.
    4. A Cloud TPU VM, or a TPU pod of Kubernetes: JAX asks the machine.

    start_seconds: how long to wait for the others. hang_seconds: as the `Watchdog`'s; JAX's own heartbeat ends the job
    after twice that, if the watchdog could not.

    If they do not meet in time, this process says so and ends with `EXIT_RESTART`: a machine may only have been slow,
    and launchers bound how often they start again.

    Raises:
      UserError: half of what is needed, or impossible numbers.
    """
    found = _from_flags(coordinator, num_processes, process_id) or _from_environment(os.environ)
    if found is None and not _slurm_tasks(os.environ) and not _on_tpu(os.environ):
        return
    # Its SIGTERM handler swallows the signal; `stop_agreed` does the same and more.
    jax.config.update("jax_enable_preemption_service", False)
    limit = {"heartbeat_timeout_seconds": 2 * hang_seconds}
    if found is None:
        _join("the coordinator that JAX found", limit, seconds=start_seconds)
        return
    address, count, index = found
    if count == 1:
        return
    if index != 0:
        _wait_for(address, start_seconds)
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    _join(address, arguments | {"cluster_detection_method": "deactivate"} | limit, seconds=start_seconds)


def _join(where: str, arguments: Mapping[str, Any], *, seconds: float) -> None:
    advice = "start every process with the same coordinator and number of processes, and see that they reach each other"
    expected = f"expected all processes to meet at {where} within {seconds:g} s"

    def give_up():  # JAX would abort, with a message that says nothing of all this
        say(f"dalle-jax: error: {expected}, but some did not come: {advice}")
        os._exit(EXIT_RESTART)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=int(seconds) + 60, **arguments)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        # TPU chips, but no cluster around them: one machine.
    except (jax.errors.JaxRuntimeError, OSError) as error:  # a port that is still taken, a network that is away
        say(f"dalle-jax: error: {expected}, got {str(error).strip().splitlines()[0][:300]}: {advice}")
        raise SystemExit(EXIT_RESTART) from error
    finally:
        timer.cancel()
    if kv_store.client() is not None:  # says who is who, and whom JAX means if it loses its coordination service
        index, count = kv_store.place()
        who = f"process {index} of {count} on {socket.gethostname()}; process 0 at {kv_store.coordinator()}"
        say(f"dalle-jax: {who} holds the coordination service")


def _from_flags(coordinator, num_processes, process_id) -> tuple[str, int, int] | None:
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    return _complete(given)


def _from_environment(environ: Mapping[str, str]) -> tuple[str, int, int] | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: environ.get(name) or None for name in names}
    if given["JAX_NUM_PROCESSES"] is None and (_slurm_tasks(environ) or _on_tpu(environ)):
        return None  # the address alone changes what JAX finds there
    if given["JAX_PROCESS_ID"] is None and (given["JAX_COORDINATOR_ADDRESS"] or given["JAX_NUM_PROCESSES"]):
        given["JAX_PROCESS_ID"] = environ.get("JOB_COMPLETION_INDEX")
    if given["JAX_COORDINATOR_ADDRESS"] and ":" not in given["JAX_COORDINATOR_ADDRESS"]:
        given["JAX_COORDINATOR_ADDRESS"] += f":{environ.get('JAX_COORDINATOR_PORT') or DEFAULT_PORT}"
    return _complete(given)


def _complete(given: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """Address, count and index out of three named values; None if none of them is there."""
    if all(value is None for value in given.values()):
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = ", ".join(name for name in given if name not in missing)
        raise UserError(
            f"expected {', '.join(given)} together, got {there} without {', '.join(missing)}: give all three"
        )
    address, *numbers = given.values()
    try:
        count, index = map(int, numbers)
        host, port = address.rsplit(":", 1)
        possible = bool(host) and 0 < int(port) < 65536 and 0 <= index < count
    except ValueError:
        possible = False
    if not possible:
        raise UserError(
            f"expected {' '.join(given)} as HOST:PORT, a number of processes and one from 0 below it, got "
            f"{' '.join(map(str, given.values()))}"
        )
    return address, count, index


def _slurm_tasks(environ: Mapping[str, str]) -> bool:
    """Is this one of several tasks of a SLURM step? (A shell inside an allocation is not.)"""
    return all(name in environ for name in SLURM) and int(environ["SLURM_NTASKS"]) > 1


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """TPU chips are there and JAX is to use them."""
    wanted = environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and (not wanted or "tpu" in wanted) and importlib.util.find_spec("libtpu") is not None


def _wait_for(address: str, seconds: float) -> None:
    """Until process 0 listens; JAX's own message for one that never does is a crash without a name."""
    host, port = address.rsplit(":", 1)
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                say(
                    f"dalle-jax: error: expected process 0 to listen at {address} within {seconds:g} s, got "
                    f"{error.strerror or error}: start it there, or give the address that it has"
                )
                raise SystemExit(EXIT_RESTART) from error
        time.sleep(0.2)
