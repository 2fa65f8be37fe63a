"""The products with hand-written gradients: equal to slow formulas, on one device and on several."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models.ops import conv, doubling_conv, linear, plain_conv


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "inputs"),
    [((3, 5, 4), (4, 7), 1), ((3, 5, 7), (7, 2), 1), ((6, 4), (4, 3, 2, 5), 1), ((3, 2, 4, 5), (4, 5, 3), 2)],
)
def test_linear_and_its_gradients_equal_einsum(x_shape, weight_shape, inputs):
    """Both branches of the gradient: output wider and narrower than the input, one and several dimensions."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=x_shape), rng.normal(size=weight_shape)
    letters = "abcdefgh"
    of_x, rest = letters[: len(x_shape)], letters[len(x_shape) : len(x_shape) + len(weight_shape) - inputs]
    formula = f"{of_x},{of_x[-inputs:]}{rest}->{of_x[:-inputs]}{rest}"
    cotangent = rng.normal(size=np.einsum(formula, x, weight).shape)

    def through(product):
        return jax.vjp(product, x, weight)[1](jnp.asarray(cotangent, jnp.float32))

    np.testing.assert_allclose(linear(x, weight, inputs), np.einsum(formula, x, weight), rtol=1e-5, atol=1e-5)
    got, want = through(lambda x, w: linear(x, w, inputs)), through(lambda x, w: jnp.einsum(formula, x, w))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "inputs", "axes"),
    [
        ((8, 5, 8), (8, 6), 1, ("embed", "mlp")),
        ((8, 5, 6), (6, 8), 1, ("mlp", "embed")),
        ((8, 5, 8), (8, 3, 2, 5), 1, ("embed", "qkv", "heads", "head")),
        ((8, 5, 2, 3), (2, 3, 12), 2, ("heads", "head", "embed")),
    ],
)
def test_on_a_mesh_each_device_receives_its_part_of_a_gradient_alone(x_shape, weight_shape, inputs, axes):
    mesh = make_mesh({"replica": 2, "fsdp": 4})
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in (x_shape, weight_shape))
    rows = jax.sharding.NamedSharding(mesh, sharding.spec(x_shape, ("batch", *[None] * (x.ndim - 1)), mesh))
    place = jax.sharding.NamedSharding(mesh, sharding.spec(weight_shape, axes, mesh))

    def loss(x, weight, axes=None):
        return jnp.square(linear(x, weight, inputs, axes)).sum()

    def on_mesh(x, weight):
        with sharding.use(mesh):
            return jax.grad(loss, (0, 1))(x, weight, axes)

    compiled = jax.jit(on_mesh, in_shardings=(rows, place), out_shardings=(rows, place)).lower(x, weight).compile()
    assert "reduce-scatter" in compiled.as_text()
    got, want = compiled(*jax.device_put((x, weight), (rows, place))), jax.grad(loss, (0, 1))(x, weight)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


# kernel, channels in and out: one product of matrices, several with what has fewer channels in rows, and none
CONVOLUTIONS = [(1, 5, 7), (3, 16, 36), (3, 36, 16), (3, 33, 33), (5, 3, 33), (3, 6, 6), (7, 3, 17)]


def gradients(function, kernel, inputs, outputs, dtype=np.float32):
    """The program that differentiates `function(x, weight)`, and its arguments."""
    rng = np.random.default_rng(0)
    shapes = (2, 6, 8, inputs), (kernel, kernel, inputs, outputs), (2, 6, 8, outputs)
    args = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return jax.jit(lambda x, weight, cotangent: jax.vjp(function, x, weight)[1](cotangent)), args


@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_gradients_of_a_convolution_are_sums_over_its_taps(sizes):
    kernel, pad = sizes[0], sizes[0] // 2
    program, args = gradients(conv, *sizes)
    by_x, by_weight = program(*args)
    x, weight, cotangent = (np.asarray(arg, np.float64) for arg in args)
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    expected_x, expected_weight = np.zeros_like(padded), np.zeros_like(weight)
    for i, j in np.ndindex(kernel, kernel):
        window = np.s_[:, i : i + 6, j : j + 8]
        expected_weight[i, j] = np.einsum("bhwi,bhwo->io", padded[window], cotangent)
        expected_x[window] += np.einsum("bhwo,io->bhwi", cotangent, weight[i, j])
    # Sums of at most 850 products of normal numbers, of size 200 at most: 1e-5 is the last bit of 200, errors average.
    np.testing.assert_allclose(by_weight, expected_weight, atol=1e-4)
    np.testing.assert_allclose(by_x, expected_x[:, pad : pad + 6, pad : pad + 8], atol=2e-4)


@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_gradients_of_a_convolution_over_a_cut_batch(sizes):
    program, args = gradients(conv, *sizes)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
    places = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("batch",), (), ("batch",))
    ]
    cut = jax.tree.map(jax.device_put, args, places)
    for found, whole in zip(program(*cut), program(*args), strict=True):
        np.testing.assert_allclose(found, whole, atol=2e-4)  # as above


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_a_convolution_keep_their_dtype(dtype):
    for sizes in CONVOLUTIONS[:2]:
        program, args = gradients(conv, *sizes, dtype=dtype)
        assert [leaf.dtype for leaf in program(*args)] == [dtype] * 2


def doubled(x_BHWC, weight):
    """float64, by loops over the taps: a 3x3 convolution of x repeated twice along both sides, or every position of x
    spread over 4 x 4 of the result, which begin one before twice its place."""
    B, H, W, _ = x_BHWC.shape
    kernel = len(weight)
    y = np.zeros((B, 2 * H + 2, 2 * W + 2, weight.shape[-1]))  # one more at each side
    if kernel == 3:
        repeated = np.pad(x_BHWC.repeat(2, 1).repeat(2, 2), ((0, 0), (1, 1), (1, 1), (0, 0)))
        for i, j in np.ndindex(3, 3):
            y[:, 1:-1, 1:-1] += repeated[:, i : i + 2 * H, j : j + 2 * W] @ weight[i, j]
    else:
        for i, j in np.ndindex(4, 4):
            y[:, i : i + 2 * H : 2, j : j + 2 * W : 2] += x_BHWC @ weight[i, j]
    return y[:, 1:-1, 1:-1]


@pytest.mark.parametrize("kernel", [3, 4])
def test_a_doubling_convolution_and_its_gradients_are_sums_over_taps(kernel):
    """It is linear in x and in the weight, so its gradients are what makes the same sum of products."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(kernel, kernel, 4, 6))
    cotangent = rng.normal(size=(2, 6, 10, 6))

    @jax.jit
    def program(x, weight, cotangent):
        y, back = jax.vjp(lambda x, weight: doubling_conv(x, weight, jax.lax.Precision.HIGHEST), x, weight)
        return y, *back(cotangent)

    y, by_x, by_weight = program(*(np.asarray(a, np.float32) for a in (x, weight, cotangent)))
    np.testing.assert_allclose(y, doubled(x, weight), atol=1e-5)
    for found, place in ((by_x, x), (by_weight, weight)):
        direction = rng.normal(size=place.shape)
        moved = doubled(direction, weight) if place is x else doubled(x, direction)
        np.testing.assert_allclose((found * direction).sum(), (moved * cotangent).sum(), rtol=1e-4)


@pytest.mark.parametrize(("kernel", "before"), [(3, 0), (4, 1)])
def test_a_halving_convolution_pads_as_tensorflow_does(kernel, before):
    """Zeros before and behind even sides: none and one for a kernel of 3, one and one for a kernel of 4."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(1, 6, 4, 2)), rng.normal(size=(kernel, kernel, 2, 3))
    padded = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    wanted = np.zeros((1, 3, 2, 3))
    for i, j in np.ndindex(kernel, kernel):
        wanted += padded[:, i : i + 5 : 2, j : j + 3 : 2] @ weight[i, j]
    np.testing.assert_allclose(plain_conv(jnp.asarray(x), jnp.asarray(weight), stride=2), wanted, atol=1e-5)


@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_only_a_cpu_computes_the_gradient_of_the_weight_another_way(sizes):
    def lowered(function, platform):
        program, args = gradients(function, *sizes)
        lines = program.trace(*args).lower(lowering_platforms=(platform,)).as_text().splitlines()
        kept = [line for line in lines if any(n in line for n in ("convolution(", "dot_general", "barrier"))]
        return sorted(re.sub(r"%\w+", "%", line).strip() for line in kept)

    precision = jax.lax.Precision.HIGHEST

    def plain(x, weight):
        if len(weight) == 1:
            return jnp.einsum("bhwi,io->bhwo", x, weight[0, 0], precision=precision)
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=names, precision=precision)

    ours = lambda x, weight: conv(x, weight, precision)  # noqa: E731
    for platform in ("cuda", "rocm", "tpu"):
        assert len(lowered(plain, platform)) == 2 and lowered(ours, platform) == lowered(plain, platform)
    found, products = lowered(ours, "cpu"), 1 + sizes[0]  # one for x, and for the weight one for each row of taps
    if sizes[0] > 1 and max(sizes[1:]) <= 32:
        assert found == lowered(plain, "cpu")
        return
    assert found != lowered(plain, "cpu") and sum(line.count("HIGHEST") for line in found) == 2 * products
