"""Flax's msgpack files: a tree of maps whose leaves are arrays, each read by itself."""

import functools
import os
from typing import Any

import msgpack
import numpy as np
from flax import serialization

from dalle_jax.convert import stored
from dalle_jax.convert.stored import Array, Stored

CHUNKED = "__msgpack_chunked_array__"  # the first key of a map that stands for an array above a gigabyte
MAX_KEYS = 1 << 20  # of one map


def read(path: str) -> dict[str, Array]:
    """The arrays of a tree, by their keys joined by dots.

    Every array is read once and let go, so that a damaged file shows at once.

    Raises:
      UserError: the file is damaged or no tree of arrays.
    """
    found: dict[str, Array] = {}
    with stored.reading(path), open(path, "rb") as file, open(path, "rb") as ahead:
        reader = msgpack.Unpacker(file, max_buffer_size=0, max_array_len=MAX_KEYS, max_map_len=MAX_KEYS)

        def walk(prefix: str) -> None:
            start = reader.tell()
            ahead.seek(start)
            if not _is_map(ahead.read(1)):
                return leaf(prefix, start, 1)
            for left in range(reader.read_map_header(), 0, -1):
                key = reader.unpack()
                if key == CHUNKED:
                    return leaf(prefix, start, 2 * left - 1)
                walk(f"{prefix}.{key}" if prefix else str(key))

        def leaf(name: str, start: int, objects: int) -> None:
            for _ in range(objects):
                reader.skip()
            load = functools.partial(_leaf, path, start, reader.tell())
            if isinstance(array := load(), np.ndarray):
                found[name] = Stored(array.shape, array.dtype, load)

        walk("")
        if reader.tell() != os.path.getsize(path):
            raise ValueError("more behind the tree")
    return found


def _is_map(first: bytes) -> bool:
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


def _leaf(path: str, start: int, stop: int) -> Any:
    with stored.reading(path), open(path, "rb") as file:
        file.seek(start)
        return serialization.msgpack_restore(file.read(stop - start))
