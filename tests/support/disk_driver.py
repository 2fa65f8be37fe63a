"""One of two processes that `test_distributed.py` trains on disks that are full for a while: FOLDER PORT N I."""

import io
import json
import pathlib
import re
import resource
import sys
import threading
import time

from dalle_jax import distributed
from dalle_jax.checkpoint import digest, reader
from dalle_jax.mesh import make_mesh
from tests.support import line_task, processes

LIMITS = {  # update -> process and the longest file that it can write from there on: checkpoints are due at 4, 8 ... 20
    7: (1, 64),  # a part of a checkpoint, in the background
    9: (1, resource.RLIM_INFINITY),
    15: (0, 0),  # nothing at all, where folders are made
    17: (0, resource.RLIM_INFINITY),
}


def main(folder: pathlib.Path, rank: int) -> None:
    def full(n, state):
        who, size = LIMITS.get(n, (None, 0))
        if who == rank:
            while any(thread.name == "async_save" for thread in threading.enumerate()):
                time.sleep(0.02)  # whatever is being written
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    read, hashed = digest._hash, set()
    digest._hash = lambda path: hashed.update(re.findall(r"ocdbt.process_(\d)/d/", str(path))) or read(path)
    said, sys.stderr = sys.stderr, io.StringIO()  # a full disk has no room for a log either
    with distributed.Watchdog(20.0, first_seconds=60) as watchdog:
        result = line_task.train(
            folder / "run",
            mesh=make_mesh({"fsdp": -1}),
            hooks=[(1, full)],
            of_loop={"beat": watchdog.beat},
            steps=20,
        )
    said.write(sys.stderr.getvalue())
    newest = reader.checkpoint_path(folder / "run")[1]
    found = {"step": result.step, "checkpoints": reader.complete_steps(folder / "run"), "hashed": sorted(hashed)}
    found["listed"] = len(json.loads((newest / digest.MANIFEST).read_text()))
    found["files"] = len(list(digest._files(newest)))
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*processes.join(*sys.argv[1:])[:2])
