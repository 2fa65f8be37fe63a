"""The judge of the built-in scenes: whether a picture shows its caption, decided from the pixels alone.

The rules, fixed before any model was tuned on them:
  1. Foreground is what differs from white by more than FOREGROUND; its 4-connected pieces of at least SPECK of the
     picture are the objects. There must be as many as the caption says, and everything else that is not white (smaller
     pieces, pale stains, away from the objects' soft edges) must add up to less than DIRT.
  2. An object's color is the nearest of the six, within COLOR_REACH, to the median of its inner half: the pixels
     furthest from white. At least ONE_COLORED of all its pixels must be that color or a mixture of it with white, as
     an edge is. Otherwise it is two-colored.
  3. An object's shape is the one of the four whose outline fits best when it is drawn, by the code that draws the
     scenes, with the same area and center of mass. The misfit is the area where the two differ, in soft coverage, over
     the length of the outline: how far the outlines are apart on average. It must be at most OUTLINE, and the overlap
     (intersection over union) at least OVERLAP. A bare threshold on the overlap would ask far more of a small star
     than of a large circle.
  4. An object's size is large if the box of that shape with that area has a half side above LARGE; it must be within
     BEYOND times of the sizes that are drawn, so that a picture filled with red is no red square.
  5. The relation is along the axis in which the centers of mass differ more.
What the caption leaves open, an unnamed size or the place, is not judged. Distances of colors are Euclidean, RGB in
[0, 1].
"""

import dataclasses
import math

import numpy as np
from scipy import ndimage

from dalle_jax.data.sources.scenes import COLORS, RADIUS, Object, Scene
from dalle_jax.data.sources.shapes import AREA, CENTER_OF_MASS, PERIMETER, SHAPES, coverage

FOREGROUND = 0.4  # a pixel covered by two fifths; every color is at 0.87 or more from white
PALE = 0.25  # less than this is white: noise, or the faint halo of a decoder
SPECK = 0.006  # of the picture: 6 pixels at 32; the smallest object, a small star, covers 31
DIRT = 0.02  # of the picture: 20 pixels at 32, two thirds of the smallest object
HALO = 1 / 32  # of the side: how far the soft edge of an object reaches
COLOR_REACH = 0.30
ONE_COLORED = 0.80
OFF_COLOR = 0.20  # from the line between white and the color; the colors are at least 0.28 from each other's lines
OUTLINE = 0.018  # of the side: 0.6 pixels at 32
OVERLAP = 0.60
LARGE = (RADIUS["small"][1] + RADIUS["large"][0]) / 2
BEYOND = 1.4

_PALETTE = {name: np.array(value) / 255 for name, value in COLORS.items()}


@dataclasses.dataclass(frozen=True)
class Detected:
    """An object in a picture; lengths in fractions of the side."""

    shape: str | None  # None if no shape fits
    color: str | None  # None if it is none of the six
    one_colored: bool
    x: float  # center of mass
    y: float
    radius: float  # half side of its box
    misfit: float  # mean distance of its outline from that of the best shape

    @property
    def size(self) -> str | None:
        """'small' or 'large'; None if far from both."""
        if not RADIUS["small"][0] / BEYOND <= self.radius <= RADIUS["large"][1] * BEYOND:
            return None
        return "large" if self.radius > LARGE else "small"


def detect(image_uint8: np.ndarray) -> tuple[list[Detected], float]:
    """The objects of a square picture uint8 [H, W, 3], and the share of it that is neither white nor an object."""
    image_uint8 = np.asarray(image_uint8)
    if image_uint8.dtype != np.uint8 or image_uint8.ndim != 3 or image_uint8.shape[2] != 3:
        raise ValueError(f"expected a uint8 picture [H, W, 3], got {image_uint8.dtype} {image_uint8.shape}")
    if image_uint8.shape[0] != image_uint8.shape[1]:
        raise ValueError(f"expected a square picture, got {image_uint8.shape[0]} x {image_uint8.shape[1]}")
    side = image_uint8.shape[0]
    image_unit = image_uint8 / 255
    from_white_HW = np.linalg.norm(1 - image_unit, axis=-1)
    pieces_HW, count = ndimage.label(from_white_HW > FOREGROUND)
    areas = np.bincount(pieces_HW.ravel(), minlength=count + 1)
    kept = [i for i in range(1, count + 1) if areas[i] >= SPECK * side * side]
    reach = max(1, round(HALO * side))
    kept_HW = np.isin(pieces_HW, kept)
    objects = [_measure(image_unit, pieces_HW == i, kept_HW & (pieces_HW != i), reach=reach) for i in kept]
    near_HW = ndimage.binary_dilation(kept_HW, _DISC, iterations=reach)
    dirt = np.count_nonzero((from_white_HW > PALE) & ~near_HW) / side**2
    return objects, dirt


_DISC = np.ones((3, 3), bool)  # diagonal neighbors included


def _measure(image_unit: np.ndarray, mask_HW: np.ndarray, others_HW: np.ndarray, *, reach: int) -> Detected:
    """One connected piece of the foreground, measured with its soft edge but without the other objects."""
    side = len(mask_HW)
    rows, columns = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
    top, left = max(0, rows[0] - reach), max(0, columns[0] - reach)
    part = slice(top, rows[-1] + 1 + reach), slice(left, columns[-1] + 1 + reach)
    pixels_HWC, piece_HW = image_unit[part], mask_HW[part]

    inside_XC = pixels_HWC[piece_HW]
    from_white_X = np.linalg.norm(1 - inside_XC, axis=-1)
    median = np.median(inside_XC[from_white_X >= np.median(from_white_X)], axis=0)
    color = min(_PALETTE, key=lambda name: np.linalg.norm(median - _PALETTE[name]))
    ink = 1 - _PALETTE[color]
    share_HW = np.clip((1 - pixels_HWC) @ ink / (ink @ ink), 0, 1)  # of white turned into the color: soft coverage
    residual_HW = np.linalg.norm(1 - share_HW[..., None] * ink - pixels_HWC, axis=-1)
    one_colored = np.mean(residual_HW[piece_HW] <= OFF_COLOR) >= ONE_COLORED

    soft_HW = share_HW * (ndimage.binary_dilation(piece_HW, _DISC, iterations=reach) & ~others_HW[part])
    height, width = soft_HW.shape
    area = soft_HW.sum()
    y = (soft_HW.sum(1) @ (np.arange(height) + 0.5)) / area
    x = (soft_HW.sum(0) @ (np.arange(width) + 0.5)) / area
    fits = {shape: _fit(soft_HW, shape, x=x, y=y, radius=math.sqrt(area / AREA[shape])) for shape in SHAPES}
    shape = min(fits, key=lambda name: fits[name][0])
    misfit, overlap = fits[shape][0] / side, fits[shape][1]
    return Detected(
        shape=shape if misfit <= OUTLINE and overlap >= OVERLAP else None,
        color=color if np.linalg.norm(median - _PALETTE[color]) <= COLOR_REACH else None,
        one_colored=bool(one_colored),
        x=(left + x) / side,
        y=(top + y) / side,
        radius=math.sqrt(area / AREA[shape]) / side,
        misfit=misfit,
    )


def _fit(soft_HW: np.ndarray, shape: str, *, x: float, y: float, radius: float) -> tuple[float, float]:
    """Mean distance of the outlines, in pixels, and overlap of soft coverage with the shape about the same center.

    The frame is the box of the piece; what the drawn shape covers outside of it counts as differing.
    """
    height, width = soft_HW.shape
    y = y - CENTER_OF_MASS[shape] * radius
    drawn_HW = coverage(shape, x=x, y=y, radius=radius, columns=np.arange(width), rows=np.arange(height))
    area, common = soft_HW.sum(), np.minimum(soft_HW, drawn_HW).sum()  # the shape as drawn has the same area
    return float(2 * (area - common) / (PERIMETER[shape] * radius)), float(common / (2 * area - common))


def _difference(found: Detected, expected: Object) -> str:
    """The fault of an object, '' if it is what the caption says."""
    if found.color is None:
        return f"an object of none of the colors instead of {expected}"
    if not found.one_colored:
        return f"an object of two colors instead of {expected}"
    if found.shape is None:
        return f"something of no clear shape instead of {expected} (outline off by {found.misfit:.1%} of the side)"
    if found.size is None:
        return f"a {found.color} {found.shape} of no size ({2 * found.radius:.0%} of the side) instead of {expected}"
    right = found.shape == expected.shape and found.color == expected.color and expected.size in (None, found.size)
    return "" if right else f"a {found.size} {found.color} {found.shape} instead of {expected}"


def fault(image_uint8: np.ndarray, scene: Scene) -> str:
    """The first rule that a picture uint8 [H, W, 3] of this scene breaks, in words; '' if the picture shows the scene.

    Raises:
      ValueError: not a square uint8 picture with three channels.
    """
    objects, dirt = detect(image_uint8)
    if len(objects) != len(scene.objects):
        return f"{len(objects)} objects instead of {len(scene.objects)}"
    if dirt > DIRT:
        return f"{dirt:.1%} of the picture is neither white nor an object"
    if scene.relation is not None:
        right, down = objects[1].x - objects[0].x, objects[1].y - objects[0].y
        if (abs(down) > abs(right)) != (scene.relation in ("above", "below")):
            where = "one above the other" if abs(down) > abs(right) else "side by side"
            return f"the objects are {where}, not {scene.relation}"
        first_is_lower = (down if abs(down) > abs(right) else right) < 0
        if first_is_lower != (scene.relation in ("below", "right of")):
            objects = objects[::-1]
    faults = [_difference(found, expected) for found, expected in zip(objects, scene.objects, strict=True)]
    return "; ".join(filter(None, faults))


def accuracy(images_uint8: np.ndarray, scenes: list[Scene]) -> float:
    """The share of the pictures uint8 [B, H, W, 3] that show their scenes."""
    return float(np.mean([not fault(image, scene) for image, scene in zip(images_uint8, scenes, strict=True)]))
