"""The pixel convention: uint8 <-> unit float <-> the range that a model reads and gives.

`uint8` in [0, 255] is what files and public interfaces have, `unit` float in [0, 1] what both sides meet in. Models
have `laplace`, the unit range shrunk to [EPSILON, 1 - EPSILON] so that its logit stays finite (Ramesh et al. 2021,
appendix A.3), or one of RANGES. Works on numpy and JAX arrays of any shape; knows nothing of image sizes or of the
likelihood itself.
"""

import numpy as np

EPSILON = 0.1  # appendix A.3
# Name of a range -> its ends. taming-transformers and LlamaGen have the symmetric one, dalle-mini's VQGAN the unit, and
# DeepMind's VQ-VAE for CIFAR the centered.
RANGES = {"symmetric": (-1.0, 1.0), "unit": (0.0, 1.0), "centered": (-0.5, 0.5)}


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


def to_range(image_unit, name: str):
    """[0, 1] -> the range of this name, one of RANGES."""
    low, high = RANGES[name]
    return image_unit * (high - low) + low


def from_range(x, name: str):
    """The inverse of `to_range`; what lies outside of the range lies outside of [0, 1]."""
    low, high = RANGES[name]
    return (x - low) / (high - low)
