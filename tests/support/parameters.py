"""Parameters that are none of them zero, so that a test sees what it would hide; by numpy, which compiles nothing."""

import jax
import numpy as np


def random_parameters(model, *, seed=0, deviation=0.3):
    """Nested dict of numpy arrays: gains about 1, all else about 0."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        fill = 1.0 if path[-1].key.endswith("gain") else 0.0
        return rng.normal(fill, deviation, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(random, model.abstract)
