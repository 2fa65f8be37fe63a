"""Squared error, PSNR and SSIM against the papers' formulas window by window, and scikit-image."""

import math

import numpy as np
import pytest

from dalle_jax.evaluate import fidelity
from tests.support.evaluation import noise_image


def noised(image, amount, seed=1):
    noise = np.random.default_rng(seed).integers(-amount, amount + 1, image.shape)
    return (image.astype(int) + noise).clip(0, 255).astype(np.uint8)


def slow_ssim(x_HWC, y_HWC):
    """Wang et al. 2004, equations 13 to 17: in each channel the mean over every window of 11 x 11 inside the image,
    whose weights are a Gaussian of deviation 1.5 pixels that sum to 1."""
    across = np.array([math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)])
    w = np.outer(across, across) / across.sum() ** 2
    height, width, channels = x_HWC.shape
    values = []
    for channel in range(channels):
        for top in range(height - 10):
            for left in range(width - 10):
                x, y = (a[top : top + 11, left : left + 11, channel].astype(float) for a in (x_HWC, y_HWC))
                m, n = (w * x).sum(), (w * y).sum()
                squares, others = (w * (x - m) ** 2).sum(), (w * (y - n) ** 2).sum()
                together = (w * (x - m) * (y - n)).sum()
                c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append((2 * m * n + c) * (2 * together + d) / ((m**2 + n**2 + c) * (squares + others + d)))
    return np.mean(values)


@pytest.mark.parametrize(("size", "amount"), [((11, 11), 3), ((11, 25), 40), ((23, 17), 200)])
def test_ssim_is_the_formula_in_every_window(size, amount):
    image = noise_image(*size)
    other = noised(image, amount)
    assert fidelity.ssim(image, other) == pytest.approx(slow_ssim(image, other), abs=1e-12)
    assert fidelity.ssim(other, image) == pytest.approx(fidelity.ssim(image, other), abs=1e-15)


def formula_images():
    y, x, c = np.ogrid[:24, :17, :3]
    return ((7 * y + 13 * x + 29 * c + more) % 256 for more in (0, y * x % 23))


def test_psnr_and_ssim_are_scikit_images():
    """Stored from scikit-image 0.26.0; they change only with the definition of these scores."""
    image, other = (values.astype(np.uint8) for values in formula_images())
    assert fidelity.ssim(image, other) == pytest.approx(0.5991389155123996, abs=1e-12)
    assert fidelity.psnr(fidelity.squared_error(image, other)) == pytest.approx(13.59800002759517, abs=1e-12)
    metrics = pytest.importorskip("skimage.metrics", reason="the comparison takes scikit-image")
    for size in ((11, 30), (64, 48)):
        image = noise_image(*size)
        other = noised(image, 30)
        how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        want = metrics.structural_similarity(image, other, **how, channel_axis=-1)
        assert fidelity.ssim(image, other) == pytest.approx(want, abs=1e-12)
        want = metrics.peak_signal_noise_ratio(image, other)
        assert fidelity.psnr(fidelity.squared_error(image, other)) == pytest.approx(want, abs=1e-12)


def test_values_that_are_known():
    black, white = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    image = noise_image(12, 12)
    assert fidelity.squared_error(image, image) == 0 and fidelity.psnr(0.0) == math.inf
    assert fidelity.ssim(image, image) == pytest.approx(1, abs=1e-12)
    assert fidelity.squared_error(black, white) == fidelity.squared_error(white, black) == 65025  # no wrap of uint8
    assert fidelity.psnr(65025) == 0 and fidelity.psnr(1) == pytest.approx(48.1308, abs=1e-4)
    assert fidelity.ssim(black, white) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-9)  # c_1 / (255^2 + c_1)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        fidelity.ssim(image[:10], image[:10])
