"""Images and masks that clients send: decoded within bounds, and a mask read as 'keep the top rows'."""

import io

import numpy as np
from PIL import Image

from dalle_jax.data.decode import to_pixels, upright
from dalle_jax.serve.errors import ApiError, invalid

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIZE = 2048  # pixels of height and width; a small file can hold an image that fills the memory


def read_image(data: bytes, *, param: str) -> Image.Image:
    """The bytes of a square PNG, JPEG or WEBP file as an RGB or RGBA image, turned upright.

    Raises:
      ApiError: it is not one, or is too large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(image.size) > MAX_SIZE:
            raise invalid(param, f"{param} must be at most {MAX_SIZE} pixels wide and high, got {image.size}")
        image.load()
        image = upright(image).convert("RGBA") if image.has_transparency_data else Image.fromarray(to_pixels(image))
    except ApiError:
        raise
    except Exception as error:  # Pillow answers broken files with OSError, SyntaxError, ValueError, struct.error, ...
        raise invalid(param, f"{param} must be a {', '.join(FORMATS)} file: this one cannot be decoded") from error
    if image.width != image.height:
        raise invalid(param, f"{param} must be square, got {image.width} x {image.height} pixels: crop it first")
    return image


def kept_rows(mask: Image.Image, *, size: tuple[int, int], grid: int, param: str) -> int:
    """Rows of image tokens that a mask keeps: its bottom rows, and nothing else, are transparent.

    size: of the image that the mask belongs to. grid: rows of image tokens of the model.

    Raises:
      ApiError: another size, another shape, nothing transparent, or an edge that is not between two rows of image
        tokens.
    """
    if mask.size != size:
        raise invalid(param, f"{param} must have the size of the image, {size[0]} x {size[1]}, got {mask.size}")
    alpha = np.asarray(mask.convert("RGBA"))[..., 3]
    opaque = (alpha == 255).all(axis=1)
    kept = int(opaque.sum())
    if kept == len(alpha):
        raise invalid(param, f"{param} must be transparent where something is drawn: this one keeps everything")
    if not opaque[:kept].all() or (alpha[kept:] != 0).any():
        raise invalid(
            param,
            f"{param} must be opaque above and transparent below one horizontal line: rows are drawn from the top "
            "down, so nothing else can be drawn again",
        )
    if kept * grid % size[1]:
        raise invalid(
            param,
            f"{param} must change between two of the {grid} rows of image tokens, {size[1] / grid:g} pixels each, "
            f"got {kept} opaque rows of pixels",
        )
    return kept * grid // size[1]
