"""Pictures and masks that clients send: decoded within bounds, and a mask read as 'keep the top rows'."""

import io

import numpy as np
from PIL import Image, ImageOps

from dalle_jax.data.decode import to_pixels
from dalle_jax.serve.refusal import Refusal, invalid

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIDE = 2048  # pixels; a small file can hold a picture that fills the memory


def read_picture(data: bytes, *, param: str) -> Image.Image:
    """The bytes of a square PNG, JPEG or WEBP file as an RGB or RGBA picture, turned upright.

    Raises:
      Refusal: it is not one, or is too large.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(picture.size) > MAX_SIDE:
            raise invalid(param, f"{param} must be at most {MAX_SIDE} pixels wide and high, got {picture.size}")
        picture = ImageOps.exif_transpose(picture)
        picture = picture.convert("RGBA") if picture.has_transparency_data else Image.fromarray(to_pixels(picture))
    except Refusal:
        raise
    except Exception as error:  # Pillow answers broken files with OSError, SyntaxError, ValueError, struct.error, ...
        raise invalid(param, f"{param} must be a {', '.join(FORMATS)} file: this one can't be decoded") from error
    if picture.width != picture.height:
        raise invalid(param, f"{param} must be square, got {picture.width} x {picture.height} pixels: crop it first")
    return picture


def kept_rows(mask: Image.Image, *, size: tuple[int, int], grid: int, param: str) -> int:
    """Rows of codes that a mask keeps: its bottom rows, and nothing else, are transparent.

    size: of the picture that the mask belongs to. grid: rows of codes of the model.

    Raises:
      Refusal: another size, another shape, or an edge that is not between two rows of codes.
    """
    if mask.size != size:
        raise invalid(param, f"{param} must have the size of the image, {size[0]} x {size[1]}, got {mask.size}")
    alpha = np.asarray(mask.convert("RGBA"))[..., 3]
    opaque = (alpha == 255).all(axis=1)
    kept = int(opaque.sum())
    if not opaque[:kept].all() or (alpha[kept:] != 0).any():
        raise invalid(param, f"{param} must be opaque above and transparent below one horizontal line: rows are drawn "
                             "from the top down, so nothing else can be painted again")  # fmt: skip
    if kept * grid % size[1]:
        raise invalid(
            param,
            f"{param} must change between two of the {grid} rows of codes, {size[1] / grid:g} pixels each, "
            f"got {kept} opaque rows of pixels",
        )
    return kept * grid // size[1]
