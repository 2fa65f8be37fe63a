"""Drawn pictures as tar shards (webdataset): NAME.png with how it was made, NAME.txt its caption, NAME.json the rest.

A shard grows as a hidden file, one whole picture after the other, and gets its name when it is full; what a kill left
of it is cut behind its last whole picture, and the rest is appended: the same bytes as if nobody had stopped it.
"""

import fcntl
import io
import json
import os
import pathlib
import tarfile
from collections.abc import Mapping

from dalle_jax.data.sources.tar_members import BLOCK, members
from dalle_jax.errors import UserError
from dalle_jax.pictures.picture import Picture

PARTS = ("png", "txt", "json")  # of a picture, in this order
END = b"\0" * 10_240  # of an archive, as tar itself writes it


class GrowingShard:
    """One shard while it is written; a context that closes it.

    Attributes:
      names: the pictures that are in it. part: the file where it grows.
    """

    def __init__(self, path: pathlib.Path):
        """Raises UserError if another process is writing it."""
        self.path, self.part = path, growing(path)
        self._file = self.part.open("a+b")
        _take(self._file, self.part)
        self.names, whole = _whole_images(self._file.fileno())
        self._file.truncate(whole)

    def add(self, name: str, picture: Picture, more: Mapping[str, str]) -> None:
        """Append a picture. more: what its .json says besides caption, seed and score."""
        png = io.BytesIO()
        picture.save(png, format="PNG")
        about = {"caption": picture.caption, "seed": picture.seed, "score": picture.score, **more}
        data = png.getvalue(), picture.caption.encode(), json.dumps(about, sort_keys=True).encode()
        for part, content in zip(PARTS, data, strict=True):
            header = tarfile.TarInfo(f"{name}.{part}")
            header.size = len(content)
            padding = b"\0" * (-len(content) % BLOCK)
            self._file.write(header.tobuf(tarfile.USTAR_FORMAT) + content + padding)
        self.names.append(name)

    def sync(self) -> None:
        """Wait until what was added is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """End the archive and give it its name."""
        self._file.write(END)
        self.sync()
        os.replace(self.part, self.path)

    def __enter__(self) -> "GrowingShard":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def growing(path: pathlib.Path) -> pathlib.Path:
    """The file of a shard that is not full yet."""
    return path.with_name(f".{path.name}.part")


def _take(file: io.IOBase, path: pathlib.Path) -> None:
    """Lock the file until it is closed, by a kill too; two jobs in one folder would draw the same pictures."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"expected to draw into {path} alone, but another process is: wait for it, or use another --out"
        ) from error
    except OSError:  # a file system without locks
        pass


def _whole_images(descriptor: int) -> tuple[list[str], int]:
    """Names of the pictures that are wholly in a file, and where the last of them ends in bytes."""
    names, whole, begun, size = [], 0, [], os.fstat(descriptor).st_size
    for member in members(descriptor):
        name, _, part = member.path.rpartition(".")
        begun.append((name, part))
        end = member.offset + -(-member.size // BLOCK) * BLOCK
        if member.fault or end > size or begun != [(name, wanted) for wanted in PARTS[: len(begun)]]:
            break
        if len(begun) == len(PARTS):
            names, whole, begun = [*names, name], end, []
    return names, whole
