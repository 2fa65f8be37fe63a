"""Ctrl-C and SIGTERM: what is running ends, a run that can save does so first, and a second Ctrl-C ends the process.

Python runs its handlers between two instructions of the main thread, so not while that thread compiles, waits for a
device or for other threads, and it drops what a handler raises inside a callback of the garbage collector. A command
(`watch`) therefore has a thread that reads the number of each signal from a pipe, into which C writes it at once.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from dalle_jax.errors import EXIT_INTERRUPTED, say

GRACE_SECONDS = 1.0  # for files and threads to be closed after a Ctrl-C, then the process ends without
RETRY_SECONDS = 0.05  # until a Ctrl-C that was dropped comes again
_DROPPED = 0  # in the pipe, where no signal has this number

_kept: list[str] = []  # what lies on disk already, so that nothing has to be finished
_promises: list[str] = []  # what is finished before the process ends; without one it ends soon
_pipe: list[int] = []  # of a process that watches: its two ends
_ending = threading.Event()
_saying = threading.Lock()


@contextlib.contextmanager
def finishing(promise: str) -> Iterator[None]:
    """A block that notices a signal by itself and ends as it promises, in words that are said at the first signal."""
    _promises.append(promise)
    try:
        yield
    finally:
        _promises.remove(promise)


@contextlib.contextmanager
def keeping(words: str) -> Iterator[None]:
    """A block that an interrupt may end anywhere, as what it has made lies on disk: words that say so at once."""
    _kept.append(words)
    try:
        yield
    except KeyboardInterrupt:
        _say_kept()
        raise
    finally:
        if words in _kept:
            _kept.remove(words)


def _say_kept() -> None:
    """Once, whether the main thread or the one that watches comes first."""
    with _saying:
        while _kept:
            say(f"dalle-jax: {_kept.pop(0)}")


class Noted:
    """Context in which the first SIGTERM or SIGINT sets `signal` instead of ending anything; the second acts as usual.

    promise: what is finished after it, see `finishing`.
    """

    def __init__(self, promise: str):
        self.signal = 0
        self._before: dict = {}
        self._finishing = finishing(promise)

    def __enter__(self) -> "Noted":
        self._finishing.__enter__()
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        self._restore()
        self._finishing.__exit__(*error)

    def _note(self, number, _frame) -> None:
        self.signal = int(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def watch() -> None:
    """From here on Ctrl-C ends this process whatever it is doing: in GRACE_SECONDS, the second one at once."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    _pipe[:] = read, write
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    sys.unraisablehook = _on_unraisable
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()


def ending() -> bool:
    """Whether a Ctrl-C has come that nothing promised to heed: an error after it may be what a library made of it."""
    return _ending.is_set()


def end() -> None:
    """End a process that watches as interrupted, without a teardown that waits for threads, or crashes beside them."""
    if _pipe:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)


def _watch(read: int) -> None:
    asked, hurry, again = False, False, 0
    while True:
        if not select.select([read], [], [], GRACE_SECONDS if hurry else None)[0]:
            say("dalle-jax: interrupted")
            end()
        number = os.read(read, 1)[0]
        if number == _DROPPED:
            time.sleep(RETRY_SECONDS)
            again += 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        elif number == signal.SIGINT and again:
            again -= 1
        elif number == signal.SIGINT and asked:
            end()
        elif number in (signal.SIGINT, signal.SIGTERM) and not asked:  # uvicorn raises once more what ended it
            asked, hurry = True, number == signal.SIGINT and not _promises
            _say_kept()
            for promise in _promises:
                say(f"dalle-jax: {signal.Signals(number).name}: {promise}; Ctrl-C once more ends at once")


def _interrupt(number, frame) -> None:
    """Raise in the main thread, unless it imports something, where extensions in C++ crash: GRACE_SECONDS end it then.

    A handler writes nothing: it may have come in the midst of a write to the same stream.
    """
    _ending.set()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _on_unraisable(dropped) -> None:
    if dropped.exc_type is KeyboardInterrupt:
        os.write(_pipe[1], bytes([_DROPPED]))
    else:
        sys.__unraisablehook__(dropped)
