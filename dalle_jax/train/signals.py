"""SIGTERM and Ctrl-C while a run trains: noted instead of obeyed, so that the run ends after an update, saved."""

import signal
import threading


class Signals:
    """Context in which the first SIGTERM or SIGINT sets `signal`; the second one acts as usual."""

    def __init__(self):
        self.signal = 0
        self._before = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number, _frame) -> None:
        self.signal = int(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
