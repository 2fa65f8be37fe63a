"""Charts as PNG files: bars, curves, and the figure of both.

Margins are fixed, as a layout engine draws everything twice. Knows nothing of what is plotted.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dalle_jax import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4  # curves beside each other
MAX_LABELS = 8  # curves of one plot that a legend can tell apart


@contextlib.contextmanager
def figure(path: pathlib.Path, *, width: float, height: float, dpi: int = 100) -> Iterator["Figure"]:
    """A Matplotlib figure to draw on, written to `path` when the block ends. width, height: in inches.

    Raises:
      OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and rarely needed
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height))
    FigureCanvasAgg(drawn)
    yield drawn
    with files.replacing(path) as aside:
        drawn.savefig(aside, dpi=dpi, format="png")


def save_bars(
    path: pathlib.Path,
    values: Mapping[str, float],
    *,
    notes: Sequence[str],
    colors: Sequence[str],
    title: str,
    unit: str,
) -> None:
    """A horizontal bar for each value, from top to bottom, with its name on the left and its note on the right.

    Raises:
      OSError: the file cannot be written.
    """
    height = 1.2 + 0.3 * len(values)
    with figure(path, width=9, height=height) as drawn:
        axes = drawn.add_axes((0.24, 0.45 / height, 0.73, 1 - 0.8 / height))
        bars = axes.barh(list(values), list(values.values()), color=list(colors))
        axes.bar_label(bars, list(notes), padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(*values.values(), 1e-9))
        axes.tick_params(labelsize=8)
        axes.set_xlabel(unit, fontsize=8)
        axes.set_title(title, fontsize=9)


def save_curves(path: pathlib.Path, plots: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """A small plot for each title, with a curve through the (x, y) points of each label.

    Raises:
      OSError: the file cannot be written.
    """
    rows = math.ceil(len(plots) / COLUMNS)
    with figure(path, width=4 * COLUMNS, height=3 * rows, dpi=80) as drawn:
        drawn.subplots_adjust(0.04, 0.1 / rows, 0.99, 1 - 0.1 / rows, wspace=0.2, hspace=0.3)
        for index, (title, curves) in enumerate(plots.items(), 1):
            axes = drawn.add_subplot(rows, COLUMNS, index)
            for label, points in curves.items():
                x, y = zip(*sorted(points), strict=True)
                axes.plot(x, y, label=label, marker="." if len(points) < 30 else None)
            axes.set_title(title, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.locator_params(nbins=4)
            if 1 < len(curves) <= MAX_LABELS:
                axes.legend(fontsize=7)
