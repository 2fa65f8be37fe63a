"""Files that appear whole or not at all, and a bounded number of open ones."""

import collections
import contextlib
import functools
import os
import pathlib
import threading
import uuid
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
File = TypeVar("File")


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


def write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a whole file as `replacing` does; text in UTF-8.

    Raises:
      OSError: the file cannot be written.
    """
    with replacing(path) as aside:
        aside.write_bytes(data if isinstance(data, bytes) else data.encode())


class OpenFiles(Generic[Key, File]):
    """The files used last, at most `max_open` of them; thread-safe, and a pickled copy opens its own.

    A file that falls out is closed when its last user lets go of it.
    """

    def __init__(self, open_file: Callable[[Key], File], *, max_open: int = 64):
        """open_file: opens the file of a key. max_open: far below the usual limit of 1,024 open files a process."""
        self._open_file, self._max_open = open_file, max_open
        self._files: collections.OrderedDict[Key, File] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return functools.partial(OpenFiles, max_open=self._max_open), (self._open_file,)

    def __getitem__(self, key: Key) -> File:
        """The open file of `key`; raises what `open_file` raises."""
        with self._lock:
            file = self._files.pop(key, None) or self._open_file(key)
            self._files[key] = file
            if len(self._files) > self._max_open:
                self._files.popitem(last=False)
            return file
