"""The index of tar shards is small and cheap, follows the files, and what has changed is said."""

import builtins
import json
import mmap
import os

import numpy as np
import pytest

from dalle_jax.cli.main import main
from dalle_jax.data.record import REASONS, Dropped, Record
from dalle_jax.data.sources import open_source, tar_index
from tests.support.broken_shards import TINY, pack, sample


def test_what_could_not_be_read_is_tried_again_at_the_next_start(shards, monkeypatch):
    """Also where neither its size nor its time have changed; what is no file is not waited for."""
    os.mkfifo(shards / "pipe.tar")

    def refuse(path, *args, **kwargs):
        if str(path).endswith("00001.tar"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "open", refuse, raising=False)
        faults = [item for item in list(open_source(f"wds:{shards}")) if isinstance(item, Dropped)]
    assert [(item.key, item.reason) for item in faults] == [(n, "unreadable file") for n in ("00001.tar", "pipe.tar")]
    assert sum(isinstance(item, Record) for item in list(open_source(f"wds:{shards}"))) == 15


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


def test_a_start_with_an_index_looks_at_one_file_whatever_the_shards(shards, monkeypatch, looked_at, capsys):
    monkeypatch.setattr(tar_index, "TABLE", 2)
    monkeypatch.setattr(tar_index, "CHECKED", 0)
    spec = f"wds:{shards}/{{00000..00004}}.tar"
    before = list(open_source(spec))
    assert "indexing 5 tar shards; `dalle-jax index` does it with all processors" in capsys.readouterr().err
    looked_at.clear()
    source = open_source(spec)
    assert {name.partition("-")[0] for _, name in looked_at} == {"{00000..00004}.tar", "shards"} and len(source) == 15
    looked_at.clear()
    assert source[4] == before[4]
    assert {name.partition("-")[0] for _, name in looked_at} == {"slots", "00001.tar"}
    looked_at.clear()
    assert list(source) == before and ("open", "00001.tar") not in looked_at


def test_a_slot_takes_14_bytes_of_a_mapped_file(shards):
    source = open_source(f"wds:{shards}")
    (table,) = (shards / "cache").glob("slots-*.raw")
    assert table.stat().st_size == 8 + 5 * 32 + 14 * len(source)
    rows = source._index._table(0)
    while isinstance(rows.base, np.ndarray):
        rows = rows.base
    assert isinstance(rows.base, mmap.mmap)


def test_the_index_follows_the_files_and_reads_only_what_changed(shards, monkeypatch):
    scanned = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: scanned.append(os.path.basename(path)) or scan(path))
    spec = f"wds:{shards}/*.tar"
    before = list(open_source(spec))
    assert sorted(scanned) == [f"{shard:05d}.tar" for shard in range(5)]
    assert list(open_source(spec)) == before == list(open_source(f"wds:{shards}")) and len(scanned) == 5

    (shards / "00001.tar").write_bytes(pack(sample("new")))
    after = list(open_source(spec))
    assert after[:3] + after[4:] == before[:3] + before[6:] and after[3].key == "00001.tar/new"
    assert scanned[5:] == ["00001.tar"]
    for entry in (shards / "cache").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    assert list(open_source(spec)) == after and len(scanned) == 11


def test_a_cache_that_cannot_be_written_costs_time_and_one_that_is_deleted_nothing(shards, monkeypatch):
    source = open_source(f"wds:{shards}")
    for entry in (shards / "cache").iterdir():
        entry.unlink()
    (shards / "file").write_bytes(b"")
    monkeypatch.setenv("DALLE_JAX_CACHE", str(shards / "file/cache"))
    assert list(source) == list(open_source(f"wds:{shards}")) and len(source) == 15


def test_a_shard_that_has_changed_is_named_when_it_is_opened(shards, monkeypatch, capsys):
    """Its slots are dropped with what to do, and the other shards are read on."""
    monkeypatch.setattr(tar_index, "CHECKED", 0)
    spec = f"wds:{shards}/*.tar"
    before = list(open_source(spec))
    (shards / "00001.tar").write_bytes(pack(sample("another")))
    source = open_source(spec)
    (shards / "00002.tar").unlink()
    after = list(source)
    assert after[:3] + after[9:] == before[:3] + before[9:]
    assert [item.reason for item in after[3:9]] == ["changed shard"] * 3 + ["unreadable file"] * 3
    assert f"00001.tar as it was indexed, got another size or time: give `dalle-jax index {spec}`" in after[3].detail
    assert capsys.readouterr().err.count("\n") == 1  # said once
    (shards / "00002.tar").write_bytes(pack(sample("back")))
    assert main(["index", spec, "--processes=1"]) == 0
    assert [item.key for item in list(open_source(spec))[3:5]] == ["00001.tar/another", "00002.tar/back"]


def test_a_file_that_shrinks_while_it_is_open_and_an_index_of_other_bytes(shards):
    source = open_source(f"wds:{shards}/*.tar")
    assert isinstance(source[3], Record)
    status = os.stat(shards / "00001.tar")
    with open(shards / "00001.tar", "r+b") as file:
        file.truncate(2000)
    assert source[5].reason == "truncated tar"
    other = pack([*sample("10", jpg=TINY + bytes(600)), *sample("11", jpg=TINY)])
    (shards / "00001.tar").write_bytes(other)
    os.utime(shards / "00001.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(other) == status.st_size and source[3].reason == "changed shard"
    assert "other content of the same size and time: remove " in source[3].detail


def test_a_damaged_table_costs_slots_and_raises_nothing(shards):
    records, rng = list(open_source(f"wds:{shards}")), np.random.default_rng(0)
    (table,) = (shards / "cache").glob("slots-*.raw")
    whole = table.read_bytes()
    first = len(whole) - tar_index.ROW.itemsize * len(records)
    for _ in range(100):
        data = bytearray(whole)
        for place in rng.integers(first, len(whole), 4):
            data[place] = rng.integers(256)
        table.write_bytes(data)
        found = list(open_source(f"wds:{shards}"))
        assert sum(a == b for a, b in zip(found, records, strict=True)) >= 11
        assert all(isinstance(a, Record) or a.reason in REASONS for a in found)


def test_parts_in_processes_make_the_index_of_one_go(shards, monkeypatch, capsys):
    monkeypatch.setattr(tar_index, "TABLE", 2)
    monkeypatch.setattr(tar_index, "CHECKED", 0)
    spec = f"wds:{shards}/*.tar"
    records = list(open_source(spec))
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
    assert list(open_source(spec)) == records


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
