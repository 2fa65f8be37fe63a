"""The small key-value store that process 0 of a job keeps for all of them.

It is not public API of JAX: Orbax and `multihost_utils` reach for it in the same way, and
`tests/distributed/test_distributed.py` holds every call that is used here.
"""

import jax
from jax._src import distributed

ROOT = "dalle_jax"  # of all our keys


def client():
    """The key-value store in process 0: jaxlib's DistributedRuntimeClient; None with one process."""
    state = distributed.global_state
    return state.client if state.client is not None and state.num_processes > 1 else None


def place() -> tuple[int, int]:
    """Index of this process and number of all; unlike `jax.process_index()` it touches no device."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def coordinator() -> str:
    """HOST:PORT of process 0."""
    return distributed.global_state.coordinator_address


def get(store, key: str) -> str | None:
    """The value of a key, None if nobody has set it."""
    try:
        return store.key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def put_first(store, key: str, value: str) -> None:
    """Sets a key that nobody has set before; otherwise leaves it."""
    try:
        store.key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
