"""A folder of images, with captions in a `.txt` or `.json` of the same name or in a metadata file.

`metadata.jsonl` and `metadata.csv` follow the convention of Hugging Face's ImageFolder: a column `file_name`, relative
to the metadata file, and a caption column (`captions.FIELDS`); several rows of one image are its captions. An image
that no metadata file lists takes its captions from the `.txt` beside it, one per line, else from the `.json` beside it
(img2dataset writes both). Hidden files and other files are ignored; links to folders are not followed.
"""

import csv
import json
import os
import pathlib
import stat
from collections.abc import Iterator

from dalle_jax.data.decode import SUFFIXES, UNREAD_SUFFIXES
from dalle_jax.data.record import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, BadRecord, Dropped, Record
from dalle_jax.data.sources import captions
from dalle_jax.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
TEXT, JSON = "txt", "json"

csv.field_size_limit(MAX_CAPTION_BYTES)


class FolderSource:
    """Records of a folder, sorted by path. See `record.Source`; opened by `sources.open_source('folder:...')`.

    Slots are the images, then what has no image: captions, rows that cannot be read, folders that cannot be listed.

    Raises:
      UserError: no such folder, nothing in it, or a metadata file that cannot be read or names no images.
    """

    def __init__(self, name: str, folder: str, *, captions_required: bool = True):
        self.name, self._folder, self._captions_required = name, folder, captions_required
        if not os.path.isdir(folder):
            raise UserError(f"expected a folder of images, got {folder}, which is no folder: check the path")
        self._faults: list[Dropped] = []
        self._rows: dict[str, tuple[str, ...] | Dropped] = {}  # image -> captions of its rows, or why they have none
        self._beside: dict[str, dict[str, str]] = {TEXT: {}, JSON: {}}  # path without suffix -> file with captions
        images, unread, metadata = self._walk()
        self._take_rows(metadata, {*images, *unread})
        stems = {os.path.splitext(path)[0] for path in images}
        for path in unread:
            if os.path.splitext(path)[0] in stems and path not in self._rows:  # e.g. the raw file of a camera
                self._faults.append(Dropped(path, "extra image", "there is one of the same name that is read"))
            else:
                images.append(path)
        stems |= {os.path.splitext(path)[0] for path in unread}
        for stem, path in self._beside[TEXT].items():
            if stem not in stems:
                self._faults.append(Dropped(path, "no image", f"no image of the same name beside {path}"))
        self._paths = [*sorted(images), *sorted(self._rows.keys() - set(images))]
        if not len(self):
            raise UserError(f"expected images in {folder}, got none: check the path, or name a folder with image files")

    def __len__(self) -> int:
        return len(self._paths) + len(self._faults)

    def __getitem__(self, index: int) -> Record | Dropped:
        index = range(len(self))[index]
        if index >= len(self._paths):
            return self._faults[index - len(self._paths)]
        path = self._paths[index]
        try:
            image = read_image(self._folder, path)
            try:
                return Record(path, image, self._read_captions(path))
            except BadRecord:
                if self._captions_required:
                    raise
                return Record(path, image, ())
        except BadRecord as bad:
            return Dropped(path, bad.reason, bad.detail)

    def captions_of(self, index: int) -> tuple[str, ...]:
        index = range(len(self))[index]
        try:
            return self._read_captions(self._paths[index]) if index < len(self._paths) else ()
        except BadRecord:
            return ()

    def _read_captions(self, path: str) -> tuple[str, ...]:
        if rows := self._rows.get(path):
            if isinstance(rows, Dropped):
                raise BadRecord(rows.reason, rows.detail)
            return rows
        stem = os.path.splitext(path)[0]
        for suffix, parse in ((TEXT, captions.from_text), (JSON, captions.from_json)):
            if file := self._beside[suffix].get(stem):
                return parse(_read(self._folder, file, limit=MAX_CAPTION_BYTES, missing="no caption"))
        raise BadRecord("no caption", "no .txt or .json of the same name and no row of a metadata file")

    def _walk(self) -> tuple[list[str], list[str], list[str]]:
        """Relative paths of the images, of those that are not read, and of the metadata files."""
        images, unread, metadata = [], [], []
        for parent, folders, names in os.walk(self._folder, onerror=self._cannot_list):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = os.path.relpath(parent, self._folder)
            for name in sorted(name for name in names if not name.startswith(".")):
                path = name if inside == os.curdir else os.path.join(inside, name)
                stem, suffix = os.path.splitext(path)
                suffix = suffix[1:].lower()
                if name in METADATA:
                    metadata.append(path)
                elif suffix in SUFFIXES:
                    images.append(path)
                elif suffix in UNREAD_SUFFIXES:
                    unread.append(path)
                elif suffix in self._beside and self._beside[suffix].setdefault(stem, path) != path:
                    self._faults.append(Dropped(path, "duplicate key", f"{self._beside[suffix][stem]} is used"))
        return images, unread, sorted(metadata)

    def _cannot_list(self, error: OSError) -> None:
        path = os.path.relpath(error.filename, self._folder)
        self._faults.append(Dropped(path, "unreadable file", f"the folder cannot be listed: {error.strerror}"))

    def _take_rows(self, metadata: list[str], images: set[str]) -> None:
        given: dict[str, list[tuple[str, ...] | Dropped]] = {}
        for path in metadata:
            nameless: list[Dropped] = []
            rows = 0
            for line, row in _rows(os.path.join(self._folder, path)):
                rows += 1
                key = f"{path}:{line}"
                if isinstance(row, BadRecord):
                    self._faults.append(Dropped(key, row.reason, row.detail))
                elif not isinstance(name := row.get("file_name"), str) or not name:
                    nameless.append(Dropped(key, "no image", f"no file_name in a row of {list(row)!r:.80}"))
                else:
                    texts = given.setdefault(self._place(path, name, images), [])
                    try:
                        if None in row:  # where `csv` puts the fields beyond the header's
                            raise BadRecord("bad csv", f"more fields than the header has, from {row[None][0]!r} on")
                        if path.endswith(".csv") and (taken := self._taken_in(path, row, images)):
                            raise BadRecord("bad csv", f"a quote that is not closed takes in the row of {taken}")
                        texts.append(captions.from_fields(row))
                    except BadRecord as bad:
                        texts.append(Dropped(key, bad.reason, bad.detail))
            if nameless and len(nameless) == rows:
                raise UserError(
                    f"expected a file_name in the rows of {os.path.join(self._folder, path)}, got none in all {rows} "
                    f"({nameless[0].detail}): name the column file_name"
                )
            self._faults += nameless
        for image, texts in given.items():
            faults = [text for text in texts if isinstance(text, Dropped)]
            good = tuple(caption for text in texts if not isinstance(text, Dropped) for caption in text)
            self._rows[image] = good or faults.pop(0)
            if self._captions_required:  # a blank row among others is as a blank line of a .txt
                self._faults += [fault for fault in faults if fault.reason != "empty caption"]

    def _taken_in(self, metadata: str, row: dict, images: set[str]) -> str | None:
        """The first image whose own row stands inside a field of this one."""
        lines = (line for field in row.values() for line in field.split("\n")[1:])
        places = (self._place(metadata, line.partition(",")[0], images) for line in lines)
        return next((place for place in places if place in images), None)

    def _place(self, metadata: str, name: str, images: set[str]) -> str:
        """The path of the image that a row of a metadata file names, relative to the folder."""
        parent = os.path.dirname(metadata)
        if name.startswith(os.path.join(os.path.abspath(self._folder), parent, "")):
            name = os.path.relpath(name, os.path.join(os.path.abspath(self._folder), parent))
        path = os.path.normpath(os.path.join(parent, name))
        return path if path in images else os.path.normpath(os.path.join(parent, name.replace("\\", "/")))


def read_image(folder: str, path: str) -> bytes:
    """The bytes of the image `path`, relative to `folder`.

    Raises:
      BadRecord: 'outside the folder', 'unsupported image', 'no image', 'zero bytes', 'too many bytes' or 'unreadable
        file'.
    """
    if os.path.isabs(path) or ".." in pathlib.PurePath(path).parts:
        raise BadRecord("outside the folder", f"expected a path inside the folder, got {path}")
    suffix = os.path.splitext(path)[1][1:].lower()
    if suffix in UNREAD_SUFFIXES and os.path.isfile(os.path.join(folder, path)):
        raise BadRecord("unsupported image", f"{suffix} files are not read: convert it to JPEG or PNG")
    data = _read(folder, path, limit=MAX_IMAGE_BYTES, missing="no image")
    if not data:
        raise BadRecord("zero bytes")
    return data


def _read(folder: str, path: str, *, limit: int, missing: str) -> bytes:
    """The content of a regular file. missing: the reason if there is none; a pipe would block forever."""
    try:
        status = os.stat(os.path.join(folder, path))
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord(missing, f"{path} is not a regular file")
        if status.st_size > limit:
            raise BadRecord("too many bytes", f"{status.st_size}, the limit is {limit}")
        with open(os.path.join(folder, path), "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise BadRecord(missing, f"{path} does not exist") from None
    except OSError as error:
        raise BadRecord("unreadable file", str(error)) from None


def _rows(path: str) -> Iterator[tuple[int, dict | BadRecord]]:
    """The rows of a metadata file with their line numbers.

    Raises:
      UserError: the file cannot be read, or is a .csv of another encoding than UTF-8.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block forever
            raise OSError("no regular file")
        if path.endswith(".csv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file, restval="")
                for row in table:
                    yield table.line_num, row
            return
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"expected a readable {path}, got {error}: mend or remove it") from error


def _parse(line: bytes) -> dict | BadRecord:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        return BadRecord("bad json", f"{type(error).__name__}: {error}")
    return row if isinstance(row, dict) else BadRecord("bad json", f"expected an object, got {type(row).__name__}")
