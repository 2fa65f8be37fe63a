"""What the index of tar shards takes: time to make, bytes, system calls and memory of a start with very many shards.

    python -m benchmarks.speed.index --out DIR

Making it is measured on shards of 10,000 records of three members (image, text, JSON) in the page cache, with plain
headers and with a pax header before each, as webdataset's writer makes them. For a start, DIR gets 100,000 names of
small shards (hard links of a hundred files), whose index is told that each has 250 records: 25 million in all. A fresh
process opens the source, and strace counts the system calls that name a file or read a folder in between.
"""

import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np

from benchmarks import harness
from dalle_jax.data.sources import cache, tar, tar_index

SHARDS, RECORDS = 100_000, 250  # the records of a shard
LINKS = 1000  # names of one file
TIMED = 10_000  # records of a shard that is timed
SIZES = {"jpg": 20_000, "txt": 60, "json": 900}  # bytes, about those of img2dataset at 256 pixels
SCALED = 250_000_000  # records of the paper

START = """
import os, sys, time
from dalle_jax.data.sources import open_source

def resident(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) / 1e3

anonymous = resident("RssAnon")
os.path.exists("/begin")
began = time.perf_counter()
source = open_source(sys.argv[1])
seconds = time.perf_counter() - began
os.path.exists("/end")
began = time.perf_counter()
for row in range(0, len(source), len(source) // 20_000):
    source._index.find(row)
looked = (time.perf_counter() - began) / 20_000
print(len(source), seconds, looked, resident("RssAnon") - anonymous, resident("RssFile"))
"""


def write_shard(path: pathlib.Path, records: int, *, pax: bool) -> None:
    kind, when = (tarfile.PAX_FORMAT, 1_700_000_000.25) if pax else (tarfile.USTAR_FORMAT, 1_700_000_000)
    with tarfile.open(path, "w", format=kind) as archive:
        for record in range(records):
            for suffix, size in SIZES.items():
                member = tarfile.TarInfo(f"{record:09d}.{suffix}")
                member.size, member.mtime = size, when
                archive.addfile(member, io.BytesIO(bytes(size)))


def make(out: pathlib.Path, rounds: int) -> list[str]:
    """Microseconds of a processor for each record."""
    rows = []
    for name, pax in (("plain", False), ("pax", True)):
        path = out / f"{name}.tar"
        write_shard(path, TIMED, pax=pax)
        tar_index.scan(str(path))  # into the page cache

        def seconds(path=path) -> float:
            began = time.process_time()
            tar_index.scan(str(path))
            return (time.process_time() - began) / TIMED * 1e6

        taken = harness.in_turns({name: seconds}, rounds)[name]
        hours = np.median(taken) * SCALED / 1e6 / 3600
        rows.append((name, harness.spread(taken, ".1f", ""), f"{hours:.1f}"))
        path.unlink()
    return harness.table("headers | us a record and core | core hours of 250 million records", rows)


def many(out: pathlib.Path) -> list[str]:
    """A start with the index of many shards, as braces and as a folder."""
    folder = out / "shards"
    folder.mkdir()
    for number in range(SHARDS):
        path = folder / f"{number:05d}.tar"
        if number % LINKS:
            os.link(folder / f"{number - number % LINKS:05d}.tar", path)
        else:
            write_shard(path, 1, pax=False)
    paths = tar.shard_paths(str(folder))
    _, slots = tar_index.scan(paths[0])

    def told(todo):
        for path in todo:
            status = os.stat(path)
            yield (
                np.array([status.st_size, status.st_mtime_ns, RECORDS, 0], np.int64),
                np.repeat(slots, RECORDS),
            )

    tar_index.build(paths, scan_all=told)
    size = sum(path.stat().st_size for path in cache.folder().iterdir())
    records = SHARDS * RECORDS
    lines = [
        f"{records:,} records in {SHARDS:,} shards: {size:,} bytes in {len(list(cache.folder().iterdir()))} files, "
        f"{size / records:.2f} bytes a record; {size / records * SCALED / 1e9:.1f} GB for 250 million.",
        "",
    ]
    rows = []
    for spec in (f"wds:{folder}/{{00000..{SHARDS - 1:05d}}}.tar", f"wds:{folder}"):
        trace = out / "trace"
        words = ["strace", "-f", "-e", "trace=%file,getdents64", "-o", trace, sys.executable, "-c", START, spec]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        within = re.split(r'.*"/(?:begin|end)".*\n', trace.read_text())[1]
        listed = len(re.findall(r"getdents64\(", within))
        quick = subprocess.run([*words[6:]], capture_output=True, text=True, check=True).stdout.split()
        assert int(found[0]) == records
        rows.append((
            "braces" if "{" in spec else "folder", within.count("\n") - listed, listed, f"{float(quick[1]):.2f}",
            f"{float(quick[2]) * 1e6:.1f}", f"{float(quick[3]):.0f}", f"{float(quick[4]):.0f}",
        ))  # fmt: skip
    return lines + harness.table(
        "source | calls that name a file | reads of the folder | s | us to find a record | MB of its own | MB mapped",
        rows,
    )


def main() -> None:
    args = harness.parser(__doc__, rounds=5, out="folder for the shards, emptied at the end").parse_args()
    machine = harness.machine()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ[cache.VARIABLE] = str(args.out / "cache")
    try:
        lines = [machine, *harness.command(args), *make(args.out, args.rounds), "", *many(args.out)]
    finally:
        for name in ("shards", "cache"):
            shutil.rmtree(args.out / name, ignore_errors=True)
    harness.write(args.results / "index.md", "What the index of tar shards takes", lines)


if __name__ == "__main__":
    main()
