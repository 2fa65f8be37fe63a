"""What a traced update's time goes into, by kind of operation: a picture of a trace that `--profile` has written.

Knows the trace's format (`jax.profiler.ProfileData`) and how XLA's backends name operations; nothing of the model.
XProf, on the same trace, says which line of the model each one belongs to.
"""

import pathlib
from collections.abc import Iterable

import jax

from dalle_jax.pictures import plot

# What an operation's name contains -> its kind, the first that fits. Fusions are named after what they hold.
MARKS = {
    "exchange": ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective", "send", "recv"),
    "products": ("dot", "convolution", "cudnn-conv", "gemm", "matmul", "ynn", "onednn"),
    "kernels": ("custom-call", "custom_call", "pallas", "triton", "mosaic"),
    "copies": ("copy", "transpose", "memcpy"),
}
REST, IDLE = "everything else", "nothing runs"
KINDS = (*MARKS, REST, IDLE)
_WORDS = {
    "exchange": "exchange between devices",
    "products": "matrix products, convolutions",
    "kernels": "own kernels",
    "copies": "copies, transposes",
    REST: "norms, softmax, optimizer, ...",
    IDLE: "nothing runs",
}
_HOLDERS = ("while", "call", "conditional")  # their time is that of what runs inside


def seconds_by_kind(events: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds by kind, which add up to the time from the first operation's start to the last one's end.

    events: name, start and duration in nanoseconds of every operation of one device. Where several run at once the
    time in which anything runs is shared out by their durations.
    """
    found = sorted((start, start + duration, kind) for name, start, duration in events if (kind := kind_of(name)))
    if not found:
        raise ValueError("no operation of a device is in it")
    summed, busy, until = dict.fromkeys(KINDS, 0.0), 0.0, found[0][0]
    for start, end, kind in found:
        summed[kind] += end - start
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    scale = busy / max(sum(summed.values()), 1e-9)
    summed = {kind: scale * total for kind, total in summed.items()} | {IDLE: until - found[0][0] - busy}
    return {kind: total / 1e9 for kind, total in summed.items()}


def kind_of(name: str) -> str | None:
    """Of an operation by its name in HLO; None of one that only holds others."""
    name = name.lower()
    if name.partition(".")[0] in _HOLDERS:
        return None
    return next((kind for kind, marks in MARKS.items() if any(mark in name for mark in marks)), REST)


def draw(trace: pathlib.Path, path: pathlib.Path) -> None:
    """A bar for each kind, in milliseconds of an update and per cent. trace: a folder of traces; the newest is read.

    Raises:
      OSError: the disk is full. ValueError: no operation, or no update, is in the trace.
    """
    seconds, updates = _read(max(trace.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime))
    total = sum(seconds.values())
    plot.save_bars(
        path,
        {_WORDS[kind]: 1e3 * seconds[kind] / updates for kind in KINDS},
        notes=[f"{1e3 * seconds[kind] / updates:,.4g} ms, {seconds[kind] / total:.1%}" for kind in KINDS],
        colors=["#bbbbbb" if kind == IDLE else "#1f77b4" for kind in KINDS],
        title=f"{updates} traced updates of {1e3 * total / updates:,.4g} ms, first device",
        unit="milliseconds of an update",
    )


def _read(file: pathlib.Path) -> tuple[dict[str, float], int]:
    """Seconds by kind on the first device that has any, and how many updates were traced."""
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes}
    updates, events = set(), {}
    for name, plane in planes.items():
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name == "update" and "step_num" in stats:
                    updates.add(stats["step_num"])
                if "hlo_op" in stats:
                    events.setdefault(name, []).append((stats["hlo_op"], event.start_ns, event.duration_ns))
    if not updates or not events:
        raise ValueError("no update, or no operation of a device, is in it")
    return seconds_by_kind(events[min(events)]), len(updates)
