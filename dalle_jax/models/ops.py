"""Products with weights, and the gradients of them that XLA's backends need: `linear`, `conv` and `doubling_conv`.

Each custom gradient equals the one that JAX derives, to rounding; its comment says when it can be deleted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x, weight, inputs: int = 1, axes: tuple[str | None, ...] | None = None):
    """Contracts the last `inputs` dimensions of x with the first of weight, in their order.

    axes: logical names of weight's dimensions, by which a mesh cuts its gradient.
    """
    return jnp.tensordot(x, weight, inputs)


def _linear_forward(x, weight, inputs, axes):
    return linear(x, weight, inputs, axes), (x, weight)


def _linear_backward(inputs, axes, saved, cotangent):
    x, weight = saved
    outputs = weight.ndim - inputs
    over_outputs = tuple(range(cotangent.ndim - outputs, cotangent.ndim)), tuple(range(inputs, weight.ndim))
    by_x = jnp.tensordot(cotangent, weight, over_outputs)
    if axes and (kept := sharding.kept_part(weight.shape, axes, batch=len(x))):
        return by_x, _gradient_by_parts(x, cotangent, weight.shape, inputs, *kept)
    leading = (tuple(range(x.ndim - inputs)),) * 2
    if x.size <= cotangent.size:
        return by_x, jnp.tensordot(x, cotangent, leading)
    # XLA's CPU backend copies the factor that a product transposes, a sixth of the time of a layer where the output is
    # wide, so that is the smaller one. Delete this when it multiplies transposed matrices in place.
    by_weight = jnp.tensordot(cotangent, x, leading)
    return by_x, jnp.moveaxis(by_weight, range(outputs, weight.ndim), range(inputs))


linear.defvjp(_linear_forward, _linear_backward)


def _gradient_by_parts(x, cotangent, shape, inputs, cut, mesh_axes):
    """The gradient of a weight of which each device along these mesh axes keeps one part of dimension `cut`.

    The parts are an outermost dimension of their own while the devices' shares are summed, and that sum is written
    out (`sharding.sum_by_parts`). Left alone, libtpu sums the whole gradient on every device: parts of, say, 31 rows
    do not fit the tiles in which a TPU lays out the two innermost dimensions. Delete this when `dalle-jax preflight
    --config configs/transformer.py:12b --topology tpu:v5p:8x8x16` lists reduce-scatters along fsdp without it.
    """
    leading = x.ndim - inputs
    factors = [(x, list(range(inputs))), (cotangent, list(range(inputs, len(shape))))]  # and their dimensions of weight
    if cut >= inputs:
        factors.reverse()
    (first, firsts), (second, seconds) = factors
    place = firsts.index(cut)

    def product(first, second, parts):
        dimension = leading + place
        split = first.reshape(*first.shape[:dimension], parts, -1, *first.shape[dimension + 1 :])
        return jnp.tensordot(jnp.moveaxis(split, dimension, leading), second, (tuple(range(leading)),) * 2)

    joined = jnp.moveaxis(sharding.sum_by_parts(product, first, second, axes=mesh_axes), 0, place)
    joined = joined.reshape([shape[i] for i in (*firsts, *seconds)])
    return jnp.moveaxis(joined, range(len(shape)), (*firsts, *seconds))


def plain_conv(x_BHWC, weight, precision: jax.lax.Precision | None = None, *, stride: int = 1, padding="SAME"):
    """A convolution of [B, H, W, I] with [height, width, I, O], with JAX's gradient; a 1x1 one is a matrix product."""
    if weight.shape[:2] == (1, 1):  # faster on a CPU. Delete this when XLA sees it.
        return jnp.einsum("bhwi,io->bhwo", x_BHWC, weight[0, 0], precision=precision)
    return jax.lax.conv_general_dilated(
        x_BHWC,
        weight,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


# Channels up to which XLA derives the gradient of a kernel on a CPU as fast as `_by_weight_as_matrices`, or two to four
# times as fast (32x32 pixels, 32 channels to 32, a batch of 32: 29 ms against 54).
NARROW = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x_BHWC, weight, precision: jax.lax.Precision | None = None):
    """`plain_conv` of stride 1; on a CPU the gradient of the weight is computed another way."""
    return plain_conv(x_BHWC, weight, precision)


def _conv_forward(x_BHWC, weight, precision):
    return conv(x_BHWC, weight, precision), (x_BHWC, weight)


def _conv_backward(precision, saved, cotangent_BHWC):
    x_BHWC, weight = saved
    (by_x,) = jax.linear_transpose(lambda x: plain_conv(x, weight, precision), x_BHWC)(cotangent_BHWC)

    def by_weight(x_BHWC, cotangent_BHWC):
        return jax.linear_transpose(lambda weight: plain_conv(x_BHWC, weight, precision), weight)(cotangent_BHWC)[0]

    def on_cpu(x_BHWC, cotangent_BHWC):
        return _by_weight_as_matrices(x_BHWC, cotangent_BHWC, kernel=len(weight), precision=precision)

    if len(weight) > 1 and max(weight.shape[2:]) <= NARROW:
        return by_x, by_weight(x_BHWC, cotangent_BHWC)
    return by_x, jax.lax.platform_dependent(x_BHWC, cotangent_BHWC, cpu=on_cpu, default=by_weight)


conv.defvjp(_conv_forward, _conv_backward)


def _by_weight_as_matrices(x_BHWC, cotangent_BHWC, *, kernel: int, precision):
    """The gradient of a kernel [kernel, kernel, I, O], an odd one, as products of matrices, one for each of its rows.

    As JAX derives it, it is a convolution whose kernel is as large as the image, for which XLA's CPU backend takes up
    to ten times as long. Delete this when `python -m benchmarks.peers.compare --peer vqgan` trains as fast without.
    """
    inputs, outputs = x_BHWC.shape[-1], cotangent_BHWC.shape[-1]
    if kernel == 1:  # over three dimensions a factor would first be copied, transposed
        x, cotangent = (a.reshape(-1, a.shape[-1]) for a in (x_BHWC, cotangent_BHWC))
        return jnp.tensordot(x, cotangent, (0, 0), precision=precision)[None, None]
    # Without the barriers XLA transposes both in slow loops together with what they are computed from.
    x_BHWC, cotangent_BHWC = jax.lax.optimization_barrier((x_BHWC, cotangent_BHWC))
    _, H, W, _ = x_BHWC.shape

    def shifted(a_BHWC):
        """For each row of taps [B * H * W, kernel * channels]: a row of taps' neighbors at every position."""
        pad = (kernel // 2, kernel // 2)
        padded = jnp.pad(a_BHWC, ((0, 0), pad, pad, (0, 0)))
        rows = jnp.concatenate([padded[:, :, j : j + W] for j in range(kernel)], axis=-1)
        rows = jax.lax.optimization_barrier(rows)
        return [rows[:, i : i + H].reshape(-1, rows.shape[-1]) for i in range(kernel)]

    # The one with fewer channels is what lies kernel-fold in memory.
    if inputs < outputs:
        cotangent = cotangent_BHWC.reshape(-1, outputs)
        parts = [jnp.tensordot(rows, cotangent, (0, 0), precision=precision) for rows in shifted(x_BHWC)]
        return jnp.stack(parts).reshape(kernel, kernel, inputs, outputs)
    x = jax.lax.optimization_barrier(x_BHWC.reshape(-1, inputs).T)
    parts = [jnp.matmul(x, rows, precision=precision) for rows in shifted(cotangent_BHWC)]
    # What x is to the cotangent, the cotangent is to x in reverse.
    by_weight = jnp.stack(parts).reshape(kernel, inputs, kernel, outputs)[::-1, :, ::-1]
    return by_weight.swapaxes(1, 2)


# Where a kernel's taps lie when the sides double: size of the kernel -> [row of the result, even or odd][the nearer or
# the later of the two rows of the input that it sees][tap]. An even row 2i sees rows i - 1 and i, an odd one 2i + 1
# rows i and i + 1. With 3 taps over rows that were repeated, two taps meet in one row; 4 taps are transposed, so that
# tap t of row i lands in row 2i + t - 1.
_TAPS = {
    3: np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32),
    4: np.array([[[0, 0, 0, 1], [0, 1, 0, 0]], [[0, 0, 1, 0], [1, 0, 0, 0]]], np.float32),
}


def doubling_conv(x_BHWC, weight, precision: jax.lax.Precision | None = None):
    """[B, H, W, I] -> [B, 2H, 2W, O] by a kernel [3, 3, I, O] or [4, 4, I, O].

    3: the rows and columns are repeated, then convolved ('same'); 4: the transposed convolution of stride 2 ('same').
    Either way a position of the result depends on 2 x 2 of x, so this is one convolution of x with a kernel of 2 for
    each of the four kinds of positions: 16 products, where 36 and, with the zeros in between, 64 would be computed.
    """
    taps = _TAPS[len(weight)].astype(weight.dtype)
    B, H, W, _ = x_BHWC.shape
    *_, inputs, outputs = weight.shape
    # rows a, columns b of what a position sees; even or odd rows p, columns q; exact sums where taps meet
    weights = jnp.einsum("pat,qbu,tuio->abipqo", taps, taps, weight, precision=jax.lax.Precision.HIGHEST)
    y = _conv_of_two(x_BHWC, weights.reshape(2, 2, inputs, -1), precision)
    y = y.reshape(B, H + 1, W + 1, 2, 2, outputs)
    y = jnp.stack([y[:, :-1, :, 0], y[:, 1:, :, 1]], axis=2)  # B H p W q O
    y = jnp.stack([y[:, :, :, :-1, 0], y[:, :, :, 1:, 1]], axis=4)
    return y.reshape(B, 2 * H, 2 * W, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_of_two(x_BHWC, weight, precision):
    """A convolution with a kernel of 2, of x between zeros: [B, H, W, I] -> [B, H + 1, W + 1, O]."""
    return plain_conv(x_BHWC, weight, precision, padding=((1, 1), (1, 1)))


def _conv_of_two_forward(x_BHWC, weight, precision):
    return _conv_of_two(x_BHWC, weight, precision), (x_BHWC, weight)


def _conv_of_two_backward(precision, saved, cotangent_BHWC):
    # The weight's gradient is four products of matrices: as the convolution that JAX derives, the kernel is as large as
    # the image, and XLA's CPU backend takes a hundred times as long. Delete this when it does not.
    x_BHWC, weight = saved
    by_x = plain_conv(cotangent_BHWC, weight[::-1, ::-1].swapaxes(2, 3), precision, padding="VALID")
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cotangent = cotangent_BHWC.reshape(-1, weight.shape[-1])
    H, W = cotangent_BHWC.shape[1:3]
    by_weight = [
        jnp.tensordot(
            padded[:, i : i + H, j : j + W].reshape(len(cotangent), -1), cotangent, (0, 0), precision=precision
        )
        for i in (0, 1)
        for j in (0, 1)
    ]
    return by_x, jnp.stack(by_weight).reshape(weight.shape)


_conv_of_two.defvjp(_conv_of_two_forward, _conv_of_two_backward)
