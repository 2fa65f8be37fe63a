"""The time of a run by kind, over all its starts: a ledger in WORKDIR/goodput.json, and goodput.png of it.

Goodput is the share of `step` in everything but `look`, which was asked for and is neither gain nor loss. The first
process writes, atomically, with every checkpoint and every few seconds; what a `kill -9` cuts off after that counts as
`down`.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dalle_jax import files
from dalle_jax.pictures import plot

FILE, PICTURE = "goodput.json", "goodput.png"
KINDS = {
    "init": "start, data, restore",  # until the first update of this process
    "compile": "the first update",
    "step": "updates that count",
    "data": "data stall",  # the device had nothing to do because the next batch was not there
    "checkpoint": "the loop waited",
    "look": "validation, pictures",  # and beginning and writing a profile
    "sample": "samples, scores",  # what hooks make
    "lost": "updates made again",  # after a restart or a rollback
    "down": "between starts",  # from the last sign of life of a process that died
}
WRITE_EVERY = 10.0  # seconds
# Colors in the picture, in which gain, what was asked for and loss differ.
_COLORS = {"step": "#2a7e43", "look": "#7f8fa6"} | dict.fromkeys(("lost", "down"), "#b3362b")
_OTHER = "#d9902f"


class Ledger:
    """A clock that books its seconds on one kind at a time; begins with `init`."""

    def __init__(self, workdir: pathlib.Path):
        self._path, self._active = workdir / FILE, jax.process_index() == 0
        before = read(workdir) or {}
        self.seconds: dict[str, float] = {k: before.get("seconds", {}).get(k, 0.0) for k in KINDS}
        self.starts: int = before.get("starts", 0) + 1
        # Checkpoint -> seconds of `step` up to it. A restart from it loses the ones after.
        marks = before.get("marks", {"0": 0.0})
        self._marks: dict[int, float] = {int(step): s for step, s in marks.items() if step.isdecimal()}
        if before and not before["ended"]:
            self.seconds["down"] += max(0.0, time.time() - before["time"])
        self._kind, self._since, self._written = "init", time.monotonic(), 0.0
        self.write()

    def enter(self, kind: str) -> None:
        """Book what follows on `kind`."""
        now = time.monotonic()
        self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Book the time inside on `kind`, then go back to the kind before."""
        before = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, kind: str, seconds: float) -> None:
        """Book seconds that have just passed on `kind` instead of the one that is running."""
        self.enter(self._kind)
        self.seconds[self._kind] -= seconds
        self.seconds[kind] += seconds

    def saved(self, step: int) -> None:
        """A checkpoint of this update is on its way: what came before is safe."""
        self.enter(self._kind)
        self._marks[step] = self.seconds["step"]
        self.write()

    def restored(self, step: int) -> None:
        """The run goes on from this checkpoint: updates after it are lost."""
        self.enter(self._kind)
        self._marks = {mark: seconds for mark, seconds in self._marks.items() if mark <= step}
        if step in self._marks:
            lost = self.seconds["step"] - self._marks[step]
            self.seconds["step"] -= lost
            self.seconds["lost"] += lost

    def tick(self) -> None:
        """Write the file if that was long ago."""
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def write(self, *, ended: bool = False) -> None:
        """Write the file; a full disk is no reason to stop.

        ended: on purpose, so the time until the next start is not lost.
        """
        if not self._active:
            return
        self.enter(self._kind)
        self._written = time.monotonic()
        content = {
            "goodput": share(self.seconds),
            "starts": self.starts,
            "seconds": {kind: round(seconds, 3) for kind, seconds in self.seconds.items()},
            "marks": {str(step): round(seconds, 3) for step, seconds in self._marks.items()},
            "ended": ended,
            "time": time.time(),
        }
        with contextlib.suppress(OSError):
            files.write(self._path, json.dumps(content, indent=1) + "\n")


def share(seconds: Mapping[str, float]) -> float:
    """Goodput, 0 .. 1: seconds of updates that count in all seconds but those of looking."""
    return seconds["step"] / max(sum(seconds.values()) - seconds["look"], 1e-9)


def draw(ledger: Ledger, *, updates: int, path: pathlib.Path) -> None:
    """A bar for each kind of time, in seconds and percent of all of it. updates: that count, of all starts.

    Raises:
      OSError: the disk is full.
    """
    seconds = {kind: ledger.seconds[kind] for kind in KINDS}
    total = max(sum(seconds.values()), 1e-9)
    each = f", {seconds['step'] / updates:.3g} s each" if updates else ""
    starts = f"{ledger.starts} start{'s' * (ledger.starts > 1)}"
    plot.save_bars(
        path,
        {f"{kind}: {words}": seconds[kind] for kind, words in KINDS.items()},
        notes=[f"{s:,.1f} s, {s / total:.1%}" for s in seconds.values()],
        colors=[_COLORS.get(kind, _OTHER) for kind in KINDS],
        title=f"goodput {share(seconds):.1%} over {starts}: {updates:,} updates{each}",
        unit="seconds",
    )


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The ledger of a workdir, None where there is none or it cannot be read: it is a report, not a part of the run."""
    try:
        content = json.loads((workdir / FILE).read_text())
        numbers = {key: float(content[key]) for key in ("goodput", "time")} | {"starts": int(content["starts"])}
        tables = {key: {name: float(s) for name, s in content[key].items()} for key in ("seconds", "marks")}
        return numbers | tables | {"ended": bool(content["ended"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
