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


def assert_every_weight_matters(function, params, tolerance, *, min_change=0.0):
    """Half a standard deviation of noise on any leaf changes an output of `function` by more than the tolerance.

    min_change: of the noise's standard deviation, for leaves that are nearly constant.
    """
    leaves, tree = jax.tree.flatten(params)
    outputs = function(params)
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        noise = np.random.default_rng(index).standard_normal(leaf.shape)
        changed = list(leaves)
        changed[index] = (leaf + max(0.5 * leaf.std(), min_change) * noise).astype(np.float32)
        pairs = zip(function(jax.tree.unflatten(tree, changed)), outputs, strict=True)
        assert max(np.abs(new - old).max() / np.abs(old).max() for new, old in pairs) > tolerance, path


def assert_near(got, want, tolerance):
    """Arrays of the same shapes, at most `tolerance` apart in terms of the largest value of each."""
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape and one.dtype == np.float32
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()
