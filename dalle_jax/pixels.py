"""The pixel convention: uint8 <-> unit float <-> logit-Laplace range.

Three spaces and nothing else: `uint8` in [0, 255], `unit` float in [0, 1], and `laplace`, the unit range shrunk to
[EPSILON, 1 - EPSILON] so that its logit stays finite (Ramesh et al. 2021, appendix A.3). Works on numpy and JAX
arrays of any shape; knows nothing of image sizes or of the likelihood itself.
"""

import numpy as np

EPSILON = 0.1  # appendix A.3


def to_unit(image_uint8):
    """uint8 in [0, 255] -> float32 in [0, 1]."""
    return image_uint8.astype(np.float32) / 255.0


def to_uint8(image_unit):
    """float in [0, 1] (values outside are clipped) -> uint8, rounded to nearest."""
    return (image_unit.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def to_laplace(image_unit):
    """[0, 1] -> [EPSILON, 1 - EPSILON]: what the dVAE's encoder reads and its likelihood scores."""
    return (1.0 - 2.0 * EPSILON) * image_unit + EPSILON


def from_laplace(image_laplace):
    """The inverse of `to_laplace`, clipped to [0, 1]."""
    return ((image_laplace - EPSILON) / (1.0 - 2.0 * EPSILON)).clip(0.0, 1.0)
