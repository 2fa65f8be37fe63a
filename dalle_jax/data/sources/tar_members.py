"""The members of a tar file in any state: where the data of each is, and where the file is damaged.

The standard library parses single headers. The walk from header to header is done here, because it has to continue
where `tarfile` stops: after a damaged header at the next valid one, and after an end mark if another archive follows.
Reads headers only.
"""

import dataclasses
import os
import tarfile
from collections.abc import Iterator

BLOCK = 512  # bytes; the unit of the tar format
CHUNK = 1 << 20
MAX_NAME_BYTES = 1 << 20  # of an extended header
MAGIC_OFFSET = 257  # of b"ustar" in a header


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in a tar, or a damaged place. offset, size: of its data, in bytes.

    fault: '' or a name of `record.REASONS`: 'link', 'truncated tar', 'bad tar header', 'not a tar file'. Damage that
    belongs to no known member has the path '@OFFSET'.
    """

    path: str
    offset: int = 0
    size: int = 0
    fault: str = ""


def members(descriptor: int) -> Iterator[Member]:
    """Every regular file, link and damaged place of the open file, in file order.

    Raises:
      OSError: the file cannot be read.
    """
    end = os.fstat(descriptor).st_size
    offset, extended, known = 0, {}, False
    while offset < end:
        block = os.pread(descriptor, BLOCK, offset)
        if len(block) < BLOCK:
            if any(block):
                yield Member(f"@{offset}", fault="truncated tar" if known else "not a tar file")
            return
        info = _header(block)
        if info is None:
            blank = not any(block)
            following, only_zeros = _next_header(descriptor, offset + BLOCK, end)
            if not blank and not known and following is None:
                yield Member("", fault="not a tar file")
            elif not blank or (following is not None and not only_zeros):
                yield Member(f"@{offset}", fault="bad tar header")
            if following is None:
                return
            offset, extended, known = following, {}, True
            continue

        known = True
        data = offset + BLOCK
        size = int(extended.get("size", info.size))
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        named_by = info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE)
        if has_data or named_by or info.type == tarfile.XGLTYPE:
            offset = data + -(-size // BLOCK) * BLOCK
        else:
            offset = data
        path = extended.get("path", info.name)
        if offset > data and data + size > end:
            yield Member(path, fault="truncated tar")
            return
        if named_by:
            extended = extended | _extended(info.type, os.pread(descriptor, min(size, MAX_NAME_BYTES), data))
            continue
        extended = {}
        if info.issym() or info.islnk():
            yield Member(path, fault="link")
        elif info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:  # the data of a sparse file are in pieces
            yield Member(path, offset=data, size=size)


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _next_header(descriptor: int, start: int, end: int) -> tuple[int | None, bool]:
    """Offset of the first valid header at or after `start`, None without one, and whether only zeros precede it."""
    only_zeros = True
    for offset in range(start, end, CHUNK):
        chunk = os.pread(descriptor, CHUNK, offset)
        place = chunk.find(b"ustar")
        while place >= 0:
            header = place - MAGIC_OFFSET
            if header >= 0 and header % BLOCK == 0 and _header(chunk[header : header + BLOCK]) is not None:
                return offset + header, only_zeros and not chunk[:header].strip(b"\0")
            place = chunk.find(b"ustar", place + 1)
        only_zeros = only_zeros and not chunk.strip(b"\0")
    return None, only_zeros


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """The 'path' and 'size' in a long-name record (GNU) or an extended header (pax)."""
    text = data.decode("utf-8", "surrogateescape")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": text.partition("\0")[0]}
    if kind != tarfile.XHDTYPE:
        return {}
    # Records are 'LENGTH KEY=VALUE\n' with LENGTH in bytes; a value with a newline loses what follows it.
    pairs = (line.partition(" ")[2].partition("=") for line in text.split("\n"))
    fields = {key: value for key, _, value in pairs if key in ("path", "size")}
    return fields if fields.get("size", "0").isdecimal() else {}
