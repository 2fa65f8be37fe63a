"""An open connection from every process to process 0, because the kernel closes those of a process that dies at once.

Silence takes minutes to mean something; a connection that closes without a goodbye means that its process is gone. The
same connections carry the verdict of process 0 back. Where one cannot be made (a network that lets only known ports
through), nothing is lost but time: the watchdog's beats find the same.
"""

import contextlib
import json
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

KEY_BYTES = 16
GOODBYE = b"goodbye\n"
CONNECT_SECONDS = 10.0
LINE = 4096  # bytes; a verdict is shorter
IDLE_SECONDS = 60  # then the kernel asks whether the other end is there, which also keeps firewalls from forgetting it


class Switchboard:
    """Process 0's end of all lines.

    address: what the others need, as a string for the key-value store. on_gone(rank): called once for every process
    whose line closed without a goodbye, in a thread of this object.
    """

    def __init__(self, host: str, on_gone: Callable[[int], None]):
        """host: a name of this machine that the others can resolve.

        Raises:
          OSError: nothing can listen here.
        """
        _allow_many_files()
        self._on_gone, self._key = on_gone, secrets.token_hex(KEY_BYTES)
        self._listening = socket.create_server(("", 0), backlog=1024)
        self.address = json.dumps([host, self._listening.getsockname()[1], self._key])
        self._selector, self._lock = selectors.DefaultSelector(), threading.Lock()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._ranks: dict[socket.socket, int] = {}
        self.joined = 0  # processes that ever made their line
        threading.Thread(target=self._serve, name="watchdog lines", daemon=True).start()

    def tell(self, code: int, message: str) -> None:
        """The verdict, to everybody."""
        with self._lock:
            for line in self._ranks:
                with contextlib.suppress(OSError):
                    line.send((json.dumps([code, message]) + "\n").encode(), socket.MSG_DONTWAIT)

    def _serve(self) -> None:
        while True:
            for ready, _ in self._selector.select():
                if ready.fileobj is self._listening:
                    try:
                        self._accept(self._listening.accept()[0])
                    except OSError:
                        time.sleep(1)  # the next one may find room
                else:
                    self._read(ready.fileobj)

    def _accept(self, line: socket.socket) -> None:
        line.settimeout(CONNECT_SECONDS)
        _keep_alive(line)
        key, _, rank = line.recv(LINE).decode(errors="replace").strip().partition(" ")
        if secrets.compare_digest(key.encode(), self._key.encode()) and rank.isdigit():
            with self._lock:
                self._ranks[line], self.joined = int(rank), self.joined + 1
            self._selector.register(line, selectors.EVENT_READ)
        else:
            line.close()

    def _read(self, line: socket.socket) -> None:
        try:
            data = line.recv(LINE)
        except OSError:
            data = b""
        self._selector.unregister(line)
        with self._lock:
            rank = self._ranks.pop(line)
        line.close()
        if data != GOODBYE:
            self._on_gone(rank)


class Line:
    """Another process's end. on_verdict(code, message): what process 0 tells, in a thread of this object.

    Raises:
      OSError: process 0 cannot be reached there.
    """

    def __init__(self, address: str, rank: int, on_verdict: Callable[[int, str], None]):
        host, port, key = json.loads(address)
        self._line = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        self._line.sendall(f"{key} {rank}\n".encode())
        self._line.settimeout(None)
        _keep_alive(self._line)
        self._on_verdict = on_verdict
        threading.Thread(target=self._listen, name="watchdog line", daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            with self._line.makefile() as lines:
                for text in lines:
                    self._on_verdict(*json.loads(text))

    def close(self) -> None:
        """Says goodbye: this process has not died."""
        with contextlib.suppress(OSError):
            self._line.sendall(GOODBYE)
            self._line.shutdown(socket.SHUT_RDWR)


def _keep_alive(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)


def _allow_many_files() -> None:
    """A thousand processes are two thousand connections in process 0, JAX's own included; the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
