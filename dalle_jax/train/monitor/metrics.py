"""The numbers of a run as files for people: metrics.jsonl, TensorBoard events, and curves.png.

Only the first process writes. Names are 'train/...' and 'validation/...'. Knows nothing of what is measured.
"""

import contextlib
import json
import math
import pathlib
import threading
from collections.abc import Mapping

import jax
import numpy as np
import tensorboardX

from dalle_jax import files
from dalle_jax.pictures import plot


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard. What an earlier run wrote beyond `step` is forgotten."""

    def __init__(self, workdir: pathlib.Path, *, step: int):
        self.path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        if self._active:
            self.rewind(step)
            before = _board_threads()
            self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1, flush_secs=30)
            self._writers = _board_threads() - before

    def rewind(self, step: int) -> None:
        """Forget the lines beyond `step`; TensorBoard shows the later ones that are written again."""
        if self._active:
            kept = [line for line in read(self.path) if line["step"] <= step]
            files.write(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line {"step": step, ...}; values that are not finite are left out.

        Raises:
          OSError: the disk is full.
        """
        if not self._active:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._board_lives():
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        if self._active and self._board_lives():
            with contextlib.suppress(OSError):
                self._board.close()

    def _board_lives(self) -> bool:
        """TensorBoard's thread dies of a full disk, and after that its queue blocks whoever writes."""
        return all(thread.is_alive() for thread in self._writers)


def _board_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboardX")}


def scalars(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The numbers of an update by name; entry i of an array, in row-major order, is called 'name/i'."""
    values = {}
    for name, value in measured.items():
        if np.ndim(value):
            values |= {f"{name}/{index:03d}": float(entry) for index, entry in enumerate(np.ravel(value))}
        else:
            values[name] = float(value)
    return values


def read(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, but for those that are no object of numbers with a step: a crash or a full disk
    cut them off, or somebody else wrote them."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line and all(isinstance(v, int | float) for v in line.values()):
                lines.append(line)
    return lines


def save_curves(metrics_path: pathlib.Path, path: pathlib.Path) -> None:
    """One small plot a metric over the updates, training and validation, and all entries of an array, in the same."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in read(metrics_path):
        for name, value in line.items():
            kind, _, metric = name.partition("/")
            metric, _, entry = metric.partition("/")
            if metric:
                label = f"{kind} {entry}".strip()
                series.setdefault(metric, {}).setdefault(label, []).append((line["step"], value))
    if not series:
        return
    plot.save_curves(path, {metric: dict(sorted(kinds.items())) for metric, kinds in sorted(series.items())})
