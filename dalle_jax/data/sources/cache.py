"""The user's cache folder, for files that can be rebuilt at any time: indexes of shards and unpacked shards.

It is `$DALLE_JAX_CACHE`, else `$XDG_CACHE_HOME/dalle_jax`, else `~/.cache/dalle_jax`, and never beside the data, which
may be read-only. A name has the fingerprint of what it was made from, so a stale entry is never used. Writing is
atomic; an entry that is cut is rebuilt; the folder can be deleted at any time.
"""

import os
import pathlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from dalle_jax import files
from dalle_jax.errors import UserError

VARIABLE = "DALLE_JAX_CACHE"
LENGTH = 8  # bytes


def folder() -> pathlib.Path:
    """The cache folder; may not exist yet."""
    if chosen := os.environ.get(VARIABLE):
        return pathlib.Path(chosen).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dalle_jax"


def array(name: str, dtype: DTypeLike) -> np.ndarray | None:
    """The numbers that were stored as `name`, flat and mapped into memory; None if they are not there or not whole.

    A file is its length and the numbers, and no `.npy`: many threads open some, and the parser behind the header of an
    `.npy` fails now and then where threads meet in it (python/cpython#106905).
    """
    try:
        data = np.memmap(folder() / f"{name}.raw", np.uint8, mode="r")
    except (OSError, ValueError):
        return None
    return data[LENGTH:].view(dtype) if data[:LENGTH].tobytes() == _length(len(data) - LENGTH) else None


def stored(name: str, built: np.ndarray) -> np.ndarray:
    """`built`, stored as the array `name` and mapped. Equal ones stay, as others may have mapped them over a network.

    Raises:
      UserError: the cache folder cannot be written.
    """
    before = array(name, built.dtype)
    if before is None or not np.array_equal(before, built.ravel()):
        _write(f"{name}.raw", lambda out: out.writelines((_length(built.nbytes), built.tobytes())))
        before = array(name, built.dtype)
    return built if before is None else before.reshape(built.shape)


def file(name: str, write: Callable[[BinaryIO], None]) -> str:
    """The path of the cached file `name`, which `write(open file)` makes if it is not there yet.

    Raises:
      UserError: the cache folder cannot be written.
    """
    if not (folder() / name).exists():
        _write(name, write)
    return str(folder() / name)


def _length(of: int) -> bytes:
    return of.to_bytes(LENGTH, "little", signed=True)


def _write(name: str, write: Callable[[BinaryIO], object]) -> None:
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with files.replacing(folder() / name) as aside, aside.open("wb") as out:
            write(out)
    except OSError as error:
        raise UserError(
            f"expected a writable cache folder for what is made of tar shards, got {error}; set {VARIABLE} to a folder "
            "with free space"
        ) from error
