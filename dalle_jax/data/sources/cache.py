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

from dalle_jax import files
from dalle_jax.errors import UserError

VARIABLE = "DALLE_JAX_CACHE"


def folder() -> pathlib.Path:
    """The cache folder; may not exist yet."""
    if chosen := os.environ.get(VARIABLE):
        return pathlib.Path(chosen).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dalle_jax"


def array(name: str) -> np.ndarray | None:
    """The cached array `name`, mapped into memory; None if it is not there or not whole."""
    try:
        return np.load(folder() / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def stored(name: str, built: np.ndarray) -> np.ndarray:
    """`built`, stored as the array `name` and mapped. Equal ones stay, as others may have mapped them over a network.

    Raises:
      UserError: the cache folder cannot be written.
    """
    before = array(name)
    if before is None or not np.array_equal(before, built):
        _write(f"{name}.npy", lambda out: np.save(out, built))
    return np.load(folder() / f"{name}.npy", mmap_mode="r")


def file(name: str, write: Callable[[BinaryIO], None]) -> str:
    """The path of the cached file `name`, which `write(open file)` makes if it is not there yet.

    Raises:
      UserError: the cache folder cannot be written.
    """
    if not (folder() / name).exists():
        _write(name, write)
    return str(folder() / name)


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
