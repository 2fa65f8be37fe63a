"""The sparse attention pattern: which kind layer i is, and which positions a kind may see.

The only place that knows it (Ramesh et al. 2021, section 2.2, appendix B.1, figure 11). Kernels, caches and FLOP
counts are tested against `allowed`. Numpy only; knows nothing of heads, parameters or dtypes.

Positions: `text_len` of the text, then `grid * grid` of the image in raster order. Text sees earlier text; an image
position sees all text (padding included) and the earlier image positions of its layer's kind, itself included.
"""

import functools

import numpy as np

KINDS = ("row", "column", "conv", "window", "torus", "full")
PERIOD = ("row", "column", "row", "row")
# Pattern -> kind of its last layer; 'full' is full everywhere.
PATTERNS = {"paper": "conv", "malevich": "window", "malevich-v2": "torus", "full": "full"}
CONV_SIZE = 11  # the last layer's kernel, appendix B.1


def layer_kinds(num_layers: int, pattern: str = "paper") -> tuple[str, ...]:
    """The kind of each layer, first to last.

    `paper` (appendix B.1): with i = 1 .. num_layers, layer num_layers is 'conv', layers with (i - 2) mod 4 = 0 are
    'column', all others 'row'. `malevich` and `malevich-v2` (ru-DALL-E's releases) have another kind in the last layer,
    but where that would be a column layer it stays one. `full` is dense causal attention everywhere.

    Raises:
      ValueError: num_layers < 1 or an unknown pattern.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern must be one of {tuple(PATTERNS)}, got {pattern!r}")
    if pattern == "full":
        return ("full",) * num_layers
    *kinds, last = (PERIOD[i % len(PERIOD)] for i in range(num_layers))
    return (*kinds, PATTERNS[pattern] if pattern == "paper" or last != "column" else last)


def image_offsets(kind: str, *, grid: int) -> tuple[int, ...]:
    """Raster distances query - key, ascending, that an image position of this kind may look back over.

    Row attention wraps into the previous row and reaches the same column there (grid + 1 keys). Convolution wraps at
    row borders too: offsets dr * grid + dc of the causal half of an 11 x 11 window (the literal reading of "with
    wraparound similar to row attention"). A 'window' is cut off at the borders instead, and a 'torus' goes on at the
    opposite one, from below too, so of its offsets a position sees some only: `allowed_image`.
    """
    _check(kind, grid)
    if kind == "row":
        return tuple(range(grid + 1))
    if kind == "column":
        return tuple(range(0, grid * grid, grid))
    if kind in ("conv", "window"):
        half = CONV_SIZE // 2
        window = {dr * grid + dc for dr in range(half + 1) for dc in range(-half, half + 1)}
        return tuple(sorted(offset for offset in window if 0 <= offset < grid * grid))
    return tuple(range(grid * grid))


@functools.lru_cache(maxsize=64)
def allowed_image(kind: str, *, grid: int) -> np.ndarray:
    """bool [grid*grid, grid*grid], read-only: may an image query (row) see an image key (column)?"""
    places = np.arange(grid * grid)
    mask = np.isin(np.subtract.outer(places, places), image_offsets(kind, grid=grid))
    if kind in ("window", "torus"):
        for place in (places // grid, places % grid):
            apart = abs(np.subtract.outer(place, place))
            mask &= (np.minimum(apart, grid - apart) if kind == "torus" else apart) <= CONV_SIZE // 2
    mask.flags.writeable = False
    return mask


def allowed(kind: str, *, text_len: int, grid: int) -> np.ndarray:
    """bool [S, S], S = text_len + grid*grid, rows are queries: the whole mask of a layer of this kind.

    Raises:
      ValueError: unknown kind, text_len < 0 or grid < 1.
    """
    _check(kind, grid)
    if text_len < 0:
        raise ValueError(f"text_len must not be negative, got {text_len}")
    length = text_len + grid * grid
    mask = np.zeros((length, length), bool)
    mask[:text_len, :text_len] = np.tri(text_len, dtype=bool)
    mask[text_len:, :text_len] = True
    mask[text_len:, text_len:] = allowed_image(kind, grid=grid)
    return mask


def compact_order(kind: str, *, text_len: int, grid: int) -> np.ndarray:
    """int [S], the positions in an order in which the keys that a query may see lie in few blocks.

    Raster order, but for a column layer's image, which goes column by column: in raster order each of its columns
    meets every block of a row or more.
    """
    _check(kind, grid)
    image = np.arange(grid * grid).reshape(grid, grid)
    return np.concatenate([np.arange(text_len), text_len + (image.T if kind == "column" else image).ravel()])


def cache_slots(kind: str, *, grid: int) -> int:
    """Slots of a layer's cache when decoding: a ring for row, conv and window, all image positions for the rest.

    A ring of R slots holds position p in slot p mod R, which is exactly what a query may look back over. Column layers
    keep all positions transposed (column * grid + row), so that the keys a query sees lie side by side.
    """
    if kind in ("row", "conv", "window"):
        return image_offsets(kind, grid=grid)[-1] + 1
    _check(kind, grid)
    return grid * grid


def read_slots(kind: str, *, grid: int) -> int:
    """The number of `cache_slots` that one decoding step reads: one column of a column layer, all of the others."""
    return grid if kind == "column" else cache_slots(kind, grid=grid)


def _check(kind: str, grid: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
