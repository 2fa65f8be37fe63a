"""The members of a tar file in any state: where the data of each is, and where the file is damaged.

The standard library parses every header that is not a plain file's. The walk from header to header is done here,
because it has to be fast, and to continue where `tarfile` stops: after a damaged header at the next valid one, and
after an end mark if another archive follows. Reads headers only.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512  # bytes; the unit of the tar format
CHUNK = 1 << 20
AHEAD = 8192  # bytes of a read
MAX_NAME_BYTES = 1 << 20  # of an extended header
MAGIC_OFFSET = 257  # of b"ustar" in a header
ADLER = 65521  # the modulus of Adler-32, whose lower half is 1 + the sum of all bytes
NAMING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE)
EMPTY = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip

Read = Callable[[int, int], bytes]  # size, offset -> bytes, fewer at the end of the file


class Member(NamedTuple):
    """A file in a tar, or a damaged place. start, data: offsets of its first header and of its data, in bytes.

    path: as the archive has it; None for damage that belongs to no known member. size: of its data, in bytes.
    fault: '' or a name of `record.REASONS`: 'link', 'sparse', 'truncated tar', 'bad tar header', 'not a tar file'.
    """

    path: bytes | None
    start: int
    data: int = 0
    size: int = 0
    fault: str = ""


def members(read: Read, start: int, end: int) -> Iterator[Member]:
    """Every regular file, link and damaged place between two offsets of a file, in its order.

    Raises:
      OSError: the file cannot be read.
    """
    offset, known = start, False
    begin: int | None = None  # of the extended headers before a member, with what they say of it
    extended: dict[bytes, bytes] = {}
    window, base = b"", start  # the last AHEAD bytes that were read, because headers often follow each other closely
    while offset < end:
        if offset + BLOCK > base + len(window):
            window, base = read(AHEAD, offset), offset
        block = window[offset - base : offset - base + BLOCK]
        header = _plain_header(block) or _any_header(block)
        if header is None and len(block) < BLOCK:
            if any(block):
                yield Member(None, offset, fault="truncated tar" if known else "not a tar file")
            return
        if header is None:
            blank = not any(block)
            following, only_zeros = _next_header(read, offset + BLOCK, end)
            if not blank and not known and following is None:
                yield Member(None, offset, fault="not a tar file")
            elif not blank or (following is not None and not only_zeros):
                yield Member(None, offset, fault="bad tar header")
            if following is None:
                return
            offset, begin, extended, known = following, None, {}, True
            continue

        kind, path, size = header
        start, known, data = offset if begin is None else begin, True, offset + BLOCK
        if extended:
            path, size = extended.get(b"path", path), int(extended.get(b"size", size))
        if kind == tarfile.GNUTYPE_SPARSE and block[482]:
            data += BLOCK * _map_blocks(read, data)
        offset = data if kind in EMPTY else data + (size + BLOCK - 1) // BLOCK * BLOCK
        if offset > data and data + size > end:
            yield Member(path, start, data, fault="truncated tar")
            return
        if kind in NAMING:
            near = data - base + size <= len(window)
            text = window[data - base : data - base + size] if near else read(min(size, MAX_NAME_BYTES), data)
            begin, extended = start, extended | _extended(kind, text)
            continue
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            yield Member(path, start, data, fault="link")
        elif kind == tarfile.GNUTYPE_SPARSE or b"GNU.sparse" in extended:
            yield Member(path, start, data, fault="sparse")
        elif kind in tarfile.REGULAR_TYPES:
            yield Member(path, start, data, size)
        begin, extended = None, {}


def _plain_header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Type, name and size in a sound header of a file or of a pax record; None where `tarfile` has to look."""
    try:
        kind = block[156:157]
        whole = len(block) == BLOCK and block[135] in b"\0 "  # the end of the size
        if kind not in b"0x" or block[345] or not whole:  # 345: the prefix of a long name
            return None
        field = block[148:156]
        if (int(field.strip(b" \0"), 8) - 256 + sum(field) - (zlib.adler32(block) & 0xFFFF) + 1) % ADLER:
            return None
        return kind, block[:100].partition(b"\0")[0], int(block[124:135], 8)
    except (IndexError, ValueError):
        return None


def _any_header(block: bytes) -> tuple[bytes, bytes, int] | None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return (info.type, info.name.encode("utf-8", "surrogateescape"), info.size) if info.size >= 0 else None


def _map_blocks(read: Read, offset: int) -> int:
    """The number of blocks that go on with the map of a file in GNU's old sparse format."""
    count = 1
    while read(BLOCK, offset + BLOCK * (count - 1))[504:505] > b"\0":
        count += 1
    return count


def _next_header(read: Read, start: int, end: int) -> tuple[int | None, bool]:
    """Offset of the first valid header at or after `start`, None without one, and whether only zeros precede it."""
    only_zeros = True
    for offset in range(start, end, CHUNK):
        chunk = read(CHUNK, offset)
        place = chunk.find(b"ustar")
        while place >= 0:
            header = place - MAGIC_OFFSET
            if header >= 0 and header % BLOCK == 0 and _any_header(chunk[header : header + BLOCK]):
                return offset + header, only_zeros and not chunk[:header].strip(b"\0")
            place = chunk.find(b"ustar", place + 1)
        only_zeros = only_zeros and not chunk.strip(b"\0")
    return None, only_zeros


def _extended(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """The b'path' and b'size' in a long-name record (GNU) or an extended header (pax), and b'GNU.sparse' if it is."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": data.partition(b"\0")[0]}
    if b"path=" not in data and b"size=" not in data and b"GNU.sparse." not in data:  # nearly always: it is the time
        return {}
    fields: dict[bytes, bytes] = {}
    while kind != tarfile.GNUTYPE_LONGLINK and data[:1].isdigit():  # records are 'LENGTH KEY=VALUE\n', LENGTH in bytes
        length, _, record = data.partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            break
        key, _, value = record[: int(length) - len(length) - 2].partition(b"=")
        fields |= {b"GNU.sparse": b""} if key.startswith(b"GNU.sparse.") else {}
        if key in (b"path", b"GNU.sparse.name") or (key == b"size" and value.isdigit()):
            fields[b"path" if key == b"GNU.sparse.name" else key] = value
        data = data[int(length) :]
    return fields
