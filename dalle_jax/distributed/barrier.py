"""Where the processes wait for one another while they write a checkpoint in the background."""

import contextlib
import itertools

import jax

from dalle_jax.distributed import kv_store

# Orbax's names for its barriers, in the order of a save: begun, all have written, process 0 has renamed, ended.
BEGIN_OR_END, WRITTEN, RENAMED = ("set_value_start", "set_value_end"), "async_write_complete", "async_commit_complete"
_barriers = itertools.count()


class OtherProcessFailed(Exception):
    """Another process could not write its part of a checkpoint."""


class SaveBarrier:
    """`barrier_sync_fn` of an Orbax `CheckpointManager`, with which a save fails in all processes or in none.

    With Orbax's own, a process that cannot write its part goes on to the end of the save, and the others wait for it
    where all have written until that times out. Here it says on its way that it failed and keeps the appointments
    that it missed; whoever comes from one and finds that said raises `OtherProcessFailed`.

    Every process must make its barriers and saves in the same order. With one process nothing happens.
    """

    def __init__(self):
        self._root, self._save = f"{kv_store.ROOT}/save/{next(_barriers)}", 0
        self._missed: list[str] | None = None  # of this save, None before it has begun

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        client = kv_store.client()
        if client is None:
            return
        failed = f"{self._root}/{self._save}/failed"
        name = next(name for name in (*BEGIN_OR_END, WRITTEN, RENAMED) if name in key)
        if name in (WRITTEN, RENAMED):
            self._missed.remove(name)
            client.wait_at_barrier(f"{self._root}/{self._save}/{name}", timeout_ms)
            if kv_store.get(client, failed) is not None:
                raise OtherProcessFailed("another process could not write its part")
            return
        ends = self._missed is not None
        if ends and self._missed:
            kv_store.put_first(client, failed, "")
            while self._missed:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # then it has timed out for everybody
                    client.wait_at_barrier(f"{self._root}/{self._save}/{self._missed.pop(0)}", timeout_ms)
        client.wait_at_barrier(f"{self._root}/{self._save}/{name}/{'end' if ends else 'begin'}", timeout_ms)
        if name == BEGIN_OR_END[1]:
            self._missed = None if ends else [WRITTEN, RENAMED]
            self._save += ends
