"""Inception v3 as pytorch-fid and torchvision publish it, as a model directory of this package.

Both use torchvision's names (`Mixed_5b.branch1x1.conv.weight`) and torch's layouts. Which of the two a file is, and so
which pools its network has, is told by the number of classes. The auxiliary classifier, which serves training only,
is left out.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax import model_dir
from dalle_jax.checkpoint import digest
from dalle_jax.convert.state_dict import read_state_dict
from dalle_jax.errors import UserError
from dalle_jax.models import Params, inception

PUBLISHED = "pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or torchvision's inception_v3_google-*.pth"
_IGNORED = re.compile(r"AuxLogits\..*|.*\.num_batches_tracked")
_LEAVES = {
    "conv.weight": "weight",
    "bn.weight": "gain",
    "bn.bias": "bias",
    "bn.running_mean": "mean",
    "bn.running_var": "variance",
}
_CONV = re.compile(r"Conv2d_(\d[ab])_\dx\d")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="FILE", help=f"{PUBLISHED}; or the same arrays as .safetensors")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model directory is written")


def main(args: argparse.Namespace) -> int:
    if os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        raise UserError(f"expected --out to be a new or empty directory, got {args.out}: choose another")
    config, params = convert(read_state_dict(args.weights))
    model_dir.save(args.out, {"name": "inception", "model": dataclasses.asdict(config)}, params)
    print(f"{config.pools} network, {config.classes} classes, sha256 of its parameters {digest.of_tree(params)}")
    print(f"written to {args.out}")
    return 0


def convert(state: Mapping[str, np.ndarray]) -> tuple[inception.InceptionConfig, Params]:
    """A state dict in torchvision's names -> config and parameters (numpy float32) of `models.inception`.

    Raises:
      UserError: an array is missing, left over, not finite or of another shape than those of the published networks.
    """
    pools_of = {classes: pools for pools, classes in inception.CLASSES.items()}
    classes = np.shape(state["fc.weight"])[:1] if "fc.weight" in state else ()
    pools = pools_of.get(classes[0]) if classes else None
    if pools is None:
        found = f"{classes[0]} classes" if classes else "no fc.weight"
        raise UserError(f"expected an Inception v3 of 1008 or 1000 classes, got {found}: give {PUBLISHED}")
    params: Params = {}
    for name, array in state.items():
        if _IGNORED.fullmatch(name):
            continue
        array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"expected finite weights, got others in {name}: fetch the file again")
        *path, leaf = _our_path(name)
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
    weight = params["logits"]["weight"]
    params["logits"]["weight"] = np.ascontiguousarray(weight.T)
    config = inception.InceptionConfig(pools=pools)
    model_dir.check_params(params, inception.model(config).abstract, where="the state dict")
    return config, params


def _our_path(name: str) -> list[str]:
    """'Mixed_5b.branch1x1.conv.weight' -> mixed_5b, branch1x1, weight; a name of no such form as it is."""
    if name in ("fc.weight", "fc.bias"):
        return ["logits", name.removeprefix("fc.")]
    for theirs, ours in _LEAVES.items():
        if name.endswith("." + theirs):
            module = _CONV.sub(r"conv_\1", name.removesuffix("." + theirs)).replace("Mixed_", "mixed_")
            return [*module.split("."), ours]
    return name.split(".")
