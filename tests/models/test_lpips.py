"""LPIPS and the edge error against slow formulas; tests/convert/test_lpips.py has the published network's numbers."""

import jax
import numpy as np
import pytest

from dalle_jax.models import lpips
from tests.support.parameters import random_parameters

NARROW = 32  # of VGG16's channels one in so many


def slow_conv(x_HWC, weight, bias):
    """A 3x3 convolution with zeros around, one position after the other."""
    H, W, _ = x_HWC.shape
    padded = np.pad(x_HWC, ((1, 1), (1, 1), (0, 0)))
    windows = [[padded[i : i + 3, j : j + 3] for j in range(W)] for i in range(H)]
    return np.einsum("hwijc,ijco->hwo", windows, weight) + bias


def slow_lpips(params, x_HWC, y_HWC):
    """Zhang et al. 2018, equation 1, in float64, for pictures in [0, 1]."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet
    features = [(z - mean) / deviation for z in (x_HWC, y_HWC)]
    total = 0.0
    for stage, count in enumerate((2, 2, 3, 3, 3), 1):
        for which in (0, 1):
            z = features[which]
            if stage > 1:
                z = np.array([[z[i : i + 2, j : j + 2].max((0, 1)) for j in range(0, z.shape[1] // 2 * 2, 2)]
                              for i in range(0, z.shape[0] // 2 * 2, 2)])  # fmt: skip
            for place in range(1, count + 1):
                layer = params[f"conv{stage}_{place}"]
                z = np.maximum(slow_conv(z, layer["weight"], layer["bias"]), 0)
            features[which] = z
        one, other = (z / (np.sqrt((z**2).sum(-1, keepdims=True)) + 1e-10) for z in features)
        total += ((one - other) ** 2 * params[f"linear{stage}"]["weight"]).sum(-1).mean()
    return total


def slow_edge_error(x_HWC, y_HWC):
    errors = []
    for side in (1, 2, 4):
        H, W = x_HWC.shape[0] // side, x_HWC.shape[1] // side
        squares = [[np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side] for j in range(W)] for i in range(H)]
        x, y = (np.array([[z[square].mean((0, 1)) for square in row] for row in squares]) for z in (x_HWC, y_HWC))
        edges = []
        for i in range(H):
            for j in range(W):
                if i + 1 < H:
                    edges.append(np.abs((x[i + 1, j] - x[i, j]) - (y[i + 1, j] - y[i, j])))
                if j + 1 < W:
                    edges.append(np.abs((x[i, j + 1] - x[i, j]) - (y[i, j + 1] - y[i, j])))
        if edges:
            errors.append(np.mean(edges))
    return np.mean(errors)


@pytest.fixture(scope="module")
def narrow():
    """A definition, parameters whose units live, and compiled distances with their gradients by the first picture."""
    model = lpips.model(lpips.LPIPSConfig(narrow=NARROW))
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else np.abs(leaf), random_parameters(model))

    def total(params, x, y):
        distances_B = lpips.distance(model, params, x, y)
        return distances_B.sum(), distances_B

    return model, params, jax.jit(jax.grad(total, argnums=1, has_aux=True))


def pictures(*shape):
    return np.random.default_rng(len(shape)).random((2, *shape, 3)).astype(np.float32)


def test_lpips_and_its_gradient_are_their_formulas(narrow):
    _, params, measure = narrow
    x, y = pictures(18, 21), 1 - pictures(18, 21)
    gradient, got = measure(params, x, y)
    want = [slow_lpips(params, *pair) for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert min(want) > 0.01
    direction = np.random.default_rng(3).standard_normal(x.shape)
    ahead, behind = (slow_lpips(params, (x + step * direction)[0], y[0]) for step in (1e-5, -1e-5))
    np.testing.assert_allclose((np.asarray(gradient) * direction)[0].sum(), (ahead - behind) / 2e-5, rtol=1e-3)


def test_pictures_of_one_color_have_gradients(narrow):
    """Where a stage says nothing at all, its channels have no length to divide by."""
    _, params, measure = narrow
    dead = jax.tree.map(lambda leaf: np.full_like(leaf, -100) if leaf.ndim == 1 else leaf, params)
    x, y = np.zeros((2, 18, 21, 3), np.float32), np.stack([np.full((18, 21, 3), level, np.float32) for level in (0, 1)])
    for weights in (params, dead):
        assert all(np.isfinite(found).all() for pair in ((x, y), (y, x)) for found in measure(weights, *pair))
    assert not np.any(measure(dead, x, y)[0])


@pytest.mark.parametrize("shape", [(9, 14), (1, 6)])
def test_the_edge_error_is_its_formula(shape):
    x, y = pictures(*shape), 1 - pictures(*shape)[::-1]
    want = [slow_edge_error(*pair) for pair in zip(x, y, strict=True)]
    np.testing.assert_allclose(jax.jit(lpips.edge_error)(x, y), want, rtol=1e-5)


def test_the_edge_error_of_equal_pictures_of_blur_and_of_one_color():
    x = pictures(16, 16)[0]
    blurred = (x + np.roll(x, 1, 0) + np.roll(x, 1, 1)) / 3
    flat = np.full_like(x, 0.5)

    def total(x, y):
        errors_B = lpips.edge_error(x, y)
        return errors_B.sum(), errors_B

    gradient, error = jax.jit(jax.grad(total, has_aux=True))(
        np.stack([x, x, x, flat]), np.stack([x, x + 0.25, blurred, flat])
    )
    assert error[0] == error[3] == 0 and error[1] < 1e-6  # color is no edge
    assert error[2] > 0.1 and np.isfinite(gradient).all()
    for shape in ((2, 1, 1, 3), (0, 16, 16, 3)):
        assert jax.eval_shape(lpips.edge_error, *(np.zeros(shape, np.float32),) * 2).shape == shape[:1]


def test_impossible_sizes_are_refused(narrow):
    model, *_ = narrow
    for shapes in (((1, 15, 16, 3),) * 2, ((1, 16, 16, 3), (1, 16, 17, 3)), ((1, 16, 16, 1),) * 2):
        with pytest.raises(ValueError, match="16 pixels"):
            jax.eval_shape(model.apply, model.abstract, *(np.zeros(shape, np.float32) for shape in shapes))
    for bad in (0, 3, 128):
        with pytest.raises(ValueError, match="narrow"):
            lpips.LPIPSConfig(narrow=bad)
