"""The user's cache folder, for files that can be rebuilt at any time: shard indexes and unpacked shards.

It is `$DALLE_JAX_CACHE`, else `$XDG_CACHE_HOME/dalle_jax`, else `~/.cache/dalle_jax`, and never beside the data, which
may be read-only. A name has the fingerprint of what it was made from, so a stale entry is never used. Writing is
atomic; a damaged entry is rebuilt; the folder can be deleted at any time.
"""

import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dalle_jax import files
from dalle_jax.errors import UserError

VARIABLE = "DALLE_JAX_CACHE"


def folder() -> pathlib.Path:
    """The cache folder; may not exist yet."""
    if chosen := os.environ.get(VARIABLE):
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dalle_jax"


def arrays(name: str, build: Callable[[], dict[str, Any]], *, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `names` of the cached file `name`, or those of `build()`, which are then stored if possible."""
    path = folder() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        built = build()
    try:
        _write(path, lambda out: np.savez(out, **built))
    except OSError:
        pass  # cannot be kept: slower the next time, not wrong
    return built


def file(name: str, write: Callable[[BinaryIO], None]) -> str:
    """The path of the cached file `name`, which `write(open file)` makes if it is not there yet.

    Raises:
      UserError: the cache folder cannot be written.
    """
    path = folder() / name
    if not path.exists():
        try:
            _write(path, write)
        except OSError as error:
            raise UserError(
                f"expected a writable cache folder for an unpacked shard, got {error}; set {VARIABLE} to a folder "
                "with free space"
            ) from error
    return str(path)


def _write(path: pathlib.Path, write: Callable[[BinaryIO], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as aside, aside.open("wb") as out:
        write(out)
