"""Scores of one image beside another: squared error and PSNR of uint8 pixels, SSIM (Wang et al. 2004).

numpy and SciPy in float64, one image at a time. What a network says of
two images is in `models/lpips.py`, what it says of two sets in `distances.py`.
"""

import math

import numpy as np
import scipy.ndimage

PEAK = 255  # of uint8
WINDOW, DEVIATION = 11, 1.5  # pixels: side and deviation of SSIM's Gaussian window (Wang et al. 2004, section III.C)
K_1, K_2 = 0.01, 0.03  # of SSIM, the same place
_OFFSETS = np.arange(WINDOW) - WINDOW // 2
_WEIGHTS = np.exp(-(_OFFSETS**2) / (2 * DEVIATION**2))
_WEIGHTS /= _WEIGHTS.sum()


def squared_error(image_uint8: np.ndarray, other_uint8: np.ndarray) -> float:
    """Mean squared difference of two images of one shape, over pixels and channels."""
    return float(np.square(image_uint8.astype(np.int32) - other_uint8).mean())


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / error); infinite without an error."""
    return 10 * math.log10(PEAK**2 / mean_squared_error) if mean_squared_error else math.inf


def ssim(image_uint8: np.ndarray, other_uint8: np.ndarray) -> float:
    """Structural similarity of two images [H, W, C], at most 1: the mean over channels and every whole window.

    Scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=255, channel_axis=-1)`, which Wang et al. define for one channel.

    Raises:
      ValueError: a side shorter than the window.
    """
    if min(image_uint8.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM takes images of at least {WINDOW} pixels a side, got {image_uint8.shape}")
    x, y = (np.moveaxis(image, -1, 0).astype(np.float64) for image in (image_uint8, other_uint8))
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variances = _smoothed(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    c_1, c_2 = (K_1 * PEAK) ** 2, (K_2 * PEAK) ** 2
    similar = (2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
    return float((similar / ((mean_x**2 + mean_y**2 + c_1) * (variances + c_2))).mean())


def _smoothed(x_CHW: np.ndarray) -> np.ndarray:
    """Weighted means over every window that lies inside, [C, H - WINDOW + 1, W - WINDOW + 1]."""
    edge = WINDOW // 2
    rows = scipy.ndimage.correlate1d(x_CHW, _WEIGHTS, axis=1)[:, edge:-edge]
    return scipy.ndimage.correlate1d(rows, _WEIGHTS, axis=2)[:, :, edge:-edge]
