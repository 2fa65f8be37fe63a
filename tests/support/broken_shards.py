"""Writes the ways in which captioned pictures arrive broken, each with what a loader must make of it.

`CASES` maps a name to (bytes of a tar file, keys of the good records, reason -> count of the dropped).
"""

import collections
import gzip
import io
import json
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

CAPTION = b"a caption of five words"


def encoded(seed: int = 0, *, kind: str = "JPEG", size: tuple[int, int] = (48, 32)) -> bytes:
    """A picture of noise, (width, height) `size`: it does not compress, so a cut file really lacks pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


TINY = encoded(size=(4, 4), kind="PNG")


def pack(members, *, kind=tarfile.GNU_FORMAT) -> bytes:
    """(name, bytes) or TarInfo -> a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def sample(key: str, **members: bytes):
    """The members of one sample; a good picture and caption unless given."""
    return [
        (f"{key}.{suffix}", data)
        for suffix, data in ({"jpg": encoded(zlib.crc32(key.encode())), "txt": CAPTION} | members).items()
    ]


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels and whose data is one byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _json(**fields) -> bytes:
    return json.dumps(fields).encode()


def _damage(data: bytes, name: bytes, *, with_bytes: bytes = b"!!!") -> bytes:
    """Spoils the header of the member `name`."""
    at = data.index(name)
    return data[:at] + with_bytes + data[at + len(with_bytes) :]


_THREE = [*sample("a"), *sample("b"), *sample("c")]
_LAST_PICTURE = pack(_THREE).index(b"c.jpg")  # offset of its header
_JSON_LAST = pack([*sample("a"), *sample("b", json=b"{}")])
_PICTURE = encoded()

CASES: dict[str, tuple[bytes, list[str], dict[str, int]]] = {
    "sound": (pack(_THREE), ["a", "b", "c"], {}),
    "picture cut": (
        pack([*sample("a", jpg=_PICTURE[: len(_PICTURE) // 2]), *sample("b")]),
        ["b"],
        {"truncated image": 1},
    ),
    "picture of no bytes": (pack([*sample("a", jpg=b""), *sample("b")]), ["b"], {"zero bytes": 1}),
    "html for a picture": (
        pack([*sample("a", jpg=b"<html>404</html>"), *sample("b")]),
        ["b"],
        {"not an image": 1},
    ),
    "bomb": (
        pack([*sample("a", jpg=huge_png(100_000, 100_000)), *sample("b", jpg=huge_png(12_000, 10_000)), *sample("c")]),
        ["c"],
        {"decompression bomb": 2},
    ),
    "no caption": (pack([("a.jpg", _PICTURE), *sample("b")]), ["b"], {"no caption": 1}),
    "caption in the json": (pack([("a.jpg", _PICTURE), ("a.json", _json(caption="in json"))]), ["a"], {}),
    "captions in the json": (pack([("a.jpg", _PICTURE), ("a.json", _json(captions=["one", "two"]))]), ["a"], {}),
    "bad json beside a text": (pack(sample("a", json=b'{"capt')), ["a"], {}),
    "bad json alone": (pack([("a.jpg", _PICTURE), ("a.json", b'{"capt'), *sample("b")]), ["b"], {"bad json": 1}),
    "nested json": (pack([("a.jpg", _PICTURE), ("a.json", b"[" * 100_000)]), [], {"bad json": 1}),
    "lone surrogate": (pack([("a.jpg", _PICTURE), ("a.json", b'{"caption": "\\ud800"}')]), [], {"not utf-8": 1}),
    "number for a caption": (pack([("a.jpg", _PICTURE), ("a.json", _json(caption=42))]), [], {"no caption": 1}),
    "no picture": (pack([("a.txt", CAPTION), *sample("b")]), ["b"], {"no image": 1}),
    "blank captions": (
        pack([*sample("a", txt=b""), *sample("b", txt=b" \n\t"), *sample("c", txt=b"None"), *sample("d")]),
        ["d"],
        {"empty caption": 3},
    ),
    "not utf-8": (
        pack([*sample("a", txt="schöner".encode("latin-1")), *sample("b", txt=b"\xef\xbb\xbfwith a mark")]),
        ["b"],
        {"not utf-8": 1},
    ),
    "huge caption": (pack(sample("a", txt=b"word " * 60_000)), ["a"], {}),
    "cut in a member": (pack(_THREE)[: _LAST_PICTURE + 512 + 100], ["a", "b"], {"truncated tar": 1}),
    "cut in a header": (pack(_THREE)[: _LAST_PICTURE + 300], ["a", "b"], {"truncated tar": 1}),
    "cut in the last zeros of a header": (
        _JSON_LAST[: _JSON_LAST.index(b"b.json") + 500],
        ["a", "b"],
        {"truncated tar": 1},
    ),
    "no end mark": (
        pack(_THREE).rstrip(b"\0") + bytes(512 - len(pack(_THREE).rstrip(b"\0")) % 512),
        ["a", "b", "c"],
        {},
    ),
    "bad header of a picture": (_damage(pack(_THREE), b"b.jpg"), ["a", "c"], {"bad tar header": 1, "no image": 1}),
    "bad header inside a sample": (
        _damage(pack([*sample("a", json=b"{}"), *sample("b")]), b"a.json"),
        ["a", "b"],
        {"bad tar header": 1},
    ),
    "header of zeros": (
        _damage(pack(_THREE), b"b.jpg", with_bytes=bytes(512)),
        ["a", "c"],
        {"bad tar header": 1, "no image": 1},
    ),
    "two archives in one": (pack(sample("a")) + pack(sample("b")), ["a", "b"], {}),
    "garbage after the end": (pack(sample("a")) + b"garbage!" * 200, ["a"], {}),
    "empty archive": (pack([]), [], {"empty shard": 1}),
    "empty file": (b"", [], {"empty shard": 1}),
    "garbage": (np.random.default_rng(0).bytes(10_240), [], {"not a tar file": 1}),
    "gzip": (gzip.compress(pack(_THREE)), ["a", "b", "c"], {}),
    "gzip cut": (gzip.compress(pack(_THREE))[:-900], ["a", "b"], {"truncated tar": 1}),
    "same key again": (
        pack([*sample("a"), *sample("a"), *sample("b"), *sample("a")]),
        ["a", "b"],
        {"duplicate key": 2},
    ),
    "members apart": (
        pack([("a.jpg", _PICTURE), ("b.jpg", encoded(1)), ("a.txt", b"of a"), ("b.txt", b"of b")]),
        [],
        {"members apart": 2},
    ),
    "links": (
        pack(
            [
                link("a.jpg", "/etc/hostname", tarfile.SYMTYPE),
                ("a.txt", CAPTION),
                *sample("b"),
                link("c.jpg", "b.jpg", tarfile.LNKTYPE),
                ("c.txt", CAPTION),
            ]
        ),
        ["b"],
        {"link": 2},
    ),
    "odd names": (
        pack(
            [
                *sample("../escape"),
                *sample("/abs/olute"),
                *sample("sub.dir/photo"),
                *sample("사진 1"),
                *sample("x" * 180),
                *sample(".hidden"),
                *sample("__MACOSX/._1"),
                ("README", b"stray"),
                ("9.cls", b"3"),
            ]
        ),
        ["../escape", "/abs/olute", "sub.dir/photo", "사진 1", "x" * 180],
        {},
    ),
    "pax names": (pack(sample("y" * 180), kind=tarfile.PAX_FORMAT), ["y" * 180], {}),
    "upper case": (pack([("A.JPG", _PICTURE), ("A.TXT", CAPTION)]), ["A"], {}),
    "png named jpg": (pack(sample("a", jpg=encoded(kind="PNG"))), ["a"], {}),
}


def expected_total() -> tuple[int, collections.Counter]:
    """Good records and dropped reasons over all cases."""
    dropped: collections.Counter = collections.Counter()
    for _, _, reasons in CASES.values():
        dropped.update(reasons)
    return sum(len(good) for _, good, _ in CASES.values()), dropped
