"""From an image as uint8 to what a network reads, in each of the ways that published scores were made.

The ways differ by several points of FID, so each has a name and a report says which one it was. Images are uint8 first,
as files are; blur and crop stay uint8. Only the resize leaves uint8, where its original does. numpy and Pillow, one
image at a time.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from dalle_jax import pixels
from dalle_jax.data.transforms import center_crop, clip_crop, middle_square
from dalle_jax.models.inception import SIZE

# Of the channels over ImageNet, as torchvision has them.
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
CROPS = ("none", "center")  # as it is, and the largest square about the center
CLIP_RESIZE = "clip"  # the name of CLIP's only resize


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The way images are brought to a network: crop, side, blur and resize, explained in `protocol.Metrics`."""

    resize: str = "pytorch"
    crop: str = "none"
    side: int | None = None
    blur: float = 0.0

    def framed(self, image_uint8: np.ndarray) -> np.ndarray:
        """Cropped and blurred, still uint8 [H, W, 3]."""
        if self.crop == "center":
            image_uint8 = middle_square(image_uint8)
            image_uint8 = center_crop(image_uint8, self.side) if self.side else image_uint8
        return blurred(image_uint8, self.blur)

    def for_inception(self, image_uint8: np.ndarray) -> np.ndarray:
        """float32 [SIZE, SIZE, 3] in [-1, 1]."""
        return RESIZES[self.resize](self.framed(image_uint8))

    def for_clip(self, image_uint8: np.ndarray, size: int) -> np.ndarray:
        """uint8 [size, size, 3]."""
        return clip_crop(self.framed(image_uint8), size)

    def to_words(self) -> dict[str, str]:
        """The values as a statistics file has them."""
        side = self.side if self.side and self.crop != "none" else 0
        return {"resize": self.resize, "crop": self.crop, "side": str(side), "blur": f"{self.blur:g}"}


def blurred(image_uint8: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur by Pillow, whose radius is the standard deviation in pixels; 0 changes nothing.

    The paper blurs both sets by growing radii (section 3.1) and does not say what its radius means.
    """
    if not radius:
        return image_uint8
    return np.asarray(Image.fromarray(image_uint8).filter(ImageFilter.GaussianBlur(radius)))


def pytorch(image_uint8: np.ndarray) -> np.ndarray:
    """pytorch-fid: bilinear between centers of pixels, no smoothing where it shrinks; 2 x - 1 of [0, 1]."""
    (rows, rows_up, down), (columns, columns_up, across) = (_neighbors(n, 0.5) for n in image_uint8.shape[:2])
    image_unit = pixels.to_unit(image_uint8)
    stretched = _blended(image_unit[rows], image_unit[rows_up], down[:, None, None])  # whole rows are copied fast
    left, right = (np.take(stretched, places, axis=1) for places in (columns, columns_up))
    image = _blended(left, right, across[:, None])
    image *= 2
    image -= 1
    return image


def _blended(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(1 - share) one + share other, in place of one."""
    one *= 1 - share
    other *= share
    one += other
    return one


def _neighbors(length: int, offset: float):
    """Lower and upper neighbor int64 [SIZE], share of the upper one float32 [SIZE]; positions in float32, as there.

    offset: where in a pixel its value lies, 0.5 for its center and 0 for its corner.
    """
    half, scale = np.float32(offset), np.float32(length) / np.float32(SIZE)
    place = ((np.arange(SIZE, dtype=np.float32) + half) * scale - half).clip(0)
    first = np.minimum(np.floor(place).astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), place - first.astype(np.float32)


def tf1(image_uint8: np.ndarray) -> np.ndarray:
    """The original graph: TensorFlow 1's bilinear, which aligns the top left corners of pixels; (x - 128) / 128."""
    image = image_uint8.astype(np.float32)
    (rows, rows_up, down), (columns, columns_up, across) = (_neighbors(n, 0.0) for n in image.shape[:2])
    down, across = down[:, None, None], across[:, None]
    top = image[rows][:, columns] + (image[rows][:, columns_up] - image[rows][:, columns]) * across
    bottom = image[rows_up][:, columns] + (image[rows_up][:, columns_up] - image[rows_up][:, columns]) * across
    return (top + (bottom - top) * down - 128) / 128


def clean(image_uint8: np.ndarray) -> np.ndarray:
    """clean-fid: Pillow's bicubic, smoothed, in floating point, cut to [0, 255]; (x - 128) / 128."""
    channels = [
        Image.fromarray(image_uint8[..., i].astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for i in range(3)
    ]
    return (np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255) - 128) / 128


def dm_gan(image_uint8: np.ndarray) -> np.ndarray:
    """FID of the DM-GAN code: Pillow's bilinear, smoothed and rounded to uint8, squeezed to a square.

    Its copy of an early pytorch-fid takes [0, 1] for values that were normalized by ImageNet's mean and deviation, and
    undoes that (github.com/mseitzer/pytorch-fid/issues/3). A mistake, but its scores depend on it.
    """
    return (pixels.to_unit(_squeezed(image_uint8)) * IMAGENET_STD + IMAGENET_MEAN - 0.5) / 0.5


def dm_gan_score(image_uint8: np.ndarray) -> np.ndarray:
    """Inception score of the DM-GAN code for MS-COCO, in the graph of FID: squeezed the same way; (x - 128) / 128."""
    return (_squeezed(image_uint8).astype(np.float32) - 128) / 128


def _squeezed(image_uint8: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image_uint8).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


# All of them: uint8 [H, W, 3] -> float32 [SIZE, SIZE, 3] in [-1, 1]; an image that is no square is squeezed.
RESIZES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "pytorch": pytorch,
    "clean": clean,
    "tf1": tf1,
    "dm-gan": dm_gan,
    "dm-gan-score": dm_gan_score,
}
