"""Inception v3 as pytorch-fid and torchvision publish it: its names in terms of `models.inception`.

Both use torchvision's names (`Mixed_5b.branch1x1.conv.weight`). The number of classes says which of the two a file is,
and so which pools its network has. The auxiliary classifier, which serves training only, is left out.
"""

import os
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax import model_dir
from dalle_jax.convert import weights
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
_CONV = re.compile(r"Conv2d_(\d[ab])_\dx\d")


def load_published(path: str | os.PathLike) -> tuple[inception.InceptionConfig, Params]:
    """Config and parameters of a published file (.pth, or the same arrays as .safetensors).

    Raises:
      UserError: nothing there, or the weights of something else.
    """
    return convert(weights.read(path))


def convert(state: Mapping[str, np.ndarray]) -> tuple[inception.InceptionConfig, Params]:
    """Config and parameters (numpy float32) from a state dict in torchvision's names.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than those of the published networks.
    """
    config = inception.InceptionConfig(pools=_pools_of(state))
    kept = {name: array for name, array in state.items() if not _IGNORED.fullmatch(name)}
    params = weights.renamed(kept, _path_of)
    params["logits"]["weight"] = np.ascontiguousarray(params["logits"]["weight"].T)
    model_dir.check_params(params, inception.model(config).abstract, where="the state dict")
    return config, params


def _pools_of(state: Mapping[str, np.ndarray]) -> str:
    pools_of = {classes: pools for pools, classes in inception.CLASSES.items()}
    classes = np.shape(state["fc.weight"])[:1] if "fc.weight" in state else ()
    if not classes or classes[0] not in pools_of:
        found = f"{classes[0]} classes" if classes else "no fc.weight"
        raise UserError(f"expected an Inception v3 of 1008 or 1000 classes, got {found}: give {PUBLISHED}")
    return pools_of[classes[0]]


def _path_of(name: str) -> list[str]:
    """'Mixed_5b.branch1x1.conv.weight' -> mixed_5b, branch1x1, weight; a name of another form stays as it is."""
    if name in ("fc.weight", "fc.bias"):
        return ["logits", name.removeprefix("fc.")]
    for theirs, ours in LEAVES.items():
        if name.endswith("." + theirs):
            module = _CONV.sub(r"conv_\1", name.removesuffix("." + theirs)).replace("Mixed_", "mixed_")
            return [*module.split("."), ours]
    return name.split(".")
