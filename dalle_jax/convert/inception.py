"""Inception v3 as pytorch-fid and torchvision publish it: its names in terms of `models.inception`.

Both use torchvision's names (`Mixed_5b.branch1x1.conv.weight`). The number of classes says which of the two a file is,
and so which pools its network has. The auxiliary classifier, which serves training only, is left out.
"""

import os
import re

import numpy as np

from dalle_jax.convert import weights
from dalle_jax.convert.stored import State
from dalle_jax.errors import UserError
from dalle_jax.models import Params, inception

PUBLISHED = "pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or torchvision's inception_v3_google-*.pth"
LEAVES = {
    "conv.weight": "weight",
    "bn.weight": "gain",
    "bn.bias": "bias",
    "bn.running_mean": "mean",
    "bn.running_var": "variance",
}
_IGNORED = re.compile(r"AuxLogits\..*|.*\.num_batches_tracked")
_POINTWISE = "3b"  # the one convolution of a single pixel before the mixed blocks


def load_published(path: str | os.PathLike) -> tuple[inception.InceptionConfig, Params]:
    """Config and parameters of a published file (.pth, or the same arrays as .safetensors).

    Raises:
      UserError: nothing there, or the weights of something else.
    """
    return convert(weights.read(path))


def convert(state: State) -> tuple[inception.InceptionConfig, Params]:
    """Config and parameters (numpy float32) from a state dict in torchvision's names.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than those of the published networks.
    """
    config = inception.InceptionConfig(pools=_pools_of(state))
    kept = {name: array for name, array in state.items() if not _IGNORED.fullmatch(name)}
    kept["fc.weight"] = np.asarray(kept["fc.weight"]).T
    abstract = inception.model(config).abstract
    names = {path: _name(*path) for path in weights.leaves(abstract)}
    return config, weights.renamed(kept, names, abstract, what=f"an Inception v3 of {config.classes} classes")


def _pools_of(state: State) -> str:
    pools_of = {classes: pools for pools, classes in inception.CLASSES.items()}
    classes = np.shape(state["fc.weight"])[:1] if "fc.weight" in state else ()
    if not classes or classes[0] not in pools_of:
        found = f"{classes[0]} classes" if classes else "no fc.weight"
        raise UserError(f"expected an Inception v3 of 1008 or 1000 classes, got {found}: give {PUBLISHED}")
    return pools_of[classes[0]]


def _name(module: str, *rest: str) -> str:
    """mixed_5b, branch1x1, weight -> 'Mixed_5b.branch1x1.conv.weight'."""
    if module == "logits":
        return f"fc.{rest[0]}"
    if found := re.fullmatch(r"conv_(\d[ab])", module):
        module = f"Conv2d_{found[1]}_{'1x1' if found[1] == _POINTWISE else '3x3'}"
    theirs = {ours: name for name, ours in LEAVES.items()}
    return ".".join([module.replace("mixed_", "Mixed_"), *rest[:-1], theirs[rest[-1]]])
