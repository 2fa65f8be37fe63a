"""Sizes of tiny image tokenizers with a codebook, one of each network and one with Gumbel codes; random arrays."""

import numpy as np

VQGAN = {
    "image_size": 16, "vocab": 24, "code_dim": 6, "width": 32, "multipliers": (1, 1), "blocks": 1, "latent": 5,
    "attention_levels": (1,),
}  # fmt: skip
VQVAE = {
    "network": "vqvae", "image_size": 16, "vocab": 24, "code_dim": 6, "width": 4, "multipliers": (1, 2),
    "pixel_range": "centered",
}  # fmt: skip
PATCHES = {
    "network": "patches", "image_size": 16, "vocab": 24, "code_dim": 6, "width": 8, "multipliers": (1, 2), "patch": 4,
    "blocks": 1, "unit_codes": True,
}  # fmt: skip
GUMBEL = VQVAE | {"quantizer": "gumbel", "pixel_range": "unit"}
EVERY = {"vqgan": VQGAN, "vqvae": VQVAE, "patches": PATCHES, "gumbel": GUMBEL}


def some_images(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def brute_force(z, codes):
    """Index of the nearest code, float64, one vector at a time."""
    z, codes = np.asarray(z, np.float64), np.asarray(codes, np.float64)
    found = [
        min(range(len(codes)), key=lambda k: ((vector - codes[k]) ** 2).sum()) for vector in z.reshape(-1, z.shape[-1])
    ]
    return np.array(found).reshape(z.shape[:-1])
