"""The processes of one job: with a single one, nothing to agree on and nobody to watch."""


class Watchdog:
    """Ends the job when a process is silent for too long; with a single process it does nothing."""

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_) -> None:
        pass

    def beat(self, step: int, phase: str) -> None:
        """Says that this process is alive, and where."""


def stop_agreed(step: int, wants_stop: bool) -> bool:
    """Is this the step after which all processes stop? Alone: `wants_stop`."""
    del step
    return wants_stop
