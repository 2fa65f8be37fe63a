"""The four shapes of the built-in scenes: their outlines, measures and anti-aliased coverage.

Each lies in a box [-1, 1] x [-1, 1], x to the right, y down; the measures are in units of half the box's side.
"""

import math

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")

_CIRCLE, _SQUARE = 0.95, 0.86  # a little inside the box, so that the four shapes look equally large
_STAR, _STAR_INNER = 1.05, 0.4725  # radius of the tips and of the notches; the width is then 1.997
_STAR_DROP = -0.1  # a star reaches higher above its middle than below: move it down into its box

PERIMETER = {  # of each shape, in units of the half side of its box
    "circle": 2 * math.pi * _CIRCLE,
    "square": 8 * _SQUARE,
    "triangle": 6.0,
    "star": 10 * math.hypot(_STAR - _STAR_INNER * math.cos(math.pi / 5), _STAR_INNER * math.sin(math.pi / 5)),
}
AREA = {  # of each shape, in units of the squared half side of its box
    "circle": math.pi * _CIRCLE**2,
    "square": 4 * _SQUARE**2,
    "triangle": math.sqrt(3),
    "star": 5 * _STAR * _STAR_INNER * math.sin(math.pi / 5),
}
# How far below the middle of its box the center of mass lies, in units of the box's half side.
CENTER_OF_MASS = {"circle": 0.0, "square": 0.0, "triangle": math.sqrt(3) / 6, "star": -_STAR_DROP}


def _distance(shape: str, x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    """Signed distance to the shape's outline, negative inside, in units of half the box; the box is [-1, 1] each way.

    Outside a corner the distance is to the nearest edge's line, which anti-aliasing cannot tell from the exact one.
    """
    if shape == "circle":
        return np.sqrt(x_HW * x_HW + y_HW * y_HW) - _CIRCLE
    if shape == "square":
        return np.maximum(np.abs(x_HW), np.abs(y_HW)) - _SQUARE
    if shape == "triangle":  # equilateral, side 2
        slope = math.sqrt(3) / 2
        return np.maximum(y_HW - slope, slope * np.abs(x_HW) - 0.5 * y_HW - slope / 2)
    # Five points: fold the plane onto the half sector beside a tip, where the outline is one straight line.
    y_HW = y_HW + _STAR_DROP
    sector = 2 * math.pi / 5
    angle = np.arctan2(np.abs(x_HW), -y_HW) % sector
    angle = np.minimum(angle, sector - angle)
    length = np.sqrt(x_HW * x_HW + y_HW * y_HW)
    normal_x, normal_y = _STAR - _STAR_INNER * math.cos(sector / 2), _STAR_INNER * math.sin(sector / 2)
    to_line = normal_x * length * np.sin(angle) + normal_y * (length * np.cos(angle) - _STAR)
    return to_line / math.hypot(normal_x, normal_y)


def coverage(shape: str, *, x: float, y: float, radius: float, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, anti-aliased over one pixel: float64 [len(rows), len(columns)].

    x, y, radius: center and half side of the shape's box, in pixels. columns, rows: indices of the pixels wanted.
    """
    unit_x = (columns + 0.5 - x) / radius
    unit_y = (rows + 0.5 - y) / radius
    return np.clip(0.5 - radius * _distance(shape, unit_x[None, :], unit_y[:, None]), 0.0, 1.0)
