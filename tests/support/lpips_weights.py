"""LPIPS's published names and shapes, and numbers for them that keep what its stages say apart."""

import numpy as np

from tests.support import formula_weights

WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of VGG16's stages
STARTS = (0, 5, 10, 17, 24)  # of the stages in torchvision's list of layers: convolutions and ReLUs by turns, a pool


def names(*, whole: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict: taming's of all of LPIPS if whole, else torchvision's and lpips' together."""
    found, inputs = {}, 3
    for stage, ((width, count), start) in enumerate(zip(WIDTHS, STARTS, strict=True)):
        for place in range(start, start + 2 * count, 2):
            prefix = f"net.slice{stage + 1}.{place}" if whole else f"features.{place}"
            found |= {f"{prefix}.weight": (width, inputs, 3, 3), f"{prefix}.bias": (width,)}
            inputs = width
        found[f"lin{stage}.model.1.weight"] = (1, width, 1, 1)
    return found


def state_dict() -> dict[str, np.ndarray]:
    """Formula weights in taming's names; the network's keep the size of what passes its ReLUs, the linear ones are not
    negative, as the published ones."""
    state = formula_weights.weights(names(whole=True))
    for name, value in state.items():
        if value.ndim == 4:
            state[name] = 1.5 * value if name.startswith("net") else np.abs(value)
    return state


def two_files() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same numbers as torchvision's VGG16 and the linear weights."""
    state = state_dict()
    network = {"features." + n.split(".", 2)[2]: value for n, value in state.items() if n.startswith("net")}
    return network, {name: value for name, value in state.items() if name.startswith("lin")}
