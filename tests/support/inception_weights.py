"""Inception's published state dicts with seeded random numbers, and torchvision where it imports at all."""

import zlib

import jax
import numpy as np
import pytest

from dalle_jax.convert.inception import LEAVES
from dalle_jax.models import inception


def torch_names(pools: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict, told from our definition backwards."""
    config = inception.InceptionConfig(pools=pools)
    kernels = {"1a": "3x3", "2a": "3x3", "2b": "3x3", "3b": "1x1", "4a": "3x3"}
    theirs = {ours: name for name, ours in LEAVES.items()}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(inception.model(config).abstract):
        *modules, last = (key.key for key in path)
        if modules == ["logits"]:
            found[f"fc.{last}"] = leaf.shape[::-1]
            continue
        if modules[0].startswith("conv_"):
            place = modules[0].removeprefix("conv_")
            modules = [f"Conv2d_{place}_{kernels[place]}"]
        name = ".".join(modules).replace("mixed_", "Mixed_")
        shape = leaf.shape if leaf.ndim == 1 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
        found[f"{name}.{theirs[last]}"] = shape
    return found


def state_dict(pools: str) -> dict[str, np.ndarray]:
    """A state dict of random numbers that keep activations near 1; each array has its name's own seed."""
    state = {}
    for name, shape in torch_names(pools).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) > 1:
            value = rng.standard_normal(shape, np.float32) * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        state[name] = value.astype(np.float32)
    return state


def import_torchvision(why: str):
    """torch, with torchvision imported as well; skips the test for this reason where either is missing."""
    torch = pytest.importorskip("torch", reason=why)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a build without its compiled operators, of which nothing here is used
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")
    except ImportError:
        pytest.skip(why)
    return torch
