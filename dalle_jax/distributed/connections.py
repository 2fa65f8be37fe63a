"""A TCP connection from each process to process 0, by which process 0 learns of a death without waiting for a timeout.

When a process dies, its kernel closes the connection at once. Nothing but the process's rank is ever sent. Where a
connection cannot be made (a network that lets only known ports through), only time is lost: the watchdog's beats stop
as well.
"""

import asyncio
import contextlib
import json
import resource
import secrets
import socket
import threading
from collections.abc import Callable

CONNECT_SECONDS = 10.0
IDLE_SECONDS = 60  # then the kernel probes the other end, which also keeps firewalls from dropping the connection


class Listener:
    """Process 0's end of all connections. address: what `connect` needs, as a string."""

    def __init__(self, host: str, on_closed: Callable[[int], None]):
        """host: a name of this machine that the others can resolve. on_closed(rank): called in a thread of this object.

        Raises:
          OSError: nothing can listen here.
        """
        _allow_many_files()
        self._on_closed, self._key = on_closed, secrets.token_hex(16)
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.address = json.dumps([host, self._socket.getsockname()[1], self._key])
        threading.Thread(target=asyncio.run, args=(self._serve(),), name="watchdog listener", daemon=True).start()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._attend, sock=self._socket)
        await server.serve_forever()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first line to its end."""
        rank = None
        _keep_alive(writer.get_extra_info("socket"))
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            key, number = (await asyncio.wait_for(reader.readline(), CONNECT_SECONDS)).decode().split()
            if secrets.compare_digest(key, self._key):
                rank = int(number)
                await reader.read()
        writer.close()
        if rank is not None:
            self._on_closed(rank)


def connect(address: str, rank: int) -> socket.socket:
    """The connection of process `rank`, to be kept until the process ends.

    Raises:
      OSError: process 0 cannot be reached at this address.
    """
    host, port, key = json.loads(address)
    connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    connection.settimeout(None)
    _keep_alive(connection)
    connection.sendall(f"{key} {rank}\n".encode())
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)


def _allow_many_files() -> None:
    """A thousand processes are two thousand connections in process 0, JAX's included; the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
