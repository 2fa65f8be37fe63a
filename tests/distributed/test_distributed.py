"""How processes find each other, agree, and end when one of them is gone: two real ones on this machine."""

import json
import os
import queue
import signal
import socket
import time

import jax
import pytest

from dalle_jax import distributed, sharding
from dalle_jax.checkpoint import digest, reader
from dalle_jax.cli import main
from dalle_jax.distributed import agree, cluster, connections, kv_store, watchdog
from dalle_jax.errors import EXIT_RESTART, EXIT_USER_ERROR, UserError
from dalle_jax.mesh import make_mesh
from tests.support import fault_driver, processes

# What happens to which process -> status of the other one, and what that says of the first.
FAULTS = {
    ("kill", 1): (EXIT_RESTART, "phase 'update', is gone: its connection has closed: process 0 of 2 (HOST) ends with"),
    ("freeze", 1): (EXIT_RESTART, "process 1 (HOST), last seen in step"),
    ("freeze", 0): (EXIT_RESTART, "process 0 (HOST), last seen in step"),
    ("hang", 1): (EXIT_RESTART, "process 1 (HOST), last seen in step 5, phase 'update', has made no progress"),
    ("stall", 1): (EXIT_RESTART, "process 1 (host unknown), last seen in step 0, phase 'start', has given no sign of"),
    ("wrong", 1): (EXIT_USER_ERROR, "process 1 of 2 (HOST) failed: expected a usable record, got none"),
    # JAX ends the others at once: they have lost the coordination service, which is process 0.
    ("kill", 0): (-signal.SIGABRT, "Polled an error from coordination service"),  # and see the test
}


@pytest.mark.parametrize(("what", "who"), FAULTS, ids=lambda value: str(value))
def test_a_process_that_is_gone_or_stuck_ends_the_others_and_is_named(what, who, tmp_path):
    started = processes.start("fault_driver", tmp_path, 2, what, who)
    wanted, says = FAULTS[what, who]
    try:
        assert started[1 - who].wait(60) == wanted, (tmp_path / f"{1 - who}.log").read_text()
        seconds = time.time() - float((tmp_path / "began").read_text())
    finally:
        for process in started:
            process.kill()  # the frozen one
            process.wait()
    log = (tmp_path / f"{1 - who}.log").read_text()
    assert says.replace("HOST", os.uname().nodename) in log
    assert seconds < 2 * fault_driver.HANG_SECONDS
    if wanted == EXIT_RESTART:
        assert "fault_driver.py" in log  # where it waited
    if wanted == -signal.SIGABRT:
        assert "holds the coordination service" in log and "process 0 at localhost:" in log
    if what in ("wrong", "kill"):  # nothing to wait for
        assert seconds < fault_driver.HANG_SECONDS


def test_four_processes_stop_after_the_same_step_and_end_well(tmp_path):
    assert processes.statuses(processes.start("fault_driver", tmp_path, 4, "nothing", 2)) == [0] * 4
    assert [(tmp_path / f"{rank}.log").read_text().count("stopped after 10") for rank in range(4)] == [1] * 4


def test_a_process_whose_others_never_come_says_so(tmp_path):
    (waiting, other) = processes.start("fault_driver", tmp_path, 2, "alone", 1)
    other.kill()
    assert waiting.wait(60) == EXIT_RESTART
    assert "within 3 s, but some did not come: start every process" in (tmp_path / "0.log").read_text()


def test_a_coordinator_that_is_not_there_is_named_in_time_and_may_still_come(capsys, tmp_path):
    """With the status on which launchers start again: its machine may only have been slow."""
    port, began = processes.free_port(), time.monotonic()
    words = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", "1"]
    words += ["--config.run.processes.start_seconds=1", "--config", "configs/dvae.py:demo", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main.main(["train", *words])
    assert ended.value.code == EXIT_RESTART and time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert f"process 0 to listen at localhost:{port} within 1 s, got Connection refused: start it there" in said
    assert said.count("\n") == 1


@pytest.fixture
def joined(monkeypatch):
    """What JAX would be asked to join; nothing of this machine's environment is seen."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "JAX_COORD", "JAX_NUM", "JAX_PROCESS", "JOB_", "TPU")):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(cluster, "_wait_for", lambda address, seconds: None)
    yield calls
    jax.config.update("jax_enable_preemption_service", True)


def place(call):
    return call.get("coordinator_address"), call.get("num_processes"), call.get("process_id")


def test_one_process_joins_nothing(joined, monkeypatch):
    distributed.initialize()
    distributed.initialize(coordinator="host:1", num_processes=1, process_id=0)
    for name, value in zip(cluster.SLURM, ("7", "node3", "1", "0", "0"), strict=True):  # a shell in an allocation
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == [] and distributed.gather_json({"a": 1}) == [{"a": 1}]
    assert [distributed.stop_agreed(step, wants) for step, wants in ((1, False), (2, True))] == [False, True]


def test_a_job_is_found_by_flags_variables_or_slurm(joined, monkeypatch):
    distributed.initialize(coordinator="host:1", num_processes=4, process_id=3, start_seconds=9, hang_seconds=20)
    assert place(joined[-1]) == ("host:1", 4, 3)
    assert joined[-1]["heartbeat_timeout_seconds"] == 40

    for name, value in zip(cluster.SLURM, ("7", "node[3-4]", "2", "1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert place(joined[-1]) == (None, None, None)  # JAX reads the rest, for one GPU a process

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "pods-0")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "5")
    distributed.initialize()
    assert place(joined[-1]) == (f"pods-0:{cluster.DEFAULT_PORT}", 8, 5)
    monkeypatch.setenv("JAX_PROCESS_ID", "6")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "99")
    distributed.initialize()
    assert place(joined[-1]) == ("pods-0:99", 8, 6)
    distributed.initialize(coordinator="host:1", num_processes=4, process_id=3)  # flags win
    assert place(joined[-1]) == ("host:1", 4, 3)


def test_an_initialization_that_fails_may_succeed_later(joined, monkeypatch, capsys):
    def taken(**_):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server\nfor some reason")

    monkeypatch.setattr(jax.distributed, "initialize", taken)
    with pytest.raises(SystemExit) as ended:
        distributed.initialize(coordinator="host:1", num_processes=4, process_id=0, start_seconds=9)
    assert ended.value.code == EXIT_RESTART
    said = capsys.readouterr().err
    assert "to meet at host:1 within 9 s, got UNKNOWN: Failed to start RPC server: start every process" in said


def test_half_a_job_is_refused_with_what_is_missing(joined, monkeypatch, capsys, tmp_path):
    words = ["train", "--config", "configs/dvae.py:demo", "--workdir", str(tmp_path)]
    for more, message in (
        (["--coordinator", "host:1"], "got --coordinator without --num-processes, --process-id"),
        (["--num-processes", "2", "--process-id", "0"], "without --coordinator"),
        (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "as HOST:PORT"),
        (["--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"], "one from 0 below it"),
    ):
        assert main.main([*words, *more]) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "pods-0")
    with pytest.raises(UserError, match="got JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        distributed.initialize()
    assert joined == []


class Store(dict):
    """The key-value store as its clients see it."""

    def key_value_set(self, key, value):
        if key in self:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self[key]


def test_who_is_a_step_ahead_stops_at_the_same_step(monkeypatch):
    store = Store()
    monkeypatch.setattr(kv_store, "client", lambda: store)
    monkeypatch.setattr(agree, "_stops", 1_000)
    assert not distributed.stop_agreed(6, False)  # one process is at 6 when another, at 5, wants to stop
    assert not distributed.stop_agreed(5, True)
    assert not distributed.stop_agreed(6, True)  # a second wish changes nothing
    assert distributed.stop_agreed(7, False)
    distributed.stop_agreed(5, True)  # the next agreement
    with pytest.raises(RuntimeError, match="stop after step 7, and this one is at 8"):
        distributed.stop_agreed(8, False)


def test_process_0_sees_that_a_connection_closes_and_lets_no_stranger_in():
    closed = queue.Queue()
    listener = connections.Listener("localhost", closed.put)
    host, port, key = json.loads(listener.address)
    stranger = connections.connect(json.dumps([host, port, key[::-1]]), 3)
    one, two = (connections.connect(listener.address, rank) for rank in (1, 2))
    stranger.close()
    two.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that died
    assert closed.get(timeout=30) == 2
    one.close()
    assert closed.get(timeout=30) == 1 and closed.empty()


def watching(*beats, timeout=10.0, start=100.0):
    """Process 0's watchdog at time 0, with the last (beats, step, phase, age, allowed) of all processes."""
    dog = distributed.Watchdog(timeout, first_seconds=start)
    dog._rank, dog._peers = 0, {rank: watchdog._Peer(rank, heard=0.0, allowed=start) for rank in range(len(beats))}
    for rank, beat in enumerate(beats):
        if beat is not None:
            named = dict(zip(("beats", "step", "phase", "age", "allowed"), beat, strict=True))
            dog._peers[rank].note({"published": 1, "host": f"host{rank}", "done": False, **named}, 0.0)
    return dog


def test_process_0_names_the_process_for_which_the_others_wait():
    starting = watching((1, 0, "start", 31.0, 30.0), (2, 0, "prepare", 31.0, 100.0))
    assert starting._find(0.0).startswith("process 0 (host0), last seen in step 0, phase 'start', has made no progress")
    compiling = watching((1, 1, "update", 50.0, 100.0), (2, 2, "update", 49.0, 10.0))  # the others wait for it
    assert compiling._find(4.0) is None
    stuck = watching((8, 8, "update", 49.0, 10.0), (7, 7, "hook", 48.0, 10.0), (8, 8, "update", 49.0, 10.0))
    assert stuck._find(1.0) == (
        "process 1 (host1), last seen in step 7, phase 'hook', has made no progress for 49.0 s "
        "(0 of 2 others are at the same place)"
    )
    late = watching((1, 0, "start", 0.0, 100.0), None, start=30.0)  # on its way here it may be silent for longer
    for seconds, wanted in ((29.0, None), (31.0, "phase 'start', has given no sign of life for 31.0 s")):
        late._peers[0].heard = seconds
        found = late._find(seconds)
        assert found == (wanted and f"process 1 (host unknown), last seen in step 0, {wanted}")


def test_a_phase_may_take_longer_the_first_two_times_and_at_the_start():
    dog = distributed.Watchdog(10.0, first_seconds=100.0, start_seconds=30.0)
    allowed = [dog._beat[1]["allowed"]]
    for phase in ("update", "update", "validation", "update", "validation", "validation", "hook", "hook", "hook"):
        dog.beat(1, phase)
        allowed.append(dog._beat[1]["allowed"])
    assert allowed == [30.0, 100.0, 100.0, 100.0, 10.0, 100.0, 10.0, 100.0, 100.0, 100.0]


@pytest.mark.parametrize(
    ("sizes", "owners", "parts"),
    [
        ((4, 1, 1), (0, 1, 2, 3), {0: (0, 4), 3: (3, 4)}),
        ((2, 2, 1), (0, 0, 1, 1), {0: (0, 2), 1: (1, 2)}),
        ((2, 1, 2), (0, 1, 2, 3), {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),  # a tensor axis across processes
        ((1, 1, 4), (0, 0, 1, 1), {0: (0, 1), 1: (0, 1)}),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(sizes, owners, parts, monkeypatch):
    mesh = make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=True)), devices=jax.devices()[:4])
    for rank, part in parts.items():
        assert sharding.batch_share(mesh, process=rank, owner=lambda device: owners[device.id]) == part


def test_processes_that_hold_unlike_parts_are_refused():
    mesh = make_mesh({"fsdp": 4}, devices=jax.devices()[:4])
    with pytest.raises(UserError, match="pieces of a batch 2 processes can share evenly"):
        sharding.batch_share(mesh, process=0, owner=lambda device: int(device.id > 0))


def test_a_disk_that_is_full_for_one_process_costs_a_checkpoint_and_not_the_job(tmp_path):
    """And each process reads back what it wrote itself: sha256.json lists all but itself and what says complete."""
    ended = processes.statuses(processes.start("disk_driver", tmp_path, 2))
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert ended == [0, 0], "\n".join(logs)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, one in enumerate(found):
        assert (one["step"], one["checkpoints"], one["hashed"]) == (20, [12, 20], [str(rank)])
        assert one["listed"] == one["files"] - 3
    assert digest.damage(reader.checkpoint_path(tmp_path / "run")[1]) is None
    for update, who, newest in ((8, 1, 4), (16, 0, 12)):
        line = f"WARNING: the checkpoint of step {update} could not be written (process {who}: File too large)"
        assert logs[0].count(line) == 1 and f"is that of step {newest};" in logs[0]
    assert "WARNING" not in logs[1]
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name[:1] in "8."]
