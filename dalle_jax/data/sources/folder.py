"""A folder of images, with captions in a `.txt` of the same name or in a metadata file.

`metadata.jsonl` and `metadata.csv` follow the convention of Hugging Face's ImageFolder: a column `file_name`, relative
to the metadata file, and a caption column (`CAPTION_FIELDS`). An image that no metadata file lists takes its captions
from the `.txt` beside it, one per line. Hidden files and other files are ignored; links to folders are not followed.
"""

import csv
import json
import os
import pathlib
import stat

from dalle_jax.data.decode import SUFFIXES
from dalle_jax.data.record import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, BadRecord, Dropped, Record
from dalle_jax.data.sources import captions
from dalle_jax.errors import UserError

CAPTION_FIELDS = ("captions", "caption", "text")
METADATA = ("metadata.jsonl", "metadata.csv")


class FolderSource:
    """Records of a folder, sorted by path. See `record.Source`; opened by `sources.open_source('folder:...')`.

    Slots are the images, then the captions that have no image.

    Raises:
      UserError: no such folder, no image in it, or a metadata file that cannot be parsed.
    """

    def __init__(self, name: str, folder: str, *, captions_required: bool = True):
        self.name, self._folder, self._captions_required = name, folder, captions_required
        if not os.path.isdir(folder):
            raise UserError(f"expected a folder of images, got {folder}, which is no folder: check the path")
        images, texts, metadata = _walk(folder)
        self._captions: dict[str, dict | None] = {}  # image path -> its row of a metadata file
        for path in metadata:
            self._captions.update(_rows(folder, path))
        stems = {os.path.splitext(path)[0] for path in images}
        orphans = [path for path in texts if os.path.splitext(path)[0] not in stems]
        self._paths = [*images, *sorted(self._captions.keys() - set(images)), *orphans]
        if not self._paths:
            raise UserError(f"expected images in {folder}, got none: check the path, or name a folder with image files")
        self._images = len(self._paths) - len(orphans)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record | Dropped:
        index = range(len(self))[index]
        path = self._paths[index]
        try:
            if index >= self._images:
                raise BadRecord("no image", f"no image of the same name beside {path}")
            return Record(path, read_image(self._folder, path), self._read_captions(path))
        except BadRecord as bad:
            return Dropped(path, bad.reason, bad.detail)

    def _read_captions(self, path: str) -> tuple[str, ...]:
        try:
            if row := self._captions.get(path):
                return captions.from_fields(row, names=CAPTION_FIELDS)
            text = os.path.join(self._folder, os.path.splitext(path)[0] + ".txt")
            if not os.path.exists(text):
                raise BadRecord("no caption", "no .txt of the same name and no row of a metadata file")
            return captions.from_text(_read(text, limit=MAX_CAPTION_BYTES))
        except BadRecord:
            if self._captions_required:
                raise
            return ()


def read_image(folder: str, path: str) -> bytes:
    """The bytes of the image `path`, relative to `folder`.

    Raises:
      BadRecord: 'outside the folder', 'no image', 'zero bytes', 'too many bytes' or 'unreadable file'.
    """
    if os.path.isabs(path) or ".." in pathlib.PurePath(path).parts:
        raise BadRecord("outside the folder", f"expected a path inside the folder, got {path}")
    data = _read(os.path.join(folder, path), limit=MAX_IMAGE_BYTES)
    if not data:
        raise BadRecord("zero bytes")
    return data


def _read(path: str, *, limit: int) -> bytes:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):  # a pipe would block forever
        raise BadRecord("no image", f"{path} does not exist or is not a regular file")
    try:
        if status.st_size > limit:
            raise BadRecord("too many bytes", f"{status.st_size}, the limit is {limit}")
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise BadRecord("unreadable file", str(error)) from None


def _walk(folder: str) -> tuple[list[str], list[str], list[str]]:
    """Sorted relative paths of the images, the texts and the metadata files."""
    images, texts, metadata = [], [], []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        for name in names:
            path = name if relative == "." else os.path.join(relative, name)
            suffix = os.path.splitext(name)[1][1:].lower()
            if name.startswith("."):
                continue
            if name in METADATA:
                metadata.append(path)
            elif suffix in SUFFIXES:
                images.append(path)
            elif suffix == "txt":
                texts.append(path)
    return sorted(images), sorted(texts), sorted(metadata)


def _rows(folder: str, path: str) -> dict[str, dict]:
    """The rows of a metadata file: image path relative to `folder` -> row.

    Raises:
      UserError: the file does not parse, or a row has no file_name.
    """
    parent, rows = os.path.dirname(path), {}
    try:
        with open(os.path.join(folder, path), encoding="utf-8-sig", newline="") as file:
            lines = (json.loads(line) for line in file if line.strip())
            for number, row in enumerate(csv.DictReader(file) if path.endswith(".csv") else lines, 1):
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    raise UserError(
                        f"expected a file_name in every row of {os.path.join(folder, path)}, row {number} has none: "
                        "add it or remove the row"
                    )
                rows[os.path.normpath(os.path.join(parent, row["file_name"]))] = row
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"expected a readable {os.path.join(folder, path)}, got {error}: mend or remove it") from error
    return rows
