"""Tar shards (webdataset, img2dataset): random access through an index of offsets that is built once.

A shard is not unpacked: one pass over its headers notes where the image and the caption of each sample are
(`tar_index`), and `os.pread` reads them.
"""

import functools
import glob
import os
import pathlib
import re
from typing import BinaryIO

from dalle_jax.data.record import REASONS, BadRecord, Dropped, Record
from dalle_jax.data.sources import cache, captions, tar_index
from dalle_jax.data.sources.tar_members import BLOCK, Member, members
from dalle_jax.errors import UserError, say

OPEN_FILES = 64  # per process and source
NO_MEMBER = Member(None, 0)


def shard_paths(pattern: str) -> list[str]:
    """The files of a shard pattern, sorted: braces as in a shell, then globs; a folder stands for its *.tar files.

    A name with `.tar` and without wildcards is taken as it is, because 100,000 of them would take long to look at.

    Raises:
      UserError: nothing matches.
    """
    pattern = os.path.expanduser(pattern)
    pattern = pattern if os.path.isabs(pattern) else os.path.join(os.getcwd(), pattern)
    paths: list[str] = []
    for part in [pattern] if os.path.isdir(pattern) else expand_braces(pattern):
        literal = glob.escape(part) == part
        if ".tar" in os.path.basename(part) and literal:
            found, problem = [part], ""
        elif os.path.isdir(part):
            found, problem = glob.glob(os.path.join(glob.escape(part), "*.tar")), "it is a folder without .tar files"
        else:
            found, problem = [part] if os.path.isfile(part) else glob.glob(part), "no file matches"
        if not found:
            raise UserError(f"expected tar shards at {part}, but {problem}: check the pattern")
        paths += found
    return sorted(set(paths))


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
    """Records of tar shards in file order. See `record.Source`; opened by `sources.open_source('wds:...')`.

    Raises:
      UserError: a shard is not there.
    """

    def __init__(self, name: str, paths: list[str], *, captions_required: bool = True):
        self.name, self._paths, self._captions_required = name, paths, captions_required
        self._index, self._warned = tar_index.Index(paths), False
        self._file = functools.lru_cache(OPEN_FILES)(self._open)  # the last ones; opened outside of its lock

    def __reduce__(self):
        return functools.partial(ShardSource, captions_required=self._captions_required), (self.name, self._paths)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> Record | Dropped:
        shard, (start, image, *caption) = self._index.find(range(len(self))[row])
        label = pathlib.Path(self._paths[shard]).name
        key = f"{label}/@{start * BLOCK}" if start else label
        fault, of_slot = tar_index.fault(image >> 24)
        headers, blocks = image >> 20 & 15, image % (1 << 20)
        if not headers:
            fault = fault or "changed shard"  # in a damaged table
            return Dropped(key, fault, REASONS[fault])
        try:
            path, data = self._read(shard, start, headers, blocks)
            key = f"{label}/{path[: path.rfind(b'.')].decode('utf-8', 'replace')}"
            if of_slot:
                raise BadRecord(fault, f"{REASONS[fault]}: {os.fsdecode(path)}")
            try:
                return Record(key, data, self._captions(shard, image >> 24, *caption))
            except BadRecord:
                if self._captions_required:
                    raise
                return Record(key, data, ())
        except BadRecord as bad:
            return Dropped(key, bad.reason, bad.detail)

    def captions_of(self, row: int) -> tuple[str, ...]:
        shard, (_, image, *caption) = self._index.find(range(len(self))[row])
        try:
            return self._captions(shard, image >> 24, *caption)
        except BadRecord:
            return ()

    def _captions(self, shard: int, code: int, block: int, blocks: int) -> tuple[str, ...]:
        fault, _ = tar_index.fault(code)
        if fault == "no caption":
            raise BadRecord(fault, "the sample has neither a .txt nor a .json")
        if fault:
            raise BadRecord(fault, f"the caption: {REASONS[fault]}")
        _, data = self._read(shard, block - 1, 1, blocks)
        return captions.from_text(data) if code == tar_index.TEXT else captions.from_json(data)

    def _read(self, shard: int, start: int, headers: int, blocks: int) -> tuple[bytes, bytes]:
        """The path of the member whose headers begin at block `start`, and its data if it has that many blocks.

        Raises:
          BadRecord: 'changed shard', 'unreadable file' or 'truncated tar'.
        """
        offset, size, data = start * BLOCK, (headers + blocks) * BLOCK, b""
        try:
            file = self._file(shard)
            # Needs no seek and so no lock. One read stops at about 2 GiB or at a signal.
            while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
                data = data + more if data else more
        except OSError as error:
            raise BadRecord("unreadable file", str(error)) from None
        member = next(members(lambda size, at: data[at : at + size], 0, len(data)), NO_MEMBER)
        if len(data) < size and (member.fault == "truncated tar" or len(data) <= headers * BLOCK):
            raise BadRecord("truncated tar", f"{self._paths[shard]} has shrunk since it was indexed")
        if not member.path or (blocks and (member.data, -(-member.size // BLOCK)) != (headers * BLOCK, blocks)):
            raise self._changed(
                shard, f"other content of the same size and time: remove {cache.folder()}, and start again"
            )
        return member.path, data[member.data : member.data + member.size]

    def _open(self, shard: int) -> BinaryIO:
        path, (size, time, _, packed) = self._paths[shard], self._index.facts[shard].tolist()
        status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != (size, time):
            raise self._changed(shard, f"another size or time: give `dalle-jax index {self.name}`, and start again")
        return open(tar_index.unpacked(path, size, time) if packed else path, "rb", buffering=0)

    def _changed(self, shard: int, got: str) -> BadRecord:
        """The fault, which is also said once. got: what came, and what to do."""
        detail = f"expected {self._paths[shard]} as it was indexed, got {got}"
        if not self._warned:
            self._warned = True
            say(f"dalle-jax: {detail}; its records are dropped until then, and those of other shards like it")
        return BadRecord("changed shard", detail)
