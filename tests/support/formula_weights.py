"""Weights that a formula gives, so that numbers which an original code made from them can be checked without it.

In unsigned 32-bit arithmetic, for tensor j and place i: u = (i + 1) * 2654435761 + (j + 1) * 2246822519, then
u ^= u >> 15, u *= 2246822519, u ^= u >> 13; U(j)[i] = u / 2^31 - 1.
"""

import numpy as np


def uniform(j: int, count: int) -> np.ndarray:
    """U(j)[0 .. count - 1], float64 in [-1, 1)."""
    u = (np.arange(count) + 1).astype(np.uint32) * np.uint32(2654435761)
    u += np.uint32((j + 1) * 2246822519 % 2**32)
    u ^= u >> np.uint32(15)
    u *= np.uint32(2246822519)
    u ^= u >> np.uint32(13)
    return u / 2.0**31 - 1.0


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict in PyTorch's layout: the j-th name, in the order of their characters, gets U(j), times 1.7 /
    sqrt(fan-in) for two dimensions or more; gains are 1 + 0.2 U, biases 0.2 U."""
    state = {}
    for j, (name, shape) in enumerate(sorted(shapes.items())):
        u = uniform(j, int(np.prod(shape))).reshape(shape)
        if len(shape) > 1:
            u = u * 1.7 / np.sqrt(np.prod(shape[1:]))
        else:
            u = 1 + 0.2 * u if name.endswith("weight") else 0.2 * u
        state[name] = u.astype(np.float32)
    return state


def image(k: int, side: int) -> np.ndarray:
    """Float input k as an image [1, side, side, 3], laid out as PyTorch's [1, 3, side, side]."""
    return uniform(1000 + k, 3 * side * side).reshape(1, 3, side, side).transpose(0, 2, 3, 1).astype(np.float32)
