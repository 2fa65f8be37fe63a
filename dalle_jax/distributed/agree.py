"""What all processes of a job know at the same point: gathered values, whole arrays, the step at which to stop."""

import itertools
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dalle_jax.distributed import kv_store

STOP_LEAD = 2  # updates between the wish to stop and the stop, see `stop_agreed`
_stops = itertools.count()
_stop = next(_stops)  # number of the agreement that is open


def gather_json(value: Any) -> list[Any]:
    """`value` of every process, in their order, on every process. All of them must call this at the same point.

    value: plain json, small. Raises nothing of its own.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    width = 1 << int(sizes.max() - 1).bit_length()  # few widths, as each compiles a program
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def whole(tree: Any) -> Any:
    """The arrays as numpy, whole, on every process, wherever their pieces lie; gathered one at a time.

    All processes must call this at the same point. Every one needs memory for the largest on each device, and for all
    of them on its host.
    """
    return jax.tree.map(
        lambda x: jax.device_get(x) if _readable(x) else multihost_utils.process_allgather(x, tiled=True), tree
    )


def _readable(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def stop_agreed(step: int, wants_stop: bool) -> bool:
    """Is this the step after which all processes stop? True on all of them at the same one, False before.

    The first process that wants to names the step `STOP_LEAD` later. No process is past that without having seen it,
    as long as the caller has waited for the numbers of update `step - 1` before it asks about `step` and an update
    needs all processes: whoever asks about `step + 2` has numbers of `step + 1`, which the first process began after it
    had named the step. Costs one request to process 0, while the update is at work. Alone: `wants_stop`.
    """
    global _stop
    client = kv_store.client()
    if client is None:
        return wants_stop
    key = f"{kv_store.ROOT}/stop/{_stop}"
    if wants_stop:
        kv_store.put_first(client, key, str(step + STOP_LEAD))
    named = kv_store.get(client, key)
    if named is None or step < int(named):
        return False
    if step > int(named):
        raise RuntimeError(f"the processes agreed to stop after step {named}, and this one is at {step}")
    _stop = next(_stops)
    return True
