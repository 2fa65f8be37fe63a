"""Tar shards: every image and damaged place is counted, whatever is odd about it, and the index is small and cheap."""

import collections
import gzip
import io
import itertools
import os
import pickle
import tarfile
import threading
import types
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.pipeline import Batches, DataConfig, Prepare, Reading
from dalle_jax.data.record import REASONS, Record
from dalle_jax.data.sources import open_source, tar, tar_index
from tests.support.broken_shards import CAPTION, TINY, encoded, link, pack, sample


def members(name: str, *suffixes: str, pax: bool = False, **headers: str) -> bytes:
    """A tar without its end: pictures and captions of these suffixes, each with these pax headers."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as archive:
        for suffix in suffixes:
            data = {"txt": CAPTION, "json": b'{"text": "of the json"}'}.get(suffix.rpartition(".")[2].lower(), TINY)
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size, info.pax_headers = len(data), headers
            archive.addfile(info, io.BytesIO(data))
        return out.getvalue()


def linked(name: str, suffix: str, kind: bytes) -> bytes:
    return link(f"{name}.{suffix}", f"elsewhere.{suffix}", kind).tobuf(tarfile.GNU_FORMAT)


def gnu_sparse(name: str) -> bytes:
    """A file in GNU's old format of files with holes, whose map goes on in two more blocks."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, len(TINY)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = bytearray(512)
    more[504] = 1
    return bytes(header + more + bytes(512) + TINY + bytes(-len(TINY) % 512))


def sized_by_pax(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.pax_headers = {"size": str(len(TINY))}
    return info.tobuf(tarfile.PAX_FORMAT) + TINY + bytes(-len(TINY) % 512)


def between(name: str) -> bytes:
    """A sample between two parts of another one."""
    return members(f"{name}x", "png", "txt")


# What is odd -> (the members of samples under a name, keys of the good ones without that name, reasons of the others).
ODDITIES = {
    "plain": (lambda n: members(n, "png", "txt"), [""], []),
    "several, each with its text": (lambda n: members(n, "1.png", "1.txt", "2.png", "2.txt"), [".1", ".2"], []),
    "several, one with its text": (
        lambda n: members(n, "1.png", "2.png", "2.txt", "3.txt"), [".2"], ["extra image", "no image"],
    ),
    "a mask": (lambda n: members(n, "seg.png", "png", "txt"), [""], ["extra image"]),
    "a mask of the same name": (lambda n: members(n, "png", "jpg", "txt"), [""], ["extra image"]),
    "letter @": (lambda n: members(f"@{n}/@1", "png", "txt"), ["@/@1"], []),
    "no UTF-8": (lambda n: members(f"{n}\udce9", "png", "txt"), ["\ufffd"], []),
    "newline": (lambda n: members(f"{n}é\n1", "png", "txt", pax=True), ["é\n1"], []),
    "pax": (lambda n: members(n, "png", "txt", pax=True, mtime="1700000000.25"), [""], []),
    "size in the pax header": (lambda n: sized_by_pax(f"{n}.png") + members(n, "txt"), [""], []),
    "linked picture": (lambda n: linked(n, "png", tarfile.SYMTYPE) + members(n, "txt"), [], ["link"]),
    "linked caption": (lambda n: members(n, "png") + linked(n, "txt", tarfile.LNKTYPE), [], ["link"]),
    "holes": (lambda n: gnu_sparse(f"{n}.png") + members(n, "txt"), [], ["sparse"]),
    "holes, pax": (
        lambda n: members("Sparse.1/x", "png", pax=True, **{"GNU.sparse.major": "1", "GNU.sparse.name": f"{n}.png"})
        + members(n, "txt"), [], ["sparse"],
    ),
    "upper case": (lambda n: members(n, "PNG", "TXT"), [""], []),
    "two cases": (lambda n: members(n, "PNG", "txt", "png"), [""], ["duplicate key"]),
    "caption of a field text": (lambda n: members(n, "png", "json"), [""], []),
    "no caption": (lambda n: members(n, "png", "cls"), [], ["no caption"]),
    "no picture": (lambda n: members(n, "txt", "json"), [], ["no image"]),
    "no picture, with dots": (lambda n: members(n, "1.txt", "2.txt"), [], ["no image", "no image"]),
    "not read": (lambda n: members(n, "HEIC", "txt"), [], ["unsupported image"]),
    "broken header": (lambda n: b"\0" + members(n, "png", "txt")[1:], [], ["bad tar header", "no image"]),
    "twice": (lambda n: members(n, "png", "txt") * 2, [""], ["duplicate key"]),
    "apart": (lambda n: members(n, "png") + between(n) + members(n, "txt"), ["x"], ["members apart"]),
    "apart, text first": (lambda n: members(n, "txt") + between(n) + members(n, "png"), ["x"], ["members apart"]),
    "apart, with two texts": (
        lambda n: members(n, "png") + between(n) + members(n, "1.txt", "2.txt"), ["x"], ["members apart", "no image"],
    ),
    "apart, with a picture of its own": (
        lambda n: members(n, "jpg") + between(n) + members(n, "png", "txt"), ["x"], ["no caption", "duplicate key"],
    ),
    "apart, numbered": (
        lambda n: members(n, "1.png", "1.txt") + between(n) + members(n, "2.png", "2.txt"), [".1", ".2", "x"], [],
    ),
    "not in a sample": (lambda n: members(f".{n}", "png") + members(n, "cls", "npy"), [], []),
}  # fmt: skip


def test_good_and_dropped_are_what_is_in_the_tar_for_all_pairs_of_oddities(tmp_path):
    expected = {}
    for number, (first, second) in enumerate(itertools.product(ODDITIES, repeat=2)):
        path = tmp_path / (f"{number:03d}.tar.gz" if number % 7 == 0 else f"{number:03d}.tar")
        data = ODDITIES[first][0]("a") + ODDITIES[second][0]("b") + bytes(1024)
        path.write_bytes(gzip.compress(data, 1) if number % 7 == 0 else data)
        good = [
            key.replace("/", f"{name}/", 1) if "/" in key else name + key
            for name, oddity in (("a", first), ("b", second))
            for key in ODDITIES[oddity][1]
        ]
        expected[path.name] = first, second, sorted(good), collections.Counter(ODDITIES[first][2] + ODDITIES[second][2])
    found = {name: ([], collections.Counter()) for name in expected}
    for item in list(open_source(f"wds:{tmp_path}/*.tar*")):
        name, _, key = item.key.partition("/")
        if isinstance(item, Record):
            assert item.image == TINY and item.captions in ((CAPTION.decode(),), ("of the json",))
            found[name][0].append(key)
        else:
            assert item.reason in REASONS
            found[name][1][item.reason] += 1
    for name, (first, second, good, dropped) in expected.items():
        if {first, second} == {"not in a sample"}:
            dropped["empty shard"] = 1
        assert (sorted(found[name][0]), found[name][1]) == (good, dropped), (first, second)


def test_of_images_beside_one_caption_the_first_of_the_shortest_name_is_taken(tmp_path):
    images = [(f"a.{name}", encoded(seed)) for seed, name in enumerate(("seg.jpg", "jpg", "png"))]
    (tmp_path / "a.tar").write_bytes(pack([*images, ("a.txt", CAPTION)]))
    (good,) = (item for item in list(open_source(f"wds:{tmp_path}")) if isinstance(item, Record))
    assert good.image == encoded(1)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_beyond_the_header_blocks_of_a_slot_is_cut(kind, tmp_path):
    (tmp_path / "a.tar").write_bytes(pack([*sample("n" * 9000), *sample("b")], kind=kind))
    first, second = list(open_source(f"wds:{tmp_path}"))
    assert isinstance(first, Record) and first.key.startswith("a.tar/nnn") and second.key == "a.tar/b"


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        ("MAX_SHARD", "too many bytes"),
        ("MAX_IMAGE_BYTES", "too many bytes"),
        ("MAX_CAPTION_BYTES", "too many bytes"),
        ("MAX_UNPACKED", "decompression bomb"),
        ("free", "decompression bomb"),
    ],
)
def test_bounds_in_bytes(bound, reason, tmp_path, monkeypatch):
    data = pack(sample("a"))
    (tmp_path / "a.tar").write_bytes(gzip.compress(data) if reason == "decompression bomb" else data)
    if bound == "free":
        little = types.SimpleNamespace(f_bavail=2 * len(data) - 2, f_frsize=1)
        monkeypatch.setattr(os, "fstatvfs", lambda descriptor: little)
    else:
        monkeypatch.setattr(tar_index, bound, 10)
    (dropped,) = list(open_source(f"wds:{tmp_path}"))
    assert dropped.reason == reason


def test_files_are_opened_by_many_threads_at_once(shards, monkeypatch):
    """Two threads that wait for each other inside `open` would never return, if one held a lock."""
    source = open_source(f"wds:{shards}")
    together = threading.Barrier(2)
    monkeypatch.setattr(
        tar, "open", lambda *args, **kwargs: (together.wait(10), open(*args, **kwargs))[1], raising=False
    )
    with futures.ThreadPoolExecutor(2) as pool:
        assert all(isinstance(record, Record) for record in pool.map(source.__getitem__, (0, 14)))


def test_more_shards_than_open_files_read_by_many_threads_from_a_pickled_copy(shards, monkeypatch):
    monkeypatch.setattr(tar, "OPEN_FILES", 1)
    monkeypatch.setattr(tar_index, "OPEN_TABLES", 1)
    monkeypatch.setattr(tar_index, "TABLE", 2)
    source = open_source(f"wds:{shards}/*.tar")
    expected = list(source)
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(0, len(source), 600)
    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, order)) == [expected[i] for i in order]
    assert copy._file.cache_info().currsize == 1


def test_a_compressed_shard_is_bounded_in_bytes_and_not_in_ratio(tmp_path):
    white = encoded_white()
    data = pack([member for i in range(60) for member in ((f"{i:02d}.bmp", white), (f"{i:02d}.txt", CAPTION))])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    assert len(data) > 150 * (tmp_path / "a.tar.gz").stat().st_size
    assert [record.image for record in list(open_source(f"wds:{tmp_path}/a.tar.gz"))] == [white] * 60


def encoded_white() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(out, "BMP")
    return out.getvalue()


def test_images_beside_a_captioned_one_are_left_out_and_not_broken(tmp_path):
    data = [member for i in range(4) for member in [(f"{i}.mask.png", TINY), *sample(str(i), jpg=TINY)]]
    (tmp_path / "a.tar").write_bytes(pack(data))
    prepare, strict = Prepare(DataConfig(image_size=4)), Reading(threads=0, max_bad_share=0.0)
    source = open_source(f"wds:{tmp_path}/a.tar")
    once = Batches(source, prepare, batch_size=4, seed=0, shuffle=False, epochs=1, reading=strict)
    assert sum(len(batch["image"]) for batch in once) == 4 and once.dropped == {"extra image": 4}


def test_captions_are_read_without_images(tmp_path, monkeypatch):
    data = [*sample("a", jpg=b"broken", txt=b"one\ntwo"), ("b.jpg", TINY), *sample("c", txt=b"\xff")]
    (tmp_path / "a.tar").write_bytes(pack([*data, ("d.txt", CAPTION)]))
    source, pread, read = open_source(f"wds:{tmp_path}/a.tar"), os.pread, []
    monkeypatch.setattr(os, "pread", lambda *where: read.append(pread(*where)) or read[-1])
    assert [source.captions_of(row) for row in range(4)] == [("one", "two"), (), (), ()]
    assert {len(data) for data in read} <= {512, 1024}, "a header, and the block of a caption"


def test_names_of_shards(shards, monkeypatch):
    """Braces, wildcards, a folder, a relative path, and brackets and braces that are part of a name."""
    wanted = [str(shards / f"{shard:05d}.tar") for shard in range(5)]
    monkeypatch.chdir(shards)
    for pattern in (f"{shards}/*.tar", str(shards), "{00000..00004}.tar", "0000{0..3}.tar", "*{3,4}.tar"):
        assert set(tar.shard_paths(pattern)) <= set(wanted)
    assert tar.shard_paths(".") == [
        os.path.join(str(shards), ".", name) for name in sorted(os.listdir()) if ".tar" in name
    ]
    assert tar.expand_braces("{08..10}-{a,b}.tar") == [f"{n}-{c}.tar" for n in ("08", "09", "10") for c in "ab"]
    assert tar.expand_braces("plain.tar") == ["plain.tar"]
    for odd in ("wds [v2]", "{a,b}"):
        (shards / odd).mkdir()
        (shards / odd / "a[1].tar").write_bytes(pack(sample("a")))
        for pattern in (f"{shards}/{odd}", odd):
            assert [record.key for record in list(open_source(f"wds:{pattern}"))] == ["a[1].tar/a"]
    assert tar.shard_paths(f"{shards}/wds [v2]/a[1].tar") == [f"{shards}/wds [v2]/a[1].tar"]
