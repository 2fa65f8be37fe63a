"""Agreement between the processes of a job: gathered values, whole arrays, the step at which to stop."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dalle_jax.distributed import kv_store

STOP_LEAD = 2  # steps between the wish to stop and the stop, see `stop_agreed`
_stops = 0  # agreements reached so far; each has a key of its own


def gather_json(value: Any) -> list[Any]:
    """`value` of every process, in their order, on every process. All of them must call this at the same point.

    value: plain json, small.
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

    All processes must call this at the same point. Each device needs memory for the largest array, each host for all.
    """

    def read(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(read, tree)


def whole_in_first(x: jax.Array, *, dtype: Any, by_rows: bool = False) -> np.ndarray | None:
    """An array in `dtype` as numpy in process 0, None in the others, wherever its pieces lie.

    by_rows: one row at a time, so that no device and no other host holds more than one row as a whole. All processes
    must call this at the same point.
    """
    first = jax.process_index() == 0
    if not by_rows:
        found = whole(x.astype(dtype))
        return found if first else None
    rows = np.empty(x.shape, dtype) if first else None
    for index in range(len(x)):
        row = whole(x[index].astype(dtype))
        if rows is not None:
            rows[index] = row
    return rows


def stop_agreed(step: int, wants_stop: bool) -> bool:
    """Whether all processes stop after this step: True on all of them at the same step, False before.

    The first process that wants to stop names the step `STOP_LEAD` later. No other process can be past that step
    without having seen the name: it asks about `step + 2` only after it has waited for the numbers of `step + 1`, a
    step needs all processes, and the first process begins `step + 1` after it has named the step. Costs one request to
    process 0, while the step is computed. With one process: `wants_stop`.
    """
    global _stops
    client = kv_store.client()
    if client is None:
        return wants_stop
    key = f"{kv_store.ROOT}/stop/{_stops}"
    named = kv_store.put_first(client, key, str(step + STOP_LEAD)) if wants_stop else kv_store.get(client, key)
    if named is None or step < int(named):
        return False
    if step > int(named):
        raise RuntimeError(f"the processes agreed to stop after step {named}, and this one is at {step}")
    _stops += 1
    return True
