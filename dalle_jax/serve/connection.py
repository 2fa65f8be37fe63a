"""`Connection`: uvicorn's, with a bound in time on what it waits for, and room for others when many are silent."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 128  # connections that are accepted at a time; room for so many is kept below uvicorn's limit
HEAD_SECONDS = 20  # for the head of a request to arrive, from the opening of the connection or the answer before
READ_SECONDS = 60  # in which a client must read something of an answer that waits for it


class Connection(H11Protocol):
    """A connection that is closed if it owes a request for `HEAD_SECONDS`, or reads nothing for `READ_SECONDS`.

    uvicorn itself waits without limit for the rest of a head, for the rest of a body that nobody reads any more, and
    for the client to read its answer. At the maximum number of connections the one whose request has been incomplete
    longest is closed, so that clients who send nothing keep nobody out.
    """

    _owing: asyncio.TimerHandle | None = None
    _due = 0.0  # of the head of the request that comes next, or is being read or answered
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency - BACKLOG:
            others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
            owing = [other for other in others if other._owing is not None or other.cycle.more_body]
            if owing:
                min(owing, key=lambda other: other._due)._give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._settle()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._settle()
        elif self._owing is None and not self.transport.is_closing():
            self._due = self.loop.time() + HEAD_SECONDS
            self._owing = self.loop.call_at(self._due, self._give_up)

    def _settle(self) -> None:
        if self._owing is not None:
            self._owing.cancel()
            self._owing = None

    def _give_up(self) -> None:
        self._settle()
        self.connections.discard(self)
        self.transport.close()
        if self.transport.get_write_buffer_size():  # it is closed when this is read
            self.loop.call_later(READ_SECONDS, self.transport.abort)
