"""Where the processes wait for one another while they write a checkpoint in the background."""

import contextlib
import itertools
from collections.abc import Callable

import jax

from dalle_jax.distributed import kv_store

# Orbax's names for its barriers, in the order of a save. BEGIN_OR_END are both passed at the beginning and at the end.
BEGIN_OR_END, WRITTEN, RENAMED = ("set_value_start", "set_value_end"), "async_write_complete", "async_commit_complete"
_barriers = itertools.count()


class OtherProcessFailed(Exception):
    """Another process could not write its part of a checkpoint."""


class SaveBarrier:
    """`barrier_sync_fn` of an Orbax `CheckpointManager`, with which a save fails in all processes or in none.

    With Orbax's barrier, a process that cannot write its part skips to the end of the save, and the others wait at
    `WRITTEN` until that times out. Here it says that it failed and passes the barriers that it skipped; whoever leaves
    a barrier after that raises `OtherProcessFailed`.

    Every process must make its barriers and saves in the same order. With one process nothing happens.
    """

    def __init__(self, written: Callable[[], None]):
        """written: called in each process when its part is written, before the others are waited for."""
        self._written = written
        self._root, self._save = f"{kv_store.ROOT}/save/{next(_barriers)}", 0
        self._begun, self._left = False, list[str]()  # barriers of the save that has begun that it has still to pass

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        client = kv_store.client()
        if client is None:
            return
        save = f"{self._root}/{self._save}"
        name = next(name for name in (*BEGIN_OR_END, WRITTEN, RENAMED) if name in key)
        if name in (WRITTEN, RENAMED):
            if name == WRITTEN:
                self._written()
            self._left.remove(name)
            client.wait_at_barrier(f"{save}/{name}", timeout_ms)
            if kv_store.get(client, f"{save}/failed") is not None:
                raise OtherProcessFailed("another process could not write its part")
            return
        ends = self._begun
        if self._left:
            kv_store.put_first(client, f"{save}/failed", "")
            while self._left:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # then it has timed out for everybody
                    client.wait_at_barrier(f"{save}/{self._left.pop(0)}", timeout_ms)
        client.wait_at_barrier(f"{save}/{name}/{'end' if ends else 'begin'}", timeout_ms)
        if name == BEGIN_OR_END[1]:
            self._begun, self._left = not ends, [] if ends else [WRITTEN, RENAMED]
            self._save += ends
