"""`dalle-jax index SOURCE`: find the records of tar shards once, with all processors, before a pod needs them.

Without it the first use of a source does the same work in one process. Several machines share the work by `--part` and
a common cache folder; the command can be killed and given again, and looks only at shards that are new or have changed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import numpy as np
import tqdm

from dalle_jax.data.share import Share
from dalle_jax.data.sources import cache, tar, tar_index
from dalle_jax.errors import UserError, check_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `main`."""
    parser.add_argument("source", help="wds:PATTERN, as it will be trained on")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="do the I-th of N parts (default: %(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="how many read shards (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line (default: no)")


def main(args: argparse.Namespace) -> int:
    """Indexes what is not indexed yet and prints one line.

    Raises:
      UserError: a source or option that is wrong, a shard that is not there, or a cache folder that cannot be written.
    """
    check_number("--processes", args.processes, min=1, max=1024, whole=True)
    share = Share.of_option(args.part)
    kind, _, place = args.source.partition(":")
    if kind != "wds" or not place:
        raise UserError(f"expected tar shards as wds:PATTERN, got {args.source!r}: other sources need no index")
    paths = tar.shard_paths(place)
    began, scanned = time.monotonic(), 0
    mine: list[np.ndarray] = []
    context = multiprocessing.get_context("spawn")  # no copy of a process with threads
    pool = futures.ProcessPoolExecutor(args.processes, context, _begin_worker)
    try:
        with tqdm.tqdm(unit=" shards", disable=None, file=sys.stderr) as bar:

            def scan_all(todo: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
                nonlocal scanned
                for facts, slots in pool.map(tar_index.scan, todo, chunksize=max(1, len(todo) // (8 * args.processes))):
                    scanned += len(slots)
                    bar.update()
                    yield facts, slots

            facts = tar_index.build(paths, scan_all=scan_all, share=share, done=mine.append)
    except BaseException:  # Ctrl-C too, which the processes do not hear
        threading.excepthook = lambda _: None  # the pool's thread trips over cancelled futures (Python 3.11)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    seconds = time.monotonic() - began
    summary = {
        "source": args.source,
        "cache": str(cache.folder()),
        "source_shards": len(paths),
        "shards": sum(len(table) for table in mine),
        "records": int(sum(table[:, 2].sum() for table in mine)),
        "complete": facts is not None,
        "now": {"records": scanned, "seconds": seconds},
    }
    print(json.dumps(summary) if args.json else _line(summary))
    return 0


def _begin_worker() -> None:
    """Make this process of the pool leave Ctrl-C to its parent, and end with it however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process after its parent: a queue that it could fill itself would keep it waiting."""
    parent.join()
    os._exit(1)


def _line(summary: dict) -> str:
    now = summary["now"]
    rest = "complete" if summary["complete"] else "other parts are not finished"
    return (
        f"{summary['source']}: {summary['shards']} of {summary['source_shards']} shards with {summary['records']} "
        f"records in the index in {summary['cache']}; {now['records']} records now in {now['seconds']:.1f} s; {rest}"
    )
