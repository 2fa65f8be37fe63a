"""The small key-value store in process 0, which all processes of a job can read and write.

It is not public API of JAX: Orbax and `multihost_utils` reach for it in the same way, and
`tests/distributed/test_distributed.py` exercises every call that is used here.
"""

from typing import Any

import jax
from jax._src import distributed

ROOT = "dalle_jax"  # prefix of all our keys
FOREVER_MS = 10**11  # three years


def client() -> Any:
    """The client of the store, jaxlib's DistributedRuntimeClient; None with one process."""
    state = distributed.global_state
    return state.client if state.client is not None and state.num_processes > 1 else None


def place() -> tuple[int, int]:
    """Index of this process and number of all; unlike `jax.process_index()` it touches no device."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def coordinator() -> str:
    """HOST:PORT of process 0."""
    return distributed.global_state.coordinator_address or ""


def get(store: Any, key: str) -> str | None:
    """The value of a key, None while nobody has set it."""
    try:
        return store.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def wait(store: Any, key: str) -> str:
    """The value of a key, as soon as somebody sets it. Raises JaxRuntimeError when the job ends before that."""
    return store.blocking_key_value_get(key, FOREVER_MS)


def put_first(store: Any, key: str, value: str) -> str:
    """Set a key that nobody has set before; the value that it then has."""
    try:
        store.key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        return store.key_value_try_get(key)
    return value
