"""One of several processes that `test_distributed.py` starts, to lose one of them: FOLDER PORT N I WHAT WHO."""

import os
import pathlib
import signal
import sys
import time

from dalle_jax import distributed
from dalle_jax.errors import EXIT_USER_ERROR, UserError
from tests.support import processes

HANG_SECONDS = 4.0


def work(folder: pathlib.Path, count: int, rank: int, what: str, who: int) -> None:
    """Updates that are nothing but a collective, until `what` happens to process `who` in the fifth.

    With 'nothing', `who` wants to stop after the eighth; with 'stall' it never begins.
    """
    if what == "stall" and rank == who:
        (folder / "began").write_text(str(time.time()))
        time.sleep(600)
    start_seconds = HANG_SECONDS if what == "stall" else 60
    with distributed.Watchdog(HANG_SECONDS, first_seconds=60, start_seconds=start_seconds) as watchdog:
        for step in range(1, 2000):
            watchdog.beat(step, "update")
            values = [{"step": step, "rank": r, "text": "x" * step} for r in range(count)]
            assert distributed.gather_json(values[rank]) == values
            if distributed.stop_agreed(step, what == "nothing" and step == 8 and rank == who):
                print(f"stopped after {step}")
                return
            if step == 5 and rank == who:
                time.sleep(HANG_SECONDS / 4)  # five intervals, in which its place is published and its line made
                (folder / "began").write_text(str(time.time()))
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif what == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif what == "hang":
                    time.sleep(600)
                elif what == "wrong":
                    raise UserError("expected a usable record, got none")
            time.sleep(0.02)


def main(*arguments: str) -> int:
    *_, count, _, what, who = arguments
    try:
        folder, rank, _ = processes.join(*arguments, start_seconds=3 if what == "alone" else 60)
        work(folder, int(count), rank, what, int(who))
    except UserError as error:
        print(f"dalle-jax: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
