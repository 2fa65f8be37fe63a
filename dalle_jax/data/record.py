"""The items of a source: a `Record`, an `Encoded`, or a `Dropped` with the reason why there is none.

Every slot of a source gives one of them, so that bad data is counted and never raised: len(source) counts everything
that was seen, and good + dropped = len(source).
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

MAX_IMAGE_BYTES, MAX_CAPTION_BYTES = 256 << 20, 16 << 20  # of an encoded image, of a caption file

REASONS = {
    # faults of a container
    "empty shard": "a tar file without members, or without bytes",
    "not a tar file": "no tar header anywhere in the file",
    "bad tar header": "a member whose header is damaged; reading continued at the next valid one",
    "truncated tar": "the file ends in the middle of a member or of a header",
    "unreadable file": "the operating system refused to read it",
    # faults of a sample
    "no image": "a caption without an image",
    "no caption": "an image without a caption",
    "empty caption": "a caption of nothing but blanks",
    "not utf-8": "a caption that is not valid UTF-8 text",
    "bad json": "the only caption is in a JSON that does not parse, or a line of metadata.jsonl does not",
    "bad csv": "a row of metadata.csv with more fields than its header, as a comma without quotes makes it",
    "duplicate key": "a second sample of the same name; the first one is used",
    "members apart": "the members of one sample are not next to each other in the shard",
    "link": "a symbolic or hard link inside a tar; never followed",
    "sparse": "a file with holes inside a tar, whose data are in pieces; pack it without --sparse",
    "extra image": "a further image of a sample, without a caption of its own or not read; not counted as broken",
    "changed shard": "a tar that is not what it was when it was indexed",
    "outside the folder": "a file name that leads out of the folder of the data",
    # faults of an image
    "zero bytes": "an image of no bytes",
    "not an image": "bytes of no known image format",
    "truncated image": "an image that ends too early",
    "broken image": "an image that its decoder refuses",
    "unsupported image": "a format that is not read (HEIC, RAW, SVG ...), or pixels without a defined brightness",
    "decompression bomb": "more pixels or bytes after decoding than the limit; of a compressed shard, more than 64 GiB "
    "or than half of what is free in the cache folder (DALLE_JAX_CACHE)",
    "too many bytes": "a member larger than any sensible image or caption, or a shard of more than 2 TiB",
    # faults of a shard of tokens
    "broken tokens": "tokens beyond the vocabulary, or a slot that does not parse; encode that shard again",
}
LEFT_OUT = ("extra image",)  # reasons of what is not needed, though nothing about it is broken


@dataclasses.dataclass(frozen=True)
class Record:
    """One image and its captions.

    key: its name, for people. image: an encoded file, or decoded uint8 [H, W, 3].
    captions: not blank, stripped; () only if the source was opened without `captions_required`.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One image as the image tokens of a frozen tokenizer, and its captions.

    key: its name, for people. tokens_AI: uint16, A crops of I image tokens in raster order. height, width: of the image
    before it was cropped, in pixels. captions: not blank, stripped.
    """

    key: str
    tokens_AI: np.ndarray
    height: int
    width: int
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A slot without a record. reason: a name of `REASONS`, of a filter, or of `decode.BadImage`."""

    key: str
    reason: str
    detail: str = ""


class BadRecord(Exception):
    """A record is bad. Raised inside the data code only: sources and the pipeline turn it into a `Dropped`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@runtime_checkable
class Source(Protocol):
    """Random access to records: picklable, thread-safe, the same slot always gives the same answer."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | Encoded | Dropped: ...


@runtime_checkable
class Captioned(Protocol):
    """A source that reads captions without images."""

    def captions_of(self, index: int) -> tuple[str, ...]: ...


def captions_of(source: Source, index: int) -> tuple[str, ...]:
    """The captions of a slot, () where it has none. Where the source can, its image is not read and may be broken."""
    if isinstance(source, Captioned):
        return source.captions_of(index)
    record = source[index]
    return () if isinstance(record, Dropped) else record.captions
