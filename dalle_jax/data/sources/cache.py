"""Files that can be rebuilt at any time: shard indexes and unpacked shards, in the user's cache folder.

`DALLE_JAX_CACHE`, else `$XDG_CACHE_HOME/dalle_jax`, else `~/.cache/dalle_jax`; never beside the data, which may be
read-only. A name carries the fingerprint of what it was made from, so a stale entry is never asked for. Writing is
atomic; a damaged entry is rebuilt; delete the folder whenever you like.
"""

import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from dalle_jax import files
from dalle_jax.errors import UserError

VARIABLE = "DALLE_JAX_CACHE"


def folder() -> pathlib.Path:
    """The cache folder; may not exist yet."""
    if own := os.environ.get(VARIABLE):
        return pathlib.Path(own)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dalle_jax"


def arrays(name: str, build: Callable[[], dict[str, np.ndarray]], *, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `names` stored under `name`, or those of `build()`, stored for the next time where possible."""
    path = folder() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        built = build()
    try:
        _write(path, lambda out: np.savez(out, **built))
    except OSError:
        pass  # nowhere to keep it: slower the next time, not wrong
    return built


def file(name: str, write: Callable[[BinaryIO], None]) -> str:
    """The path of the cached file `name`, made by `write(open file)` where it is not there yet.

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
