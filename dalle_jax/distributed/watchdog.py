"""Finds the process that died or hangs, names it, and ends the job."""

import atexit
import collections
import contextlib
import faulthandler
import itertools
import json
import os
import re
import socket
import sys
import threading
import time

import jax

from dalle_jax.distributed import connections, kv_store
from dalle_jax.errors import EXIT_INTERRUPTED, EXIT_RESTART, EXIT_USER_ERROR, UserError, say

# How an error begins that may only say that the connection to a process was lost.
LOST = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
EXIT_STATUS = {UserError: EXIT_USER_ERROR, KeyboardInterrupt: EXIT_INTERRUPTED}  # of the command; 1 for the rest
_watchdogs = itertools.count()


class Watchdog:
    """Ends this process when the job cannot go on, and says which process is why.

        with Watchdog(300, first_seconds=3600) as watchdog:
            watchdog.beat(step, "update")  # what begins now

    Every process publishes its last beat through the key-value store. Process 0 looks for one that has not published
    for `timeout_seconds` (killed, frozen, its machine gone) and, if all still publish, at the one with the fewest
    beats, for which the others wait, as all go through the same phases. If it is in its phase for longer than
    `timeout_seconds`, it hangs; the first two times of every phase, in which programs are compiled and connections
    made, may take `first_seconds`, and the time before the first other phase `start_seconds`. The others watch for the
    silence of process 0. Whoever finds something prints rank, host, step and phase on stderr, then its own Python
    stacks, and ends with `EXIT_RESTART` by os._exit, because threads that wait in a collective never return. A process
    that dies is found sooner, as its connection to process 0 closes (`lines.py`); all others end within 1.5 x
    timeout_seconds. Only where process 0 is killed outright JAX is faster: it aborts the others at once (SIGABRT), with
    a message that names the coordination service, which is process 0.

    An exception that leaves the block ends the others at once, with the status that this process ends with. An error
    that may only say that the connection to a dead process was lost first waits for the watchdog. With one process
    nothing is watched.
    """

    def __init__(
        self, timeout_seconds: float, *, first_seconds: float | None = None, start_seconds: float | None = None
    ):
        """timeout_seconds: more than twice the longest update. first_seconds: at least as long, the default.

        start_seconds: of the phase 'start', in which the processes connect; default first_seconds.
        """
        self._timeout = timeout_seconds
        self._first = max(timeout_seconds, first_seconds or 0.0)
        self._start = start_seconds or self._first
        self._interval = min(max(timeout_seconds / 20, 0.05), 5.0)
        self._times_in: collections.Counter[str] = collections.Counter()
        self._beats = 0
        self._client, self._ended, self._ending = None, threading.Event(), threading.Lock()
        self._switchboard: connections.Switchboard | None = None
        self._line: connections.Line | None = None
        self.beat(0, "start")

    def beat(self, step: int, phase: str) -> None:
        """Says that `phase` of update `step` begins here. Costs a microsecond: a thread of its own publishes it."""
        self._times_in[phase] += 1
        self._beats += 1
        allowed = self._first if self._times_in[phase] <= 2 else self._timeout
        if phase == "start":
            allowed = self._start
        self._beat = (time.monotonic(), self._beats, step, phase, allowed)

    def __enter__(self) -> "Watchdog":
        self._client = kv_store.client()
        if self._client is None:
            return self
        self._rank, self._count = kv_store.place()
        self._root, self._published = f"{kv_store.ROOT}/watchdog/{next(_watchdogs)}", 0
        watched = range(self._count) if self._rank == 0 else (0,)
        self._peers = {rank: _Peer(rank, time.monotonic(), self._start) for rank in watched}
        self._answered = time.monotonic()  # when process 0 last answered
        if self._rank == 0:
            with contextlib.suppress(OSError):  # without connections the beats must do
                self._switchboard = connections.Switchboard(
                    kv_store.coordinator().rsplit(":", 1)[0].strip("[]"), self._gone
                )
                self._client.key_value_set(f"{self._root}/lines", self._switchboard.address)
        self._threads = [
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True)
            for work in (self._talk, self._judge, *([self._connect] if self._rank else []))
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if self._client is None:
            return
        if error is not None:
            self._fail(error)
        self._ended.set()
        for thread in self._threads:
            thread.join(self._timeout)
        if error is None:
            self._publish(done=True)
            if self._line is not None:
                self._line.close()

    def _fail(self, error: BaseException) -> None:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        message, code = f"{self._name()} failed: {line}", EXIT_STATUS.get(type(error), 1)
        if LOST.match(line) and not isinstance(error, UserError):
            self._say(f"{message}; looking for a process that is gone")
            time.sleep(1.5 * self._timeout)  # the watchdog's threads may end this process meanwhile
        self._decide(code, message)
        atexit.register(self._leave, code)  # before JAX's own, which would wait for processes that are gone

    def _leave(self, code: int) -> None:
        if self._rank == 0:  # the others learn of it through process 0
            time.sleep(min(1.0, self._interval) if self._told_all() else 3 * self._interval)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    # One thread talks to process 0, which may never answer; another one judges by what is known; a third connects.

    def _talk(self) -> None:
        while not self._ended.is_set():
            try:
                self._publish()
                self._read()
                self._answered = time.monotonic()
            except jax.errors.JaxRuntimeError:
                pass  # counts as no answer
            self._ended.wait(self._interval)

    def _connect(self) -> None:
        until, address = time.monotonic() + self._start, None
        with contextlib.suppress(jax.errors.JaxRuntimeError, OSError):
            while address is None and time.monotonic() < until and not self._ended.wait(self._interval):
                address = kv_store.get(self._client, f"{self._root}/lines")
            self._line = connections.Line(address, self._rank, self._end) if address else None

    def _gone(self, rank: int) -> None:
        """Called in process 0 when the connection of a process has closed without a goodbye."""
        verdict = None
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no answer must not end this thread
            verdict = kv_store.get(self._client, f"{self._root}/verdict")  # it may have left with one
        if verdict is not None:
            self._end(*json.loads(verdict))
        elif not self._ended.is_set():
            self._end(EXIT_RESTART, f"{self._peers[rank]} is gone: its connection has closed")

    def _publish(self, *, done: bool = False) -> None:
        since, *place, allowed = self._beat
        self._published += 1
        record = [self._published, socket.gethostname(), *place, time.monotonic() - since, allowed, done]
        self._client.key_value_set(f"{self._root}/beat/{self._rank}", json.dumps(record), allow_overwrite=True)

    def _read(self) -> None:
        if self._rank == 0:
            found = self._client.key_value_dir_get(f"{self._root}/beat")
            records = {int(key.rsplit("/", 1)[1]): record for key, record in found}
        else:
            records = {0: kv_store.get(self._client, f"{self._root}/beat/0")}
        for rank, record in records.items():
            if record is not None:
                self._peers[rank].note(json.loads(record), time.monotonic())
        verdict = kv_store.get(self._client, f"{self._root}/verdict")
        if verdict is not None:
            self._end(*json.loads(verdict))

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(self._interval):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > self._timeout / 2:  # this process was frozen itself, and knows nothing
                self._answered = now
                for peer in self._peers.values():
                    peer.heard = now
            elif self._rank != 0 and now - self._answered > self._timeout:
                self._end(EXIT_RESTART, f"{self._peers[0]} has not answered for {now - self._answered:.1f} s")
            elif found := self._find(now):
                self._end(EXIT_RESTART, found)

    def _find(self, now: float) -> str | None:
        """What is wrong with a peer, None if nothing is."""
        peers = [peer for peer in self._peers.values() if not peer.done]
        for peer in peers:
            if now - peer.heard > peer.may_be_silent(self._timeout):
                return f"{peer} has given no sign of life for {now - peer.heard:.1f} s"
        if self._rank != 0 or not peers:
            return None  # who hangs is said by process 0, which knows all of them
        last = min(peers, key=lambda peer: (peer.beats, -peer.age(now)))  # the others wait for it
        if last.age(now) <= last.allowed or any(now - peer.heard > self._timeout / 2 for peer in peers):
            return None  # within its time, or waiting for one that is on its way to be found silent
        same = sum(peer.beats == last.beats for peer in peers) - 1
        others = f" ({same} of {len(peers) - 1} others are at the same place)" if len(peers) > 1 else ""
        return f"{last} has made no progress for {last.age(now):.1f} s{others}"

    def _end(self, code: int, message: str) -> None:
        """Names what is wrong and ends this process. Does not return."""
        self._ending.acquire()  # never released: one end is enough
        self._say(f"{message}: {self._name()} ends with status {code}")
        if code == EXIT_RESTART:  # nobody knows why: where is everybody?
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        if self._rank == 0:
            self._decide(code, message)
        self._leave(code)

    def _decide(self, code: int, message: str) -> None:
        """The verdict for everybody, in the store and over the connections."""
        kv_store.put_first(self._client, f"{self._root}/verdict", json.dumps([code, message]))
        if self._switchboard is not None:
            self._switchboard.tell(code, message)

    def _told_all(self) -> bool:
        return self._switchboard is not None and self._switchboard.joined == self._count - 1

    def _name(self) -> str:
        return f"process {self._rank} of {self._count} ({socket.gethostname()})"

    def _say(self, line: str) -> None:
        say(f"dalle-jax: {line}")


class _Peer:
    """What is known of a process."""

    def __init__(self, rank: int, now: float, first_seconds: float):
        self.rank, self.heard, self._first = rank, now, first_seconds  # heard: of its last sign of life
        self.published, self.host, self.beats, self.step, self.phase = 0, "host unknown", 0, 0, "start"
        self._age, self.allowed, self.done = 0.0, first_seconds, False

    def note(self, record: list, now: float) -> None:
        if record[0] != self.published:
            self.heard, (self.published, self.host, *place) = now, record
            self.beats, self.step, self.phase, self._age, self.allowed, self.done = place

    def age(self, now: float) -> float:
        """Seconds since its last beat."""
        return self._age + now - self.heard

    def may_be_silent(self, timeout: float) -> float:
        """Seconds; before its first sign of life it may still be on its way here."""
        return timeout if self.published else self._first

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host}), last seen in step {self.step}, phase {self.phase!r},"
