"""Image to square: the paper's two augmentations, CLIP's, small shifts, and a deterministic center crop.

Each takes uint8 [H, W, 3] and returns uint8 [size, size, 3]. The paper's listings are for size 256; their constants
scale with the size. All randomness comes from the generator that is passed in.

Shrinking averages areas as the listings ask, by sparse products: Pillow's BOX filter counts a border pixel wholly or
not at all, which is no area average unless the ratio is an integer. An image smaller than the size has to grow, which
the listings never do; that and `center_crop` use Pillow's Lanczos filter, as the released notebook does. CLIP's filter
is bicubic.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import scipy.sparse
from PIL import Image

DVAE_SHORTEST, DVAE_LONGEST = Fraction(9, 8), Fraction(12, 8)  # listing 1: 288 and 384 for size 256
TRANSFORMER_LONGEST = Fraction(9, 8)  # listing 2: 288 for size 256
SHIFT = Fraction(3, 64)  # 3 pixels of 64
CACHE_LINE = 64  # bytes


def augment_dvae(image_uint8: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 1 (appendix A.2): any largest square, shrunk to 9/8 .. 12/8 of the size, any crop, maybe mirrored."""
    square = _crop(image_uint8, rng, low=Fraction(0), high=Fraction(1), end_included=True)
    side = len(square)
    shortest = max(size, min(side, round(DVAE_SHORTEST * size)))
    longest = max(size, min(side, round(DVAE_LONGEST * size)))
    crop = _random_window(square, int(rng.integers(shortest, longest, endpoint=True)), size, rng)
    return np.ascontiguousarray(crop[:, ::-1]) if rng.random() < 0.5 else crop


def augment_transformer(image_uint8: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 2: a square near the center, shrunk to 8/8 .. 9/8 of the size, any crop of it.

    Never mirrored, because captions say left and right and images hold writing.
    """
    square = _crop(image_uint8, rng, low=Fraction(3, 8), high=Fraction(5, 8), end_included=False)
    longest = max(size, min(len(square), round(TRANSFORMER_LONGEST * size)))
    return _random_window(square, int(rng.integers(size, longest, endpoint=True)), size, rng)


def augment_shift(image_uint8: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The center crop moved by up to SHIFT of the size in each direction, edge pixels repeated, maybe mirrored.

    For pictures that fill their square, such as emoji, of which a random crop would cut parts off.
    """
    reach = round(SHIFT * size)
    down, across = (int(offset) for offset in rng.integers(0, 2 * reach, size=2, endpoint=True))
    wide = np.pad(center_crop(image_uint8, size), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    moved = wide[down : down + size, across : across + size]
    return np.ascontiguousarray(moved[:, ::-1] if rng.random() < 0.5 else moved)


def augment_clip(image_uint8: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """CLIP's augmentation: any of the largest squares, bicubic to the size (Radford et al. 2021, section 2.3)."""
    square = _crop(image_uint8, rng, low=Fraction(0), high=Fraction(1), end_included=True)
    return _resized(square, size, size, Image.Resampling.BICUBIC)


def center_crop(image_uint8: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The shorter side resized to `size` (Lanczos), then the middle square, both rounded as the released notebook does.

    That refuses images whose shorter side is smaller; here they grow. `rng` is not used.
    """
    height, width = image_uint8.shape[:2]
    ratio = size / min(height, width)
    return _center(_resized(image_uint8, round(ratio * height), round(ratio * width)), size).copy()


def middle_square(image_uint8: np.ndarray) -> np.ndarray:
    """The largest square about the center, as the paper cut the images of its scores (Nichol et al. 2021, A.2)."""
    height, width = image_uint8.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image_uint8[top : top + side, left : left + side]


def clip_crop(image_uint8: np.ndarray, size: int) -> np.ndarray:
    """CLIP's preprocessing: the shorter side to `size` (bicubic), then the center square.

    Bit for bit torchvision's `Resize(size)` and `CenterCrop(size)` of a Pillow image, as the released code calls them.
    """
    height, width = image_uint8.shape[:2]
    tall, wide = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    return _center(_resized(image_uint8, tall, wide, Image.Resampling.BICUBIC), size)


def shortest(augment: str, size: int) -> int:
    """The pixels of the shorter side that are enough for an augmentation: the most that it shrinks an image to, or
    twice that if it filters, so that its filter still decides the result."""
    share = {"dvae": DVAE_LONGEST, "transformer": TRANSFORMER_LONGEST}.get(augment, 2)
    return math.ceil(share * size)


AUGMENTATIONS = {
    "dvae": augment_dvae,
    "transformer": augment_transformer,
    "clip": augment_clip,
    "shift": augment_shift,
    "center": center_crop,
}


def shrink_by_area(
    image_uint8: np.ndarray, side: int, *, top: int = 0, left: int = 0, size: int | None = None
) -> np.ndarray:
    """Shrink a square [s, s, 3] to [side, side, 3] by area averages, side <= s; only its `size` window at (top, left).

    Output pixel i averages the input over [i r, (i + 1) r), r = (s - 1) / (side - 1), edge pixels repeated outside: the
    aligned corners of the listings.
    """
    size = side if size is None else size
    if side == len(image_uint8):  # every area is one pixel
        return np.ascontiguousarray(image_uint8[top : top + size, left : left + size])
    rows, weight_OH = _area_weights(len(image_uint8), side, top, size)
    columns, weight_OW = _area_weights(len(image_uint8), side, left, size)
    image_HX = image_uint8[rows, columns].astype(np.float32).reshape(rows.stop - rows.start, -1)
    # O: rows or columns of the result. X: columns of the image and channels. Y: channels and rows of the result.
    columns_XO = np.ascontiguousarray((weight_OH @ image_HX).T)
    areas_OY = weight_OW @ columns_XO.reshape(-1, 3 * size)
    areas_OY += np.float32(0.5)  # averages stay in [0, 255]
    # Rows of an odd number of cache lines: at a stride of 2^k those of a column evict each other from the cache.
    areas_YO = np.empty((3 * size, CACHE_LINE * (-(-size // CACHE_LINE) | 1)), np.uint8)[:, :size]
    areas_YO[:] = areas_OY.reshape(-1, size)
    return np.ascontiguousarray(areas_YO.T).reshape(size, size, 3)


def _area_weights(length: int, side: int, start: int, count: int) -> tuple[slice, scipy.sparse.csr_array]:
    """The inputs of a line of `length` that the outputs start .. start + count of `side` average, and their weights.

    Returns: a slice of the line, and float32 [count, its length] with a few numbers per row: a product with it passes
    over the image once.
    """
    pixel, weight, ends = _line_weights(length, side)
    ends = ends[start : start + count + 1]
    pixel, weight = pixel[ends[0] : ends[-1]], weight[ends[0] : ends[-1]]
    first, last = int(pixel[0]), int(pixel[-1]) + 1
    return slice(first, last), scipy.sparse.csr_array((weight, pixel - first, ends - ends[0]), (count, last - first))


@functools.lru_cache(maxsize=1024)  # eight bytes a pixel of the line and more; data sets have few sizes
def _line_weights(length: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a sparse [side, length]: int32 inputs, float32 weights, and where those of each output begin."""
    ratio = (length - 1) / (side - 1) if side > 1 else float(length)
    begin = np.arange(side)[:, None] * ratio
    pixel = np.floor(begin).astype(np.int32) + np.arange(math.ceil(ratio) + 1, dtype=np.int32)
    overlap = np.minimum(pixel + 1, begin + ratio) - np.maximum(pixel, begin)
    some = overlap > 0
    ends = np.concatenate([[0], np.cumsum(some.sum(axis=1))]).astype(np.int32)
    pixel = np.minimum(pixel, length - 1)  # the edge repeats
    return pixel[some], (overlap[some] / ratio).astype(np.float32), ends


def _crop(image: np.ndarray, rng: np.random.Generator, *, low: Fraction, high: Fraction, end_included: bool):
    """A largest square, its offset on each axis uniform between these shares of the slack."""
    side = min(image.shape[:2])
    offsets = []
    for length in image.shape[:2]:
        first, last = (share.numerator * (length - side) // share.denominator for share in (low, high))
        offsets.append(int(rng.integers(first, last + 1 if end_included else max(first + 1, last))))
    top, left = offsets
    return image[top : top + side, left : left + side]


def _center(image: np.ndarray, size: int) -> np.ndarray:
    """A view of the middle square, rounded as torchvision's CenterCrop does."""
    top, left = (round((length - size) / 2) for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def _random_window(square: np.ndarray, side: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """The square resized to `side`, and a window of `size` at a uniform position in it."""
    top, left = (int(offset) for offset in rng.integers(0, side - size, size=2, endpoint=True))
    if side > len(square):
        return np.ascontiguousarray(_resized(square, side, side)[top : top + size, left : left + size])
    return shrink_by_area(square, side, top=top, left=left, size=size)


def _resized(
    image: np.ndarray, height: int, width: int, filter_: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    if (height, width) == image.shape[:2]:  # Pillow copies it too
        return image.copy()
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), filter_))
