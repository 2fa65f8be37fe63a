"""Tar shards: every image and damaged place is counted, whatever is odd about it, and the index is small and cheap."""

import builtins
import collections
import gzip
import io
import itertools
import json
import mmap
import os
import pickle
import tarfile
import threading
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from dalle_jax.cli.main import main
from dalle_jax.data.pipeline import Batches, DataConfig, Prepare, Reading
from dalle_jax.data.record import REASONS, Record
from dalle_jax.data.sources import open_source, tar, tar_index
from tests.support.broken_shards import CAPTION, encoded, link, pack, sample

PICTURE = encoded(size=(4, 4), kind="PNG")


def everything(source):
    return [source[i] for i in range(len(source))]


def members(name: str, *suffixes: str, pax: bool = False, **headers: str) -> bytes:
    """A tar without its end: pictures and captions of these suffixes, each with these pax headers."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as archive:
        for suffix in suffixes:
            data = {"txt": CAPTION, "json": b'{"text": "of the json"}'}.get(suffix.rpartition(".")[2].lower(), PICTURE)
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size, info.pax_headers = len(data), headers
            archive.addfile(info, io.BytesIO(data))
        return out.getvalue()


def linked(name: str, suffix: str, kind: bytes) -> bytes:
    return link(f"{name}.{suffix}", f"elsewhere.{suffix}", kind).tobuf(tarfile.GNU_FORMAT)


def gnu_sparse(name: str) -> bytes:
    """A file in GNU's old format of files with holes, whose map goes on in two more blocks."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, len(PICTURE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = bytearray(512)
    more[504] = 1
    return bytes(header + more + bytes(512) + PICTURE + bytes(-len(PICTURE) % 512))


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
    for item in everything(open_source(f"wds:{tmp_path}/*.tar*")):
        name, _, key = item.key.partition("/")
        if isinstance(item, Record):
            assert item.image == PICTURE and item.captions in ((CAPTION.decode(),), ("of the json",))
            found[name][0].append(key)
        else:
            assert item.reason in REASONS
            found[name][1][item.reason] += 1
    for name, (first, second, good, dropped) in expected.items():
        if {first, second} == {"not in a sample"}:
            dropped["empty shard"] = 1
        assert (sorted(found[name][0]), found[name][1]) == (good, dropped), (first, second)


@pytest.fixture
def shards(tmp_path):
    """Five shards of three samples."""
    for shard in range(5):
        samples = [m for i in range(3) for m in sample(f"{shard}{i}", jpg=PICTURE, txt=b"caption %d" % i)]
        (tmp_path / f"{shard:05d}.tar").write_bytes(pack(samples))
    return tmp_path


@pytest.fixture
def looked_at(monkeypatch):
    """What is opened, and asked for its size and time, from now on."""
    calls = []

    def spy(module, name):
        real = getattr(module, name)

        def spied(path, *args, **kwargs):
            calls.append((name, os.path.basename(str(path))))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    spy(os, "stat")
    spy(builtins, "open")
    return calls


def test_a_start_with_an_index_looks_at_one_file_whatever_the_shards(shards, monkeypatch, looked_at):
    monkeypatch.setattr(tar_index, "TABLE", 2)
    monkeypatch.setattr(tar_index, "CHECKED", 0)
    spec = f"wds:{shards}/{{00000..00004}}.tar"
    before = everything(open_source(spec))
    looked_at.clear()
    source = open_source(spec)
    assert {name.partition("-")[0] for _, name in looked_at} == {"{00000..00004}.tar", "shards"} and len(source) == 15
    looked_at.clear()
    assert source[4] == before[4]
    assert {name.partition("-")[0] for _, name in looked_at} == {"slots", "00001.tar"}
    looked_at.clear()
    assert everything(source) == before and ("open", "00001.tar") not in looked_at


def test_a_slot_takes_14_bytes_of_a_mapped_file(shards):
    source = open_source(f"wds:{shards}")
    (table,) = (shards / "cache").glob("slots-*.npy")
    header = 128  # of the .npy format
    assert table.stat().st_size == header + 5 * 32 + 14 * len(source)
    rows = source._index._table(0)
    while isinstance(rows.base, np.ndarray):
        rows = rows.base
    assert isinstance(rows.base, mmap.mmap)


def test_the_index_follows_the_files_and_reads_only_what_changed(shards, monkeypatch):
    scanned = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: scanned.append(os.path.basename(path)) or scan(path))
    spec = f"wds:{shards}/*.tar"
    before = everything(open_source(spec))
    assert sorted(scanned) == [f"{shard:05d}.tar" for shard in range(5)]
    assert everything(open_source(spec)) == before == everything(open_source(f"wds:{shards}")) and len(scanned) == 5

    (shards / "00001.tar").write_bytes(pack(sample("new")))
    after = everything(open_source(spec))
    assert after[:3] + after[4:] == before[:3] + before[6:] and after[3].key == "00001.tar/new"
    assert scanned[5:] == ["00001.tar"]
    for entry in (shards / "cache").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    assert everything(open_source(spec)) == after and len(scanned) == 11


def test_a_cache_that_cannot_be_written_costs_time_and_one_that_is_deleted_nothing(shards, monkeypatch):
    source = open_source(f"wds:{shards}")
    for entry in (shards / "cache").iterdir():
        entry.unlink()
    (shards / "file").write_bytes(b"")
    monkeypatch.setenv("DALLE_JAX_CACHE", str(shards / "file/cache"))
    assert everything(source) == everything(open_source(f"wds:{shards}")) and len(source) == 15


def test_a_shard_that_has_changed_is_named_when_it_is_opened(shards, monkeypatch, capsys):
    """Its slots are dropped with what to do, and the other shards are read on."""
    monkeypatch.setattr(tar_index, "CHECKED", 0)
    spec = f"wds:{shards}/*.tar"
    before = everything(open_source(spec))
    (shards / "00001.tar").write_bytes(pack(sample("another")))
    source = open_source(spec)
    (shards / "00002.tar").unlink()
    after = everything(source)
    assert after[:3] + after[9:] == before[:3] + before[9:]
    assert [item.reason for item in after[3:9]] == ["changed shard"] * 3 + ["unreadable file"] * 3
    assert f"00001.tar as it was indexed, got another size or time: give `dalle-jax index {spec}`" in after[3].detail
    assert capsys.readouterr().err.count("\n") == 1  # said once
    (shards / "00002.tar").write_bytes(pack(sample("back")))
    assert main(["index", spec, "--processes=1"]) == 0
    assert [item.key for item in everything(open_source(spec))[3:5]] == ["00001.tar/another", "00002.tar/back"]


def test_a_file_that_shrinks_while_it_is_open_and_an_index_of_other_bytes(shards):
    source = open_source(f"wds:{shards}/*.tar")
    assert isinstance(source[3], Record)
    status = os.stat(shards / "00001.tar")
    with open(shards / "00001.tar", "r+b") as file:
        file.truncate(2000)
    assert source[5].reason == "truncated tar"
    other = pack([("longer name.jpg", PICTURE), *sample("11"), *sample("12")])
    (shards / "00001.tar").write_bytes(other.ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(shards / "00001.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert {source[row].reason for row in (4, 5)} <= {"changed shard", "truncated tar"}


def test_a_damaged_table_costs_slots_and_raises_nothing(shards):
    records, rng = everything(open_source(f"wds:{shards}")), np.random.default_rng(0)
    (table,) = (shards / "cache").glob("slots-*.npy")
    whole = table.read_bytes()
    first = len(whole) - tar_index.ROW.itemsize * len(records)
    for _ in range(100):
        data = bytearray(whole)
        for place in rng.integers(first, len(whole), 4):
            data[place] = rng.integers(256)
        table.write_bytes(data)
        found = everything(open_source(f"wds:{shards}"))
        assert sum(a == b for a, b in zip(found, records, strict=True)) >= 11
        assert all(isinstance(a, Record) or a.reason in REASONS for a in found)


def test_parts_in_processes_make_the_index_of_one_go(shards, monkeypatch, capsys):
    monkeypatch.setattr(tar_index, "TABLE", 2)
    monkeypatch.setattr(tar_index, "CHECKED", 0)
    spec = f"wds:{shards}/*.tar"
    records = everything(open_source(spec))
    alone = {path.name: path.read_bytes() for path in (shards / "cache").iterdir()}
    monkeypatch.setenv("DALLE_JAX_CACHE", str(shards / "shared"))
    summaries = []
    for part in ("1/2", "0/2", "0/2"):
        assert main(["index", spec, "--part", part, "--processes=2", "--json"]) == 0
        summaries.append(json.loads(capsys.readouterr().out))
    assert [(s["shards"], s["records"], s["now"]["records"], s["complete"]) for s in summaries] == [
        (2, 6, 6, False), (3, 9, 9, True), (3, 9, 0, True),
    ]  # fmt: skip
    assert {path.name: path.read_bytes() for path in (shards / "shared").iterdir()} == alone
    times = {path: path.stat().st_mtime_ns for path in (shards / "shared").iterdir()}
    assert main(["index", spec, "--processes=1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert everything(open_source(spec)) == records


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder:x"], "expected tar shards as wds:PATTERN, got 'folder:x': other sources need no index"),
        (["wds:{0}/nope.tar"], "expected tar shards at {0}/nope.tar, but no file matches: check the pattern"),
        (["wds:{0}/*.tar", "--part=2/2"], "expected --part I/N with I from 0 to N - 1"),
        (["wds:{0}/*.tar", "--processes=0"], "expected --processes to be"),
        (["wds:{0}/*.tar"], "expected a writable cache folder"),
    ],
)
def test_what_cannot_be_indexed_is_one_sentence(shards, words, message, monkeypatch, capsys):
    (shards / "file").write_bytes(b"")
    monkeypatch.setenv("DALLE_JAX_CACHE", str(shards / "file/cache"))
    assert main(["index", *(word.format(shards) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message.format(shards) in error and error.count("\n") == 1


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
    expected = everything(source)
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(0, len(source), 600)
    with futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, order)) == [expected[i] for i in order]
    assert copy._file.cache_info().currsize == 1


def test_a_compressed_shard_is_bounded_in_bytes_and_not_in_ratio(tmp_path, monkeypatch):
    white = encoded_white()
    data = pack([member for i in range(60) for member in ((f"{i:02d}.bmp", white), (f"{i:02d}.txt", CAPTION))])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    assert len(data) > 150 * (tmp_path / "a.tar.gz").stat().st_size
    assert [record.image for record in everything(open_source(f"wds:{tmp_path}/a.tar.gz"))] == [white] * 60
    monkeypatch.setattr(tar_index, "MAX_UNPACKED", len(data) - 1)
    (tmp_path / "b.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    (bomb,) = everything(open_source(f"wds:{tmp_path}/b.tar.gz"))
    assert (bomb.key, bomb.reason) == ("b.tar.gz", "decompression bomb")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]) == 1


def encoded_white() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(out, "BMP")
    return out.getvalue()


def test_images_beside_a_captioned_one_are_left_out_and_not_broken(tmp_path):
    data = [member for i in range(4) for member in [(f"{i}.mask.png", PICTURE), *sample(str(i), jpg=PICTURE)]]
    (tmp_path / "a.tar").write_bytes(pack(data))
    prepare, strict = Prepare(DataConfig(image_size=4)), Reading(threads=0, max_bad_share=0.0)
    source = open_source(f"wds:{tmp_path}/a.tar")
    once = Batches(source, prepare, batch_size=4, seed=0, shuffle=False, epochs=1, reading=strict)
    assert sum(len(batch["image"]) for batch in once) == 4 and once.dropped == {"extra image": 4}


def test_captions_are_read_without_images(tmp_path, monkeypatch):
    data = [*sample("a", jpg=b"broken", txt=b"one\ntwo"), ("b.jpg", PICTURE), *sample("c", txt=b"\xff")]
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
            assert [record.key for record in everything(open_source(f"wds:{pattern}"))] == ["a[1].tar/a"]
    assert tar.shard_paths(f"{shards}/wds [v2]/a[1].tar") == [f"{shards}/wds [v2]/a[1].tar"]
