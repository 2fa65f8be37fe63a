"""Tar shards (webdataset, img2dataset): random access through an index of offsets that is built once.

A shard is not unpacked: one pass over its headers notes where the image and the caption of each sample are, and
`os.pread` reads them. A sample is a run of adjacent members with one key, the member's path up to the first dot of its
last part. A key that comes back later is a fault, so no caption is ever joined to the image of another sample.
"""

import bz2
import dataclasses
import functools
import glob
import gzip
import hashlib
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, BinaryIO

import numpy as np

from dalle_jax.data.decode import SUFFIXES
from dalle_jax.data.record import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, REASONS, BadRecord, Dropped, Record
from dalle_jax.data.sources import cache, captions
from dalle_jax.data.sources.tar_members import CHUNK, Member, members
from dalle_jax.errors import UserError

INDEX_VERSION = 1  # raise it when `scan` reads the same file differently, so that cached indexes are rebuilt
MAX_EXPANSION = 100  # of a compressed shard; images hardly compress
OPEN_FILES = 64  # per process and source

_FAULTS = ("", *REASONS)  # index 0: no fault
_NO_CAPTION, _TEXT, _JSON = range(3)  # the kind of a sample's caption
_OPENERS: dict[bytes, Callable[[str], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


@dataclasses.dataclass(frozen=True)
class Index:
    """The places of a shard's samples, one row per slot, as arrays only: a million rows load in a blink."""

    fault: np.ndarray  # uint8 [rows], index into _FAULTS
    caption_kind: np.ndarray  # uint8 [rows]
    image: np.ndarray  # int64 [rows, 2], offset and size in bytes
    caption: np.ndarray  # int64 [rows, 2], the same
    keys: np.ndarray  # uint8, all keys in UTF-8, one after the other
    key_ends: np.ndarray  # int64 [rows], where each ends

    def __len__(self) -> int:
        return len(self.fault)

    def key(self, row: int) -> str:
        start = self.key_ends[row - 1] if row else 0
        return self.keys[start : self.key_ends[row]].tobytes().decode("utf-8", "replace")


def shard_paths(pattern: str) -> list[str]:
    """The files of a shard pattern, sorted: braces as in a shell, then globs; a folder stands for its *.tar files.

    Raises:
      UserError: no file matches, or one without wildcards does not exist.
    """
    paths: list[str] = []
    for part in expand_braces(os.path.expanduser(pattern)):
        if os.path.isdir(part):
            found, problem = glob.glob(os.path.join(part, "*.tar")), "it is a folder without .tar files"
        else:
            found, problem = [part] if os.path.isfile(part) else glob.glob(part), "no file matches"
        if not found:
            raise UserError(f"expected tar shards at {part}, but {problem}: check the pattern")
        paths += found
    return sorted(path for path in set(paths) if os.path.isfile(path))


def expand_braces(pattern: str) -> list[str]:
    """'{00..02}.tar' -> '00.tar', '01.tar', '02.tar'; '{a,b}' -> 'a', 'b'; zero padding as in the first number.

    Raises:
      UserError: a range that runs backwards.
    """
    match = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    body = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", body):
        first, last = numbers[1], numbers[2]
        if int(last) < int(first):
            raise UserError(f"expected a range from low to high, got {{{body}}} in {pattern}: swap the numbers")
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    return [
        expanded
        for choice in choices
        for expanded in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


class ShardSource:
    """Records of tar shards in file order. See `record.Source`; opened by `sources.open_source('wds:...')`."""

    def __init__(self, name: str, paths: list[str], *, captions_required: bool = True):
        self.name, self._given, self._captions_required = name, paths, captions_required
        self._labels = [pathlib.Path(path).name for path in paths]
        with futures.ThreadPoolExecutor(8) as pool:  # mostly waiting for the disk
            self._paths = list(pool.map(plain_tar, paths))
            self._indexes = list(pool.map(load_index, self._paths))
        self._ends = np.cumsum([len(index) for index in self._indexes])  # of the shards' rows
        self._file = functools.lru_cache(OPEN_FILES)(functools.partial(open, mode="rb", buffering=0))  # the last ones

    def __reduce__(self):
        return functools.partial(ShardSource, captions_required=self._captions_required), (self.name, self._given)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Record | Dropped:
        shard, row = self._place(row)
        index = self._indexes[shard]
        key = f"{self._labels[shard]}/{index.key(row)}".rstrip("/")
        try:
            if fault := _FAULTS[index.fault[row]]:
                raise BadRecord(fault, REASONS[fault])
            texts = self._captions(shard, row)
            return Record(key, self._bytes(shard, *index.image[row].tolist(), limit=MAX_IMAGE_BYTES), texts)
        except BadRecord as bad:
            return Dropped(key, bad.reason, bad.detail)

    def captions_of(self, row: int) -> tuple[str, ...]:
        shard, row = self._place(row)
        try:
            return () if self._indexes[shard].fault[row] else self._captions(shard, row)
        except BadRecord:
            return ()

    def _place(self, row: int) -> tuple[int, int]:
        """The shard of a slot, and the row in it."""
        row = range(len(self))[row]  # IndexError and negative rows as in a list
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - int(self._ends[shard]) + len(self._indexes[shard])

    def _captions(self, shard: int, row: int) -> tuple[str, ...]:
        index = self._indexes[shard]
        kind = index.caption_kind[row]
        try:
            if kind == _NO_CAPTION:
                raise BadRecord("no caption", "the sample has neither a .txt nor a .json")
            data = self._bytes(shard, *index.caption[row].tolist(), limit=MAX_CAPTION_BYTES)
            return captions.from_text(data) if kind == _TEXT else captions.from_json(data)
        except BadRecord:
            if self._captions_required:
                raise
            return ()

    def _bytes(self, shard: int, offset: int, size: int, *, limit: int) -> bytes:
        """Reads `size` bytes of file number `shard`.

        Raises:
          BadRecord: 'too many bytes', 'unreadable file' or 'truncated tar'.
        """
        if size > limit:
            raise BadRecord("too many bytes", f"{size}, the limit is {limit}")
        try:
            file = self._file(self._paths[shard])
            data = os.pread(file.fileno(), size, offset)  # needs no seek and so no lock
            while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
                data += more  # one read stops at about 2 GiB or at a signal
        except OSError as error:
            raise BadRecord("unreadable file", str(error)) from None
        if len(data) < size:
            raise BadRecord("truncated tar", f"{self._paths[shard]} has shrunk since it was indexed")
        return data


def load_index(path: str) -> Index:
    """The index of a shard, from the cache if the file has not changed."""
    names = tuple(field.name for field in dataclasses.fields(Index))
    return Index(**cache.arrays(_fingerprint("shard", path), lambda: dataclasses.asdict(scan(path)), names=names))


def _fingerprint(kind: str, path: str) -> str:
    """A name that changes with the file's path, size or time, and with the meaning of what is stored."""
    try:
        stat = os.stat(path)
        of_file: tuple[object, ...] = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns)
    except OSError:
        of_file = (path, "missing")
    meaning = (kind, INDEX_VERSION, _FAULTS, sorted(SUFFIXES), MAX_EXPANSION)
    return f"{kind}-{hashlib.sha256(repr((meaning, of_file)).encode()).hexdigest()[:40]}"


def plain_tar(path: str) -> str:
    """`path`, or the unpacked copy in the cache of a compressed file, which has no random access.

    A stream that ends early gives what came before its end; one that grows more than MAX_EXPANSION-fold is cut there.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(6)
        opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
        limit = MAX_EXPANSION * os.path.getsize(path)
    except OSError:
        return path  # reported as 'unreadable file' when it is indexed
    if opener is None:
        return path

    def write(out: BinaryIO) -> None:
        with opener(path) as packed:
            while limit > out.tell():
                try:
                    chunk = packed.read1(CHUNK)  # `read` loses what it has when it fails
                except (EOFError, OSError, zlib.error, lzma.LZMAError):
                    return
                if not chunk:
                    return
                out.write(chunk)

    return cache.file(_fingerprint("unpacked", path) + ".tar", write)


def scan(path: str) -> Index:
    """The index of one tar file in any state."""
    try:
        with open(path, "rb", buffering=0) as file:
            slots = _slots(members(file.fileno()))
    except OSError:
        slots = [_Slot("", fault="unreadable file")]
    slots = slots or [_Slot("", fault="empty shard")]
    keys = [slot.key.encode("utf-8", "surrogateescape") for slot in slots]
    return Index(
        fault=np.array([_FAULTS.index(slot.fault) for slot in slots], np.uint8),
        caption_kind=np.array([slot.caption_kind for slot in slots], np.uint8),
        image=np.array([slot.image for slot in slots], np.int64).reshape(-1, 2),
        caption=np.array([slot.caption for slot in slots], np.int64).reshape(-1, 2),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
    )


@dataclasses.dataclass
class _Slot:
    key: str
    fault: str = ""
    caption_kind: int = _NO_CAPTION
    image: tuple[int, int] = (0, 0)  # offset and size in bytes
    caption: tuple[int, int] = (0, 0)

    @property
    def whole(self) -> bool:
        return not self.fault and self.caption_kind != _NO_CAPTION


def _slots(found: Iterable[Member]) -> list[_Slot]:
    """The slots of these members, one per sample and one per damaged place, in file order."""
    slots: list[_Slot] = []
    first: dict[str, tuple[_Slot | None, set[str]]] = {}  # key -> its first slot and the extensions seen since
    for key, run in _runs(found):
        if not key:
            slots.append(_Slot(run[0].path, fault=run[0].fault))
            continue
        slot, extensions = _sample(key, run), {_split(member.path)[1] for member in run}
        earlier, seen = first.setdefault(key, (slot, set()))
        if not seen:
            slots += [slot] if slot else []
        elif earlier and earlier.fault in ("no image", "") and not earlier.whole and not seen & extensions:
            earlier.fault = "members apart"
        elif slot and not (earlier and earlier.fault == "members apart" and not seen & extensions):
            slots.append(dataclasses.replace(slot, fault="duplicate key"))
        seen |= extensions
    return slots


def _runs(found: Iterable[Member]) -> Iterable[tuple[str, list[Member]]]:
    """Runs of adjacent members with one key; a second member of the same name starts a new run.

    Damage is a run of its own without a key; a sample may continue after it.
    """
    key, run = "", []
    for member in found:
        if member.path.startswith("@") or not member.path:
            yield "", [member]
            continue
        member_key, extension = _split(member.path)
        if not extension or member_key.endswith("/") or not member_key:
            continue  # no extension, or a hidden file: not in a sample, as in webdataset
        if run and (member_key != key or any(extension == _split(other.path)[1] for other in run)):
            yield key, run
            run = []
        key = member_key
        run.append(member)
    yield from [(key, run)] if run else []


def _sample(key: str, run: list[Member]) -> _Slot | None:
    """The slot of one run; None if it holds neither an image nor a caption."""
    parts = {_split(member.path)[1].lower(): member for member in run}
    images = sorted((name for name in parts if name.rpartition(".")[2] in SUFFIXES), key=lambda name: "." in name)
    if any(member.fault == "truncated tar" for member in run):
        return _Slot(key, fault="truncated tar")
    if not images:
        return _Slot(key, fault="no image") if parts.keys() & {"txt", "json"} else None
    image, prefix = parts[images[0]], images[0].rpartition(".")[0]
    if image.fault:
        return _Slot(key, fault=image.fault)
    slot = _Slot(key, fault="" if image.size else "zero bytes", image=(image.offset, image.size))
    for kind, suffix in ((_TEXT, "txt"), (_JSON, "json")):
        caption = parts.get(f"{prefix}.{suffix}") or parts.get(suffix)
        if caption and not caption.fault:
            slot.caption_kind, slot.caption = kind, (caption.offset, caption.size)
            break
    return slot


def _split(path: str) -> tuple[str, str]:
    """'a/b.c.jpg' -> ('a/b', 'c.jpg')."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension
