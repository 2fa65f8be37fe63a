"""An encoded image -> uint8 [H, W, 3] in sRGB order, or one named reason why not.

Upright by the EXIF orientation, alpha over white, 16 bits scaled down, CMYK and palettes converted, the first frame of
an animation. The size is read from the header and checked before any pixel is decoded. Color profiles are ignored.
"""

import functools
import io
import warnings

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from dalle_jax.data.record import BadRecord

SUFFIXES = frozenset("jpg jpeg jpe jfif png apng webp gif bmp dib tif tiff avif jp2 j2k mpo ppm pgm pbm pnm".split())
# Pictures that people have and that are not read. Some hold a small preview, so their content is not asked.
UNREAD_SUFFIXES = frozenset(
    "heic heif hif jxl dng raw cr2 cr3 crw nef nrw arw orf rw2 raf pef srw svg psd xcf ico tga".split()
)
# Formats by name, because Pillow would also pass PostScript to an external interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")

_TURNS = {  # EXIF orientation -> what turns the pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_PIXELS = 100_000_000  # 300 MB decoded: more than nearly any camera makes, less than any machine holds
MAX_PIXELS_LIMIT = 1 << 31  # the largest value that a user may give instead
# Our limit is the stricter one, and a damaged header either decodes or gets its reason: no warnings are needed.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BadImage(BadRecord):
    """An image that cannot be used. `reason` is a name of `record.REASONS`, `detail` the message of the decoder."""


def decode_image(image: bytes | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image.

    Args:
      image: an encoded file, or an array uint8 [H, W, 3] (returned as it is) or [H, W, 1].
      max_pixels: the largest H * W; a larger image is refused from its header.

    Returns: uint8 [H, W, 3], contiguous, read only.

    Raises:
      BadImage: 'zero bytes', 'not an image', 'truncated image', 'broken image', 'unsupported image' or
        'decompression bomb'.
    """
    return decode_scaled(image, shortest=0, max_pixels=max_pixels)[0]


def decode_scaled(
    image: bytes | np.ndarray, *, shortest: int, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode one image as `decode_image` does, and return its height and width before scaling too.

    shortest: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side keeps at least so many pixels. The
      decoder then computes fewer numbers instead of averaging more: several times faster, and nearly the average of
      each square of pixels. 0: at its full size.
    """
    if isinstance(image, np.ndarray):
        pixels = _check_array(image, max_pixels)
        return pixels, pixels.shape[:2]
    if not image:
        raise BadImage("zero bytes")
    try:
        with Image.open(io.BytesIO(image), formats=_formats()) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise BadImage("decompression bomb", f"{width}x{height} pixels, the limit is {max_pixels}")
            if shortest:
                opened.draft(None, (shortest, shortest))
            scaled = opened.height, opened.width
            if (decoded := _jpeg_pixels(opened, image)) is not None:
                return decoded, (height, width)
            opened.load()
            pixels = _to_rgb(upright(opened))
            return pixels, (height, width) if pixels.shape[:2] == scaled else (width, height)
    except UnidentifiedImageError:
        if not image.startswith(_MAGIC):
            raise BadImage("not an image", f"starts with {image[:16]!r}") from None
        if len(image) < 256 or not any(image[256:]):
            raise BadImage("truncated image", "ends inside its header") from None
        raise BadImage("broken image", "its header is damaged") from None
    except Exception as error:  # decoders raise many kinds on hostile bytes: struct, index, memory, ...
        raise _bad(error) from None


def _jpeg_pixels(opened: Image.Image, image: bytes) -> np.ndarray | None:
    """The pixels of an upright gray or color JPEG by libjpeg-turbo: Pillow's bits in two thirds of its time.

    None for everything else and for a damaged file, which Pillow decodes or gives the reason for.
    """
    plain = opened.format == "JPEG" and opened.mode in ("L", "RGB")
    if not plain or _turn(opened) is not None:
        return None
    pixels = np.empty((opened.height, opened.width, 3), np.uint8)  # the size that Pillow found, and no larger
    try:
        decoded = simplejpeg.decode_jpeg(image, min_height=len(pixels), min_width=pixels.shape[1], buffer=pixels)
    except ValueError:
        return None
    return decoded if decoded.shape == pixels.shape else None


def to_pixels(image: Image.Image) -> np.ndarray:
    """The pixels uint8 [H, W, 3] of an image that Pillow has opened, as `decode_image` makes them of its file.

    Raises:
      BadImage: as `decode_image`.
    """
    try:
        image.load()
        return _to_rgb(upright(image))
    except Exception as error:  # as above, because Pillow reads the file only now
        raise _bad(error) from None


def upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation, which it then no longer has; as it is where there is none."""
    if (turn := _turn(image)) is None:
        return image
    turned = image.transpose(turn)
    for block in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        turned.info.pop(block, None)
    return turned


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block, in as many ways as above; the pixels may be whole
        return None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF needs Pillow 11.3


def _bad(error: Exception) -> BadImage:
    """The reason that a decoder's exception gives."""
    if isinstance(error, BadImage):
        return error
    message, reason = str(error).lower(), "broken image"
    if "too large" in message or isinstance(error, (MemoryError, Image.DecompressionBombError)):
        reason = "decompression bomb"  # too large: a text chunk or a profile
    elif any(word in message for word in ("truncated", "premature", "not enough", "unexpected end")):
        reason = "truncated image"
    return BadImage(reason, f"{type(error).__name__}: {error}")


def _check_array(image: np.ndarray, max_pixels: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        raise BadImage("unsupported image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}")
    if image.shape[0] * image.shape[1] > max_pixels:
        raise BadImage("decompression bomb", f"{image.shape[1]}x{image.shape[0]} pixels, the limit is {max_pixels}")
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _to_rgb(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode == "F":
        raise BadImage("unsupported image", "floating-point pixels")
    if mode == "I" or mode.startswith("I;16"):  # convert() would saturate 16 bits to white
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise BadImage("unsupported image", "32-bit pixels")
        gray_uint8 = ((gray + 128) // 257).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(gray_uint8[..., None], (*gray.shape, 3)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
