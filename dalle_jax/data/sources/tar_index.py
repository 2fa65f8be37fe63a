"""The index of tar shards: where the image and the caption of each slot lie, 14 bytes a slot, mapped into memory.

A sample is a run of adjacent members with one key, the member's path up to the first dot of its last part. A key that
comes back later is a fault, so no caption is ever joined to the image of another sample. A sample with several images
has a slot for each that has a caption of its own, or else one for the first; the other images have slots too, which are
dropped. A slot is a `ROW`; its sizes are in blocks, as the headers that are read with the data say the bytes.

The cache folder holds one table for each TABLE shards, and one list of all shards with their sizes, times and numbers
of slots. A start reads that list alone; a table is mapped when a slot of it is asked for, once for all processes of a
machine. Their names are hashes of the shards' paths and of what the numbers mean.
"""

import array
import bz2
import functools
import gzip
import hashlib
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, BinaryIO

import numpy as np

from dalle_jax.data.decode import SUFFIXES, UNREAD_SUFFIXES
from dalle_jax.data.record import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, BadRecord
from dalle_jax.data.share import WHOLE, Share
from dalle_jax.data.sources import cache
from dalle_jax.data.sources.tar_members import BLOCK, CHUNK, Member, members
from dalle_jax.errors import UserError, say

VERSION = 4  # raise it when `scan` reads the same file differently, so that cached indexes are rebuilt
TABLE = 512  # shards
CHECKED = 100  # a source of no more shards is compared with their sizes and times at every start
OPEN_TABLES = 256  # per process and source
MAX_SHARD = BLOCK << 32  # bytes that the number of a block can reach
MAX_UNPACKED = 64 << 30  # bytes of an unpacked shard

# start: block of the first header of the member that names the slot; of damage, its block. image: from its low bits, 20
# for the blocks of the image, 4 for the header blocks before it (0 for damage), 8 for a code: TEXT, JSON, a fault of
# the caption or one of the whole slot. caption, text: block and number of blocks of the caption's data.
ROW = np.dtype([("start", "<u4"), ("image", "<u4"), ("caption", "<u4"), ("text", "<u2")])
FACTS = 16  # numbers of 16 bits in the facts of a shard

TEXT, JSON = range(2)
FAULTS = (
    *("no caption", "no image", "extra image", "unsupported image", "zero bytes", "too many bytes", "link", "sparse"),
    *("duplicate key", "members apart", "truncated tar", "bad tar header", "not a tar file", "empty shard"),
    *("unreadable file", "decompression bomb"),
)
_CAPTION = {reason: 2 + number for number, reason in enumerate(FAULTS)}  # codes
_SLOT = {reason: 128 + number for number, reason in enumerate(FAULTS)}
_FAULT = dict.fromkeys((TEXT, JSON), ("", False))
_FAULT |= {code: (reason, False) for reason, code in _CAPTION.items()}
_FAULT |= {code: (reason, True) for reason, code in _SLOT.items()}
_OTHER_HALF = {  # of a sample that lacks something
    _CAPTION["no caption"]: _SLOT["no image"],
    _SLOT["members apart"]: _SLOT["no image"],
    _SLOT["no image"]: _CAPTION["no caption"],
}
_TEXTS = (b"txt", b"json")  # by their code
_READ, _IMAGES = ({s.encode() for s in suffixes} for suffixes in (SUFFIXES, SUFFIXES | UNREAD_SUFFIXES))
_OPENERS: dict[bytes, Callable[[str], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

Words = tuple[int, int, int, int]
Scan = Callable[[list[str]], Iterable[tuple[np.ndarray, np.ndarray]]]
Keep = Callable[[str, np.ndarray], np.ndarray]


class Index:
    """The slots of these shards, in order; made at the first use, and where a checked shard has changed.

    facts: int64 [shards, 4], each one's size in bytes and time in ns (-1 where it could not be read), number of slots,
      and 1 if it is compressed.

    Raises:
      UserError: a shard is not there, or has changed so that a table no longer fits the list.
    """

    def __init__(self, paths: list[str]):
        self._paths = paths
        self._table = functools.lru_cache(OPEN_TABLES)(self._open_table)  # those used last
        self._unkept: dict[str, np.ndarray] = {}  # tables that the cache could not take
        facts = cache.array(_name("shards", paths), np.int64)
        if facts is not None:
            facts = np.array(facts).reshape(-1, 4)  # not mapped: small, and made anew when a shard changes
        if facts is None or (len(paths) <= CHECKED and not np.array_equal(facts[:, :2], [_status(p) for p in paths])):
            facts = np.array(self._build())
        self.facts = facts
        self._ends = np.cumsum(facts[:, 2])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def find(self, row: int) -> tuple[int, Words]:
        """The number of the shard that holds a slot, and the fields of its `ROW`."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        first = shard - shard % TABLE
        return shard, self._table(first)[row - (int(self._ends[first - 1]) if first else 0)].tolist()

    def _build(self) -> np.ndarray:
        if len(self._paths) > TABLE:
            say(f"dalle-jax: indexing {len(self._paths)} tar shards; `dalle-jax index` does it with all processors")
        with futures.ThreadPoolExecutor(8) as pool:  # mostly waiting for the disk
            try:
                facts = build(self._paths, scan_all=functools.partial(pool.map, scan), keep=self._keep)
            finally:
                pool.shutdown(cancel_futures=True)
        assert facts is not None  # of the whole
        return facts

    def _keep(self, name: str, built: np.ndarray) -> np.ndarray:
        try:
            return cache.stored(name, built)
        except UserError:  # slower the next time, not wrong
            return self._unkept.setdefault(name, built)

    def _open_table(self, first: int) -> np.ndarray:
        paths = self._paths[first : first + TABLE]
        table = self._unkept.get(_name("slots", paths), cache.array(_name("slots", paths), np.uint16))
        if table is None:  # the cache was deleted
            table = _made(paths, scan_all=lambda todo: map(scan, todo), keep=self._keep)
        rows = np.asarray(table)[FACTS * len(paths) :].view(ROW)
        if len(rows) != self.facts[first : first + TABLE, 2].sum():
            raise UserError(
                f"expected {paths[0]} and the shards after it as they were indexed, but some have changed since: start "
                "again, and first give `dalle-jax index SOURCE` for a source of many shards"
            )
        return rows


def build(
    paths: list[str],
    *,
    scan_all: Scan,
    share: Share = WHOLE,
    keep: Keep = cache.stored,
    done: Callable[[np.ndarray], object] = lambda facts: None,
) -> np.ndarray | None:
    """Make the tables of this share that are not there or out of date, and the list once all tables are there.

    scan_all: `scan` of each path in order, by whatever threads or processes. keep: stores an array under a name. done:
    called with the facts of the shards of each table of the share.

    Returns: the list, see `Index`; None while tables of other shares are missing.
    """
    parts = [paths[first : first + TABLE] for first in range(0, len(paths), TABLE)]
    facts: dict[int, np.ndarray] = {}
    for number in range(len(parts))[share.slice]:
        facts[number] = _facts(_made(parts[number], scan_all=scan_all, keep=keep), len(parts[number]))
        done(facts[number])
    for number, part in enumerate(parts):
        if number not in facts:
            if (table := cache.array(_name("slots", part), np.uint16)) is None:
                return None
            facts[number] = _facts(table, len(part))
    return keep(_name("shards", paths), np.concatenate([facts[number] for number in range(len(parts))]))


def _made(paths: list[str], *, scan_all: Scan, keep: Keep) -> np.ndarray:
    """The table of these shards, uint16: the facts of each in FACTS numbers, then the slots."""
    known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    old = cache.array(_name("slots", paths), np.uint16)
    if old is not None:
        facts = _facts(old, len(paths))
        slots = np.split(old[FACTS * len(paths) :].view(ROW), np.cumsum(facts[:-1, 2]))
        found = zip(paths, zip(facts, slots, strict=True), strict=True)
        known = {path: shard for path, shard in found if tuple(shard[0][:2].tolist()) == _status(path)}
        if len(known) == len(paths):
            return old
    todo = [path for path in paths if path not in known]
    known.update(zip(todo, scan_all(todo), strict=True))
    parts = [known[path][part].view(np.uint16) for part in (0, 1) for path in paths]
    return keep(_name("slots", paths), np.concatenate(parts))


def _facts(table: np.ndarray, shards: int) -> np.ndarray:
    return np.array(table[: FACTS * shards]).view(np.int64).reshape(shards, 4)


def _name(kind: str, paths: list[str]) -> str:
    meaning = repr((VERSION, FAULTS, sorted(SUFFIXES), sorted(UNREAD_SUFFIXES)))
    content = "\0".join([meaning, *paths]).encode("utf-8", "surrogateescape")
    return f"{kind}-{hashlib.sha256(content).hexdigest()[:40]}"


def _status(path: str) -> tuple[int, int]:
    """Size and time of a shard.

    Raises:
      UserError: it is not there.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"expected tar shards at {path}, but no file matches: check the pattern") from None
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def scan(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The facts, int64 [4], and the slots, `ROW` [slots], of one shard in any state.

    Raises:
      UserError: it is not there, or is compressed and the cache folder cannot be written.
    """
    size, time = _status(path)
    place = path
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block forever
            raise OSError
        place = unpacked(path, size, time)
        with open(place, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            if end > MAX_SHARD:
                raise BadRecord("too many bytes")
            words = _slots(members(functools.partial(os.pread, file.fileno()), 0, end)) or _of_shard("empty shard")
    except OSError:
        size, time, words = -1, -1, _of_shard("unreadable file")
    except BadRecord as bad:
        size, time, words = -1, -1, _of_shard(bad.reason)
    rows = np.empty(len(words) // 4, ROW)
    for field, column in zip(ROW.fields or (), np.frombuffer(words, np.uint32).reshape(-1, 4).T, strict=True):
        rows[field] = column
    return np.array([size, time, len(rows), place != path], np.int64), rows


def unpacked(path: str, size: int, time: int) -> str:
    """A shard of this size and time itself, or its unpacked copy in the cache, which is made if it is not there.

    A compressed file has no random access. A stream that ends early gives what came before its end.

    Raises:
      BadRecord: 'decompression bomb', for more than MAX_UNPACKED bytes or half of what the cache folder has free.
      OSError: the file cannot be read.
      UserError: the cache folder cannot be written.
    """
    with open(path, "rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
    if opener is None:
        return path

    def write(out: BinaryIO) -> None:
        place = os.fstatvfs(out.fileno())
        limit = min(MAX_UNPACKED, place.f_bavail * place.f_frsize // 2)
        with opener(path) as stream:
            while True:
                try:
                    chunk = stream.read1(CHUNK)  # `read` loses what it has when it fails
                except (EOFError, OSError, zlib.error, lzma.LZMAError):
                    return
                if not chunk:
                    return
                if out.tell() + len(chunk) > limit:
                    raise BadRecord("decompression bomb", f"{path} unpacks to more than {limit} bytes")
                out.write(chunk)

    return cache.file(_name(f"unpacked-{size}-{time}", [path]) + ".tar", write)


def fault(code: int) -> tuple[str, bool]:
    """The fault of a code, '' for TEXT and JSON, and whether it is one of the whole slot, image and all."""
    return _FAULT.get(code, ("changed shard", True))  # unknown in a table that was damaged


def _of_shard(reason: str) -> array.array:
    return array.array("I", _damage(0, reason))


def _damage(offset: int, reason: str) -> Words:
    return offset // BLOCK, _SLOT[reason] << 24, 0, 0


def _slots(found: Iterable[Member]) -> array.array:
    """The words of the slots of these members, one slot for each image and each damaged place, in file order."""
    words = array.array("I")
    first: dict[bytes, tuple[int, tuple[bytes, ...]]] = {}  # key -> its first slot and the extensions seen since
    for key, run in _runs(found):
        if isinstance(run, Member):
            words.extend(_damage(run.start, run.fault))
            continue
        slots = _sample(run)
        if key not in first:
            first[key] = len(words) if slots else -1, tuple(run)
            for slot in slots:
                words.extend(slot)
            continue
        earlier, seen = first[key]
        fresh = run.keys().isdisjoint(seen)
        wanted = _OTHER_HALF.get(words[earlier + 1] >> 24) if fresh and earlier >= 0 else None
        for start, image, *caption in slots:
            if image >> 24 == wanted:
                words[earlier + 1] = _instead(words[earlier + 1], "members apart")
                wanted = None
            elif fresh and all(map(_stem, run)):  # numbered: samples of their own
                words.extend((start, image, *caption))
            else:
                words.extend((start, _instead(image, "duplicate key"), 0, 0))
        first[key] = earlier, (*seen, *run)
    return words


def _instead(image: int, reason: str) -> int:
    """The field `image` of a slot that is dropped for this reason: no image, the same header."""
    return _SLOT[reason] << 24 | image & 15 << 20


def _runs(found: Iterable[Member]) -> Iterator[tuple[bytes, dict[bytes, Member] | Member]]:
    """Runs of adjacent members with one key, by extension; a second one of the same extension starts a new run.

    Damage is a run of its own; a sample may continue after it.
    """
    key: bytes = b""
    run: dict[bytes, Member] = {}
    for member in found:
        path = member.path
        if path is None:
            yield b"", member
            continue
        name = path.rfind(b"/") + 1
        dot = path.find(b".", name)
        if dot <= name or dot == len(path) - 1:
            continue  # no extension, or a hidden file: not in a sample, as in webdataset
        extension = path[dot + 1 :].lower()
        if path[:dot] != key or extension in run:
            if run:
                yield key, run
            key, run = path[:dot], {}
        run[extension] = member
    if run:
        yield key, run


def _sample(run: dict[bytes, Member]) -> list[Words]:
    """The slots of one run, none if it holds neither an image nor a caption."""
    last = next(reversed(run.values()))
    if last.fault == "truncated tar":
        return [_slot(last, _SLOT[last.fault])]
    images = [name for name in run if _suffix(name) in _IMAGES]
    if len(images) == 1 and _suffix(images[0]) in _READ:
        return [_good(run, images[0])]
    texts = [name for name in run if _suffix(name) == b"txt" and not any(_stem(name) == _stem(i) for i in images)]
    if not images:
        texts = texts or [name for name in run if name == b"json"]
        return [_slot(run[name], _SLOT["no image"]) for name in texts]
    readable = sorted((name for name in images if _suffix(name) in _READ), key=lambda name: name.count(b"."))
    first = {_stem(name): name for name in reversed(readable)}  # of those beside one caption
    own = [name for stem, name in first.items() if any(stem + text in run for text in _TEXTS)]
    good = own or readable[:1]
    rest = _SLOT["extra image" if good else "unsupported image"]
    slots = {name: _good(run, name) if name in good else _slot(run[name], rest) for name in images}
    if any(_stem(name) for name in own):
        slots |= {name: _slot(run[name], _SLOT["no image"]) for name in texts if _stem(name)}
    return list(slots.values())


def _good(run: dict[bytes, Member], name: bytes) -> Words:
    """The slot of the image of this name."""
    image, stem = run[name], _stem(name)
    if image.fault or not 0 < image.size <= MAX_IMAGE_BYTES:
        return _slot(image, _SLOT[image.fault or ("too many bytes" if image.size else "zero bytes")])
    found = [(kind, run[text]) for kind, text in enumerate(_TEXTS) if text in run]
    if stem:
        found = [(kind, run[stem + text]) for kind, text in enumerate(_TEXTS) if stem + text in run] + found
    if not found:
        return _slot(image, _CAPTION["no caption"], image.size)
    kind, caption = next((each for each in found if not each[1].fault), found[0])
    if caption.fault or caption.size > MAX_CAPTION_BYTES:
        return _slot(image, _CAPTION[caption.fault or "too many bytes"], image.size)
    return _slot(image, kind, image.size, caption.data, caption.size)


def _slot(named: Member, code: int, size: int = 0, caption: int = 0, caption_size: int = 0) -> Words:
    start, blocks = named.start, (named.data - named.start) // BLOCK
    if blocks > 15:  # a name of thousands of bytes: the short form in the last header is taken
        start, blocks = named.data - BLOCK, 1
    image = code << 24 | blocks << 20 | -(-size // BLOCK)
    return start // BLOCK, image, caption // BLOCK, -(-caption_size // BLOCK)


def _stem(extension: bytes) -> bytes:
    """'c.jpg' -> 'c.', 'jpg' -> ''."""
    return extension[: extension.rfind(b".") + 1]


def _suffix(extension: bytes) -> bytes:
    return extension[extension.rfind(b".") + 1 :]
