"""Files that appear whole or not at all, and folders that one process writes to at a time."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A name beside `path` to write a file under; when the block ends, the file takes the name `path`.

    At any moment `path` is the old file or the whole new one, even if the machine goes down. If the block raises, what
    was written is removed. What a kill leaves behind is hidden: `.NAME.XXXXXXXX`.

    Raises:
      OSError: the file cannot be written or renamed.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def prepare(folder: str | os.PathLike) -> None:
    """Make a folder and show that files can be written in it: before the work whose results they will hold.

    Raises:
      OSError: it is a file, may not be written in, or has no room.
    """
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    probe(folder)


def probe(folder: str | os.PathLike) -> None:
    """`prepare` for a folder that must be there."""
    with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
        file.write(bytes(2**16))


def write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a whole file as `replacing` does; text in UTF-8.

    Raises:
      OSError: the file cannot be written.
    """
    with replacing(path) as aside:
        aside.write_bytes(data if isinstance(data, bytes) else data.encode())


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, seconds: float = 0.0) -> Iterator[bool]:
    """Hold the lock of a file, which is made for it, until the block ends, by a kill too.

    Yields False where another process still holds it after so many seconds, and True on a file system without locks.

    Raises:
      OSError: the file cannot be made.
    """
    with pathlib.Path(path).open("ab") as file:
        until, free = time.monotonic() + seconds, False
        while not free:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                if time.monotonic() >= until:
                    break
                time.sleep(0.2)
            except OSError:  # a file system without locks
                free = True
        yield free
