"""Safetensors files: the library checks the header against the file, and the numbers are read bit for bit."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from dalle_jax.convert import stored
from dalle_jax.convert.stored import Array
from dalle_jax.errors import UserError

_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str) -> dict[str, Array]:
    """The arrays by name.

    Raises:
      UserError: the file is damaged or holds numbers of a type that numpy and JAX do not have.
    """
    with stored.reading(path):
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    if unknown := sorted(name for name, entry in header.items() if entry["dtype"] not in _TYPES):
        raise UserError(
            f"expected numbers of the types {', '.join(_TYPES)} in {path}, got {header[unknown[0]]['dtype']} in "
            f"{unknown[0]}: store it as another type"
        )
    return {
        name: stored.numbers(
            path, np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"]), start=8 + size + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }
