"""LPIPS as its authors and taming-transformers publish it: their names in terms of `models.lpips`.

The network is torchvision's VGG16 (`features.0.weight`; its classifier is left out), the linear weights are in a file
of their own (`lin0.model.1.weight`). A state dict of the whole LPIPS has both, the network as `net.slice1.0.weight`.
"""

import os
import re

import numpy as np

from dalle_jax.convert import weights
from dalle_jax.convert.stored import Array, State
from dalle_jax.errors import UserError
from dalle_jax.models import Params, lpips

PUBLISHED = "torchvision's vgg16-397923af.pth"
LINEAR = "vgg.pth of lpips 0.1 or vgg_lpips.pth of taming-transformers"
_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions among torchvision's `features`
_VGG = re.compile(r"(?:features|net\.slice[1-5])\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"(?:lin|lins\.)([0-4])\.model\.1\.weight")  # the package lpips has each under both names


def load_published(network: str | os.PathLike, linear: str | os.PathLike | None) -> tuple[lpips.LPIPSConfig, Params]:
    """Config and parameters of published files; linear: None where the first file has both.

    Raises:
      UserError: nothing there, or the weights of something else.
    """
    state = weights.read(network)
    return convert({**state, **(weights.read(linear) if linear is not None else {})})


def convert(state: State) -> tuple[lpips.LPIPSConfig, Params]:
    """Config and parameters (numpy float32) from a state dict with VGG16's and the linear weights.

    Raises:
      UserError: an array is missing, not finite or of another shape than those of the published network.
    """
    convolutions = [
        f"conv{stage}_{place}" for stage, (_, count) in enumerate(lpips.STAGES, 1) for place in range(1, count + 1)
    ]
    names = dict(zip(_PLACES, convolutions, strict=True))
    kept: dict[str, Array] = {}
    for name, array in state.items():
        if (found := _VGG.fullmatch(name)) and int(found[1]) in names:
            kept[f"{names[int(found[1])]}/{found[2]}"] = array
        elif found := _LINEAR.fullmatch(name):
            kept[f"linear{int(found[1]) + 1}/weight"] = np.reshape(array, -1)
    for what, advice in (("conv1_1/weight", PUBLISHED), ("linear1/weight", f"{LINEAR} as the second file")):
        if what not in kept:
            raise UserError(f"expected LPIPS's network and linear weights, got no {what}: give {advice}")
    config = lpips.LPIPSConfig()
    abstract = lpips.model(config).abstract
    paths = {path: "/".join(path) for path in weights.leaves(abstract)}
    return config, weights.renamed(kept, paths, abstract, what="all of LPIPS")
