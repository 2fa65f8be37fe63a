"""The watchdog of a job: finds the process that died or hangs, names it, and ends all of them."""

import atexit
import collections
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from dalle_jax.distributed import connections, kv_store
from dalle_jax.errors import EXIT_INTERRUPTED, EXIT_RESTART, EXIT_USER_ERROR, UserError, say

# Start of an error that may only say that the connection to a process was lost.
LOST = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
EXIT_STATUS = {UserError: EXIT_USER_ERROR, KeyboardInterrupt: EXIT_INTERRUPTED}  # of the command; 1 for the rest
_watchdogs = itertools.count()


class Watchdog:
    """Ends this process when the job cannot go on, and says which process is the reason.

        with Watchdog(300, first_seconds=3600) as watchdog:
            watchdog.beat(step, "update")  # this phase begins now

    Every process publishes its last beat in the key-value store. Process 0 looks for a process that has not published
    for `timeout_seconds` (frozen, or its machine is gone). If all still publish, it looks at the process with the
    fewest beats: all go through the same phases, so the others wait for that one. If it has been in its phase for
    longer than `timeout_seconds`, it hangs. The first two times of every phase, in which programs are compiled, may
    take `first_seconds`, as may each 'hook', and the phase 'start' `start_seconds`. The other processes watch for the
    silence of process 0.

    Whoever finds something prints rank, host, step and phase on stderr, then its own Python stacks, and ends with
    `EXIT_RESTART` by os._exit, because threads that wait in a collective never return. The verdict in the store ends
    all others, within 1.5 x timeout_seconds. A process that dies is found at once, as its connection to process 0
    closes (`connections.py`). When process 0 is killed, JAX aborts the others at once (SIGABRT), with a message that
    names the coordination service, which is process 0.

    An exception that leaves the block ends the others at once, with the status that this process ends with. An error
    that may only say that the connection to a dead process was lost first waits for the watchdog. With one process
    nothing is watched.
    """

    def __init__(
        self, timeout_seconds: float, *, first_seconds: float | None = None, start_seconds: float | None = None
    ):
        """timeout_seconds: more than twice the longest step. first_seconds: at least as long, the default.

        start_seconds: of the phase 'start', in which the processes connect; default first_seconds.
        """
        self._timeout = timeout_seconds
        self._first = max(timeout_seconds, first_seconds or 0.0)
        self._start = start_seconds or self._first
        self._interval = min(max(timeout_seconds / 20, 0.05), 5.0)
        self._times_in: collections.Counter[str] = collections.Counter()
        self._beats, self._published = 0, 0
        self._client, (self._rank, self._count) = kv_store.client(), kv_store.place()
        self._root = f"{kv_store.ROOT}/watchdog/{next(_watchdogs)}"
        watched, now = range(self._count) if self._rank == 0 else (0,), time.monotonic()
        self._peers = {rank: _Peer(rank, heard=now, allowed=self._start) for rank in watched}
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True)
            for work in (self._talk, self._judge, self._obey)
        ]
        self.beat(0, "start")

    def beat(self, step: int, phase: str) -> None:
        """Say that this phase of this step begins here. Costs a microsecond: another thread publishes it."""
        self._times_in[phase] += 1
        self._beats += 1
        allowed = self._first if self._times_in[phase] <= 2 or phase == "hook" else self._timeout
        if phase == "start":
            allowed = self._start
        self._beat = (time.monotonic(), {"beats": self._beats, "step": step, "phase": phase, "allowed": allowed})

    def __enter__(self) -> "Watchdog":
        if self._client is None:
            return self
        if self._rank == 0:
            host, address = kv_store.coordinator().rsplit(":", 1)[0].strip("[]"), ""
            with contextlib.suppress(OSError):  # without connections the beats must do
                address = connections.Listener(host, on_closed=self._closed).address
            self._client.key_value_set(f"{self._root}/address", address)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if self._client is None:
            return
        if error is not None:
            self._fail(error)
        self._ended.set()
        kv_store.put_first(self._client, self._verdict_of(self._rank), "null")  # wakes `_obey`
        for thread in self._threads:
            thread.join(self._timeout)
        if error is None:
            self._publish(done=True)

    def _fail(self, error: BaseException) -> None:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        message, code = f"{self._name()} failed: {line}", EXIT_STATUS.get(type(error), 1)
        if LOST.match(line) and not isinstance(error, UserError):
            say(f"dalle-jax: {message}; looking for a process that is gone")
            time.sleep(1.5 * self._timeout)  # the watchdog's threads may end this process meanwhile
        self._ending.acquire()
        self._decide(code, message)
        atexit.register(self._leave, code)  # before JAX's handler, which would wait for processes that are gone

    def _leave(self, code: int) -> None:
        if self._rank == 0:
            time.sleep(min(1.0, self._interval))  # the others read the verdict here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    # Process 0 may never answer, so each of these has a thread of its own.

    def _talk(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 will be found silent
                self._publish()
                self._read()
            self._ended.wait(self._interval)

    def _publish(self, *, done: bool = False) -> None:
        began, place = self._beat
        self._published += 1
        record = {"published": self._published, "host": socket.gethostname(), "done": done, **place}
        record["age"] = time.monotonic() - began
        self._client.key_value_set(f"{self._root}/beat/{self._rank}", json.dumps(record), allow_overwrite=True)

    def _read(self) -> None:
        if self._rank == 0:
            records = self._client.key_value_dir_get(f"{self._root}/beat")
        else:
            records = [("beat/0", kv_store.get(self._client, f"{self._root}/beat/0"))]
        for key, record in records:
            if record is not None:
                self._peers[int(key.rsplit("/", 1)[1])].note(json.loads(record), time.monotonic())

    def _obey(self) -> None:
        """Connect to process 0, then wait for its verdict."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone, and JAX ends this process
            address = kv_store.wait(self._client, f"{self._root}/address")
            if address and self._rank != 0:
                with contextlib.suppress(OSError):
                    self._connection = connections.connect(address, self._rank)
            verdict = json.loads(kv_store.wait(self._client, self._verdict_of(self._rank)))
            if verdict is not None and not self._ended.is_set():
                self._end(*verdict)

    def _closed(self, rank: int) -> None:
        """End the job if a process whose connection has closed did not end well. Called in process 0."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._read()
        if not self._ended.is_set() and not self._peers[rank].done:
            self._end(EXIT_RESTART, f"{self._peers[rank]} is gone: its connection has closed")

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(self._interval):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > self._timeout / 2:  # this process itself was frozen, and knows nothing
                for peer in self._peers.values():
                    peer.heard = now
            elif found := self._find(now):
                self._end(EXIT_RESTART, found)

    def _find(self, now: float) -> str | None:
        """The peer that is the reason why the job cannot go on, in words; None if there is none."""
        peers = [peer for peer in self._peers.values() if not peer.done]
        for peer in peers:
            # Before its first beat a process may still be on its way here.
            if now - peer.heard > (self._timeout if peer.published else self._start):
                return f"{peer} has given no sign of life for {now - peer.heard:.1f} s"
        if self._rank != 0 or not peers:
            return None  # process 0 names the one that hangs, as it knows all of them
        last = min(peers, key=lambda peer: (peer.beats, -peer.seconds(now)))  # the others wait for it
        if last.seconds(now) <= last.allowed or any(now - peer.heard > self._timeout / 2 for peer in peers):
            return None  # within its time, or one of them is about to be found silent
        same = sum(peer.beats == last.beats for peer in peers) - 1
        others = f" ({same} of {len(peers) - 1} others are at the same place)" if len(peers) > 1 else ""
        return f"{last} has made no progress for {last.seconds(now):.1f} s{others}"

    def _end(self, code: int, message: str) -> None:
        """Name what is wrong and end this process. Does not return."""
        self._ending.acquire()  # never released: one end is enough
        if self._rank == 0:
            code, message = self._decide(code, message)
        say(f"dalle-jax: {message}: {self._name()} ends with status {code}")
        if code == EXIT_RESTART:  # the cause is unknown: show where everybody is
            faulthandler.dump_traceback(file=2, all_threads=True)
        self._leave(code)

    def _decide(self, code: int, message: str) -> list:
        """Give the verdict to process 0, which gives it to all. Returns the one that stands, the first."""
        verdict = kv_store.put_first(self._client, self._verdict_of(0), json.dumps([code, message]))
        if self._rank == 0:
            for rank in range(1, self._count):
                kv_store.put_first(self._client, self._verdict_of(rank), verdict)
        return json.loads(verdict)

    def _verdict_of(self, rank: int) -> str:
        """Key of the verdict that process `rank` obeys."""
        return f"{self._root}/verdict/{rank}"

    def _name(self) -> str:
        return f"process {self._rank} of {self._count} ({socket.gethostname()})"


@dataclasses.dataclass
class _Peer:
    """A process as another one knows it: its last record, and when that came (`heard`)."""

    rank: int
    heard: float
    allowed: float
    published: int = 0
    host: str = "host unknown"
    beats: int = 0
    step: int = 0
    phase: str = "start"
    age: float = 0.0
    done: bool = False

    def note(self, record: Mapping[str, Any], now: float) -> None:
        if record["published"] != self.published:
            vars(self).update(record, heard=now)

    def seconds(self, now: float) -> float:
        """Seconds since its last beat."""
        return self.age + now - self.heard

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host}), last seen in step {self.step}, phase {self.phase!r},"
