"""A training on a disk that is full for a while, for `test_failed_saves.py`: WORKDIR."""

import pathlib
import resource
import sys
import threading

from dalle_jax.checkpoint import manager, reader
from dalle_jax.train import loop
from tests.support import until
from tests.support.line_task import train


def main(workdir):
    """The kernel refuses files above a size during updates 7 to 9, as it refuses all on a full disk."""
    before, made = resource.getrlimit(resource.RLIMIT_FSIZE), []

    class Noted(manager.Checkpoints):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    def tried():
        at_work = {thread.name for thread in threading.enumerate()}
        return made[0]._started.done() and not at_work & {"save_finalize", manager.ORBAX_WRITER}

    loop.Checkpoints = Noted

    def full(n, state):
        if n == 7:
            until(lambda: reader.complete_steps(workdir) == [4], 60)
        if n == 9:
            until(tried, 60)
        if n in (7, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 if n == 7 else before[0], before[1]))

    train(workdir, hooks=[(1, full)], log_every=1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
