"""Does a picture show its caption? Decided from the pixels alone, for the built-in scenes.

The rules, fixed before any model was tuned on them:
  1. Foreground is what differs from white by more than FOREGROUND; its 4-connected pieces of at least SPECK of the
     picture are the objects. There must be as many as the caption says, and what else is not white (smaller pieces,
     pale stains, away from the objects' soft edges) must add up to less than DIRT.
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
What the caption leaves open, an unnamed size or the place, is free. Distances of colors are Euclidean, RGB in [0, 1].
"""

import dataclasses
import math

import numpy as np
from scipy import ndimage

from dalle_jax.data.sources.scenes import COLORS, RADIUS, Object, Scene, parse
from dalle_jax.data.sources.shapes import AREA, CENTER_OF_MASS, PERIMETER, SHAPES, coverage

__all__ = ["Seen", "Verdict", "accuracy", "look", "parse", "shows"]

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
class Verdict:
    """Whether the picture shows the caption, and the first rule that it breaks ('' if none)."""

    ok: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object as found. x, y: center of mass; radius: half side of its box; all in fractions of the side.

    color is None where it is none of the six, shape where no shape fits.
    misfit: mean distance of its outline from that of the best shape.
    """

    shape: str | None
    color: str | None
    one_colored: bool
    x: float
    y: float
    radius: float
    misfit: float

    @property
    def size(self) -> str | None:
        """'small' or 'large'; None if far from both."""
        if not RADIUS["small"][0] / BEYOND <= self.radius <= RADIUS["large"][1] * BEYOND:
            return None
        return "large" if self.radius > LARGE else "small"


def look(image_uint8: np.ndarray) -> tuple[list[Seen], float]:
    """The objects of a square picture uint8 [S, S, 3], and the share of it that is neither white nor an object."""
    image_uint8 = np.asarray(image_uint8)
    if image_uint8.dtype != np.uint8 or image_uint8.ndim != 3 or image_uint8.shape[2] != 3:
        raise ValueError(f"expected a uint8 picture [S, S, 3], got {image_uint8.dtype} {image_uint8.shape}")
    if image_uint8.shape[0] != image_uint8.shape[1]:
        raise ValueError(f"expected a square picture, got {image_uint8.shape[0]} x {image_uint8.shape[1]}")
    side = image_uint8.shape[0]
    image_unit = image_uint8 / 255
    from_white_SS = np.linalg.norm(1 - image_unit, axis=-1)
    pieces_SS, count = ndimage.label(from_white_SS > FOREGROUND)
    areas = np.bincount(pieces_SS.ravel(), minlength=count + 1)
    kept = [i for i in range(1, count + 1) if areas[i] >= SPECK * side * side]
    reach = max(1, round(HALO * side))
    kept_SS = np.isin(pieces_SS, kept)
    objects = [_describe(image_unit, pieces_SS == i, kept_SS & (pieces_SS != i), reach=reach) for i in kept]
    near_SS = ndimage.binary_dilation(kept_SS, _DISC, iterations=reach)
    dirt = np.count_nonzero((from_white_SS > PALE) & ~near_SS) / side**2
    return objects, dirt


_DISC = np.ones((3, 3), bool)  # diagonal neighbours included


def _describe(image_unit: np.ndarray, piece_SS: np.ndarray, others_SS: np.ndarray, *, reach: int) -> Seen:
    """Measures one connected piece bool [S, S] of the foreground, with its soft edge but without the other objects."""
    side = len(piece_SS)
    rows, columns = (np.flatnonzero(piece_SS.any(axis)) for axis in (1, 0))
    top, left = max(0, rows[0] - reach), max(0, columns[0] - reach)
    part = slice(top, rows[-1] + 1 + reach), slice(left, columns[-1] + 1 + reach)
    pixels_HWC, piece_HW = image_unit[part], piece_SS[part]

    inside_NC = pixels_HWC[piece_HW]
    from_white_N = np.linalg.norm(1 - inside_NC, axis=-1)
    median = np.median(inside_NC[from_white_N >= np.median(from_white_N)], axis=0)
    color = min(_PALETTE, key=lambda name: np.linalg.norm(median - _PALETTE[name]))
    ink = 1 - _PALETTE[color]
    share_HW = np.clip((1 - pixels_HWC) @ ink / (ink @ ink), 0, 1)  # of white turned into the color: soft coverage
    residual_HW = np.linalg.norm(1 - share_HW[..., None] * ink - pixels_HWC, axis=-1)
    one_colored = np.mean(residual_HW[piece_HW] <= OFF_COLOR) >= ONE_COLORED

    soft_HW = share_HW * (ndimage.binary_dilation(piece_HW, _DISC, iterations=reach) & ~others_SS[part])
    height, width = soft_HW.shape
    area = soft_HW.sum()
    y = (soft_HW.sum(1) @ (np.arange(height) + 0.5)) / area
    x = (soft_HW.sum(0) @ (np.arange(width) + 0.5)) / area
    fits = {shape: _fit(soft_HW, shape, x=x, y=y, radius=math.sqrt(area / AREA[shape])) for shape in SHAPES}
    shape = min(fits, key=lambda name: fits[name][0])
    misfit, overlap = fits[shape][0] / side, fits[shape][1]
    return Seen(
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

    The frame is the piece's own box; what the drawn shape covers outside of it counts as differing.
    """
    height, width = soft_HW.shape
    y = y - CENTER_OF_MASS[shape] * radius
    drawn_HW = coverage(shape, x=x, y=y, radius=radius, columns=np.arange(width), rows=np.arange(height))
    area, common = soft_HW.sum(), np.minimum(soft_HW, drawn_HW).sum()  # the shape as drawn has the same area
    return float(2 * (area - common) / (PERIMETER[shape] * radius)), float(common / (2 * area - common))


def _difference(seen: Seen, said: Object) -> str:
    """What is wrong with an object: '' if it is what the caption says."""
    if seen.color is None:
        return f"an object of none of the colors instead of {said}"
    if not seen.one_colored:
        return f"an object of two colors instead of {said}"
    if seen.shape is None:
        return f"something of no clear shape instead of {said} (outline off by {seen.misfit:.1%} of the side)"
    if seen.size is None:
        return f"a {seen.color} {seen.shape} of no size ({2 * seen.radius:.0%} of the side) instead of {said}"
    right = seen.shape == said.shape and seen.color == said.color and said.size in (None, seen.size)
    return "" if right else f"a {seen.size} {seen.color} {seen.shape} instead of {said}"


def shows(image_uint8: np.ndarray, scene: Scene) -> Verdict:
    """Whether a picture uint8 [S, S, 3] shows the scene.

    Raises:
      ValueError: not a square uint8 picture with three channels.
    """
    objects, dirt = look(image_uint8)
    if len(objects) != len(scene.objects):
        return Verdict(False, f"{len(objects)} objects instead of {len(scene.objects)}")
    if dirt > DIRT:
        return Verdict(False, f"{dirt:.1%} of the picture is neither white nor an object")
    if scene.relation is not None:
        right, down = objects[1].x - objects[0].x, objects[1].y - objects[0].y
        if (abs(down) > abs(right)) != (scene.relation in ("above", "below")):
            where = "one above the other" if abs(down) > abs(right) else "side by side"
            return Verdict(False, f"the objects are {where}, not {scene.relation}")
        first_is_lower = (down if abs(down) > abs(right) else right) < 0
        if first_is_lower != (scene.relation in ("below", "right of")):
            objects = objects[::-1]
    faults = [_difference(seen, said) for seen, said in zip(objects, scene.objects, strict=True)]
    reason = "; ".join(filter(None, faults))
    return Verdict(not reason, reason)


def accuracy(images_uint8: np.ndarray, scenes: list[Scene]) -> float:
    """Share of the pictures uint8 [N, S, S, 3] that show their scenes."""
    return float(np.mean([shows(image, scene).ok for image, scene in zip(images_uint8, scenes, strict=True)]))
