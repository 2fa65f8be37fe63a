"""Images that were answered with a `url`: in memory for an hour, under names that cannot be guessed."""

import collections
import secrets
import time
from collections.abc import Callable

LIFE_SECONDS = 3600  # OpenAI's urls are valid for 60 minutes
MAX_BYTES = 256 * 2**20


class ImageStore:
    """PNG files by name. Bounded: when it is full, the oldest go before their time. Not thread-safe."""

    def __init__(self, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic):
        self._files: collections.OrderedDict[str, tuple[float, bytes]] = collections.OrderedDict()
        self._bytes, self._max_bytes, self._clock = 0, max_bytes, clock

    def add(self, png: bytes) -> str:
        """Keep a file and return its name."""
        name = secrets.token_urlsafe(24)
        self._files[name] = self._clock() + LIFE_SECONDS, png
        self._bytes += len(png)
        self._drop()
        return name

    def get(self, name: str) -> bytes | None:
        self._drop()
        return self._files.get(name, (0.0, None))[1]

    def _drop(self) -> None:
        while self._files:
            name, (expires, png) = next(iter(self._files.items()))
            if self._bytes <= self._max_bytes and expires > self._clock():
                return
            del self._files[name]
            self._bytes -= len(png)
