"""What a run writes for people: metrics.jsonl, TensorBoard events, curves.png and sheets of pictures.

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
from PIL import Image

from dalle_jax.checkpoint.format import write_file

COLUMNS = 8  # pictures a row where the task does not say
LEAST_SIDE = 96  # smaller pictures are enlarged by a whole factor, in pixels
GAP = 2  # pixels between pictures
MOST_LABELS = 8  # curves of one plot that a legend can tell apart


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
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

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
    """The lines of a metrics.jsonl; one that a crash or a full disk cut off is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def save_curves(metrics_path: pathlib.Path, path: pathlib.Path) -> None:
    """One small plot a metric over the updates, training and validation, and all entries of an array, in the same."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed only here
    from matplotlib.figure import Figure

    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in read(metrics_path):
        for name, value in line.items():
            kind, _, metric = name.partition("/")
            metric, _, entry = metric.partition("/")
            if metric:
                label = f"{kind} {entry}".strip()
                series.setdefault(metric, {}).setdefault(label, []).append((line["step"], value))
    if not series:
        return
    rows = math.ceil(len(series) / 4)
    figure = Figure(figsize=(16, 3 * rows))  # fixed margins: a layout engine draws everything twice
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.04, 0.3 / rows / 3, 0.99, 1 - 0.3 / rows / 3, wspace=0.2, hspace=0.3)
    for index, (metric, kinds) in enumerate(sorted(series.items())):
        axes = figure.add_subplot(rows, 4, index + 1)
        for kind, points in sorted(kinds.items()):
            axes.plot(*zip(*sorted(points), strict=True), label=kind, marker="." if len(points) < 30 else None)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=4)
        if 1 < len(kinds) <= MOST_LABELS:
            axes.legend(fontsize=7)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=80, format="png")
    aside.replace(path)


def sheet(pictures: np.ndarray) -> Image.Image:
    """uint8 [N, H, W, 3] in rows of eight, or [rows, columns, H, W, 3], as one picture on white."""
    pictures = np.asarray(pictures)
    grid = (
        list(pictures)
        if pictures.ndim == 5
        else [pictures[start : start + COLUMNS] for start in range(0, len(pictures), COLUMNS)]
    )
    height, width = pictures.shape[-3:-1]
    factor = max(1, LEAST_SIDE // max(height, width))
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    size = (max(len(row) for row in grid) * cell_width + GAP, len(grid) * cell_height + GAP)
    page = Image.new("RGB", size, "white")
    for r, row in enumerate(grid):
        for c, picture in enumerate(row):
            cell = Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            page.paste(cell, (GAP + c * cell_width, GAP + r * cell_height))
    return page
