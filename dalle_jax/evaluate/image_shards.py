"""Drawn pictures as tar shards (webdataset): NAME.png with how it was made, NAME.txt its caption, NAME.json the rest.

The pictures of a shard are collected as files in a hidden folder beside it, each whole or not at all, and joined when
all are there. So what a kill left is used again, and the shard has the same bytes as if nobody had stopped it.
"""

import contextlib
import fcntl
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Iterator, Mapping

from dalle_jax import files
from dalle_jax.data.sources.tar_members import BLOCK
from dalle_jax.errors import UserError
from dalle_jax.pictures.picture import Picture

END = b"\0" * 10_240  # of an archive, as tar itself writes it


@contextlib.contextmanager
def collecting(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder for the pictures of a shard, locked until the block ends, by a kill too.

    Raises:
      UserError: another process has it; both would draw the same pictures.
    """
    folder = path.with_name(f".{path.name}.parts")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"expected to draw into {path} alone, but another process is: wait for it, or use another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield folder


def packed(name: str, picture: Picture, more: Mapping[str, str]) -> bytes:
    """A picture as it stands in a shard. more: what its .json says besides caption, seed and score."""
    png = io.BytesIO()
    picture.save(png, format="PNG")
    about = {"caption": picture.caption, "seed": picture.seed, "score": picture.score, **more}
    parts = {"png": png.getvalue(), "txt": picture.caption.encode(), "json": json.dumps(about, sort_keys=True).encode()}
    members = b""
    for ending, content in parts.items():
        header = tarfile.TarInfo(f"{name}.{ending}")
        header.size = len(content)
        members += header.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % BLOCK)
    return members


def join(parts: list[pathlib.Path], path: pathlib.Path) -> None:
    """Write a shard of packed pictures and remove their folder."""
    with files.replacing(path) as aside:
        with aside.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
            file.write(END)
    shutil.rmtree(parts[0].parent)
