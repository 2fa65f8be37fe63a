"""Finding the other processes of a job: from flags, environment variables, SLURM or the machine itself."""

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
    """Add the three flags of a command that may be one of several processes."""
    several = parser.add_argument_group(
        "several processes",
        "found without flags under SLURM, on TPU pods and in JobSets (docs/pods.md); elsewhere give all three",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens (default: found, or none)")
    several.add_argument("--num-processes", type=int, metavar="N", help="processes of the job (default: found, or one)")
    several.add_argument(
        "--process-id", type=int, metavar="I", help="which of them this is, 0 to N-1 (default: found, or 0)"
    )


def initialize(
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

    start_seconds: how long to wait for the others. If some do not come, this process says so and ends with
    `EXIT_RESTART`: a machine may only have been slow, and launchers bound how often they start again. hang_seconds: as
    the `Watchdog`'s; JAX's heartbeat ends the job after twice that, if the watchdog could not.

    Raises:
      UserError: half of what is needed, or impossible numbers.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    job = _checked(flags) or _checked(_variables(os.environ))
    arguments: dict[str, Any] = {"heartbeat_timeout_seconds": 2 * hang_seconds}
    if job is not None:
        address, count, index = job
        if count == 1:
            return
        if index != 0:
            _wait_for(address, start_seconds)
        arguments |= {"coordinator_address": address, "num_processes": count, "process_id": index}
        arguments |= {"cluster_detection_method": "deactivate"}
    elif _slurm_tasks(os.environ) or _on_tpu(os.environ):
        address = "the coordinator that JAX found"
    else:
        return
    # JAX's SIGTERM handler swallows the signal; `stop_agreed` does the same and more.
    jax.config.update("jax_enable_preemption_service", False)
    _join(address, arguments, seconds=start_seconds)


def _join(where: str, arguments: Mapping[str, Any], *, seconds: float) -> None:
    expected = f"expected all processes to meet at {where} within {seconds:g} s"
    advice = "start every process with the same coordinator and number of processes, and see that they reach each other"

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


def _variables(environ: Mapping[str, str]) -> dict[str, str | None]:
    address, count, index = map(environ.get, ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if not count and (_slurm_tasks(environ) or _on_tpu(environ)):
        address = index = None  # there, the address alone changes what JAX finds
    if address or count:
        index = index or environ.get("JOB_COMPLETION_INDEX")
    if address and ":" not in address:
        address += f":{environ.get('JAX_COORDINATOR_PORT') or DEFAULT_PORT}"
    given = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
    return {name: value or None for name, value in given.items()}


def _checked(given: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """Address, count and index out of three named values; None if none of them is given."""
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
        if host and 0 < int(port) < 65536 and 0 <= index < count:
            return address, count, index
    except ValueError:
        pass
    raise UserError(
        f"expected {' '.join(given)} as HOST:PORT, a number of processes and one from 0 below it, got "
        f"{' '.join(map(str, given.values()))}"
    )


def _slurm_tasks(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a SLURM step (a shell inside an allocation is not)."""
    return all(name in environ for name in SLURM) and int(environ["SLURM_NTASKS"]) > 1


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips that JAX is to use."""
    wanted = environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and (not wanted or "tpu" in wanted) and importlib.util.find_spec("libtpu") is not None


def _wait_for(address: str, seconds: float) -> None:
    """Wait until process 0 listens; if it never does, JAX would crash without naming it."""
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
