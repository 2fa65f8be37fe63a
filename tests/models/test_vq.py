"""Image tokenizers with a codebook: the networks against slow formulas, Haiku's layers and by what each output may
depend on. `tests/convert/test_vqgan.py` compares VQGAN with its original, `test_vq_quantizer.py` has the codebook."""

import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dalle_jax import pixels, sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build, image_tokenizer
from dalle_jax.models.vq import patches, vqgan
from dalle_jax.models.vq.config import VQConfig
from tests.support.parameters import random_parameters
from tests.support.tiny_vq import EVERY, PATCHES, VQVAE, brute_force, normal, some_images


def run(model, params, *args, method):
    return jax.jit(lambda params, *args: model.apply(params, *args, method=method))(params, *args)


class Tokenizer:
    """A model with random parameters, in which every position has a color of its own; what it makes of images."""

    def __init__(self, name):
        self.model = model = build("vq", EVERY[name])
        self.params = random_parameters(model)
        stride = model.config.stride
        self.images = some_images(2, 3, 5).repeat(stride, 1).repeat(stride, 2)
        self.tokens = np.arange(30).reshape(2, 3, 5) % 24

        @jax.jit  # one program, in which what several results share is compiled once
        def everything(params, images, tokens):
            def apply(*args, method):
                return model.apply(params, *args, method=method)

            x = pixels.to_range(pixels.to_unit(images), model.config.pixel_range)
            looked_up = apply(tokens, method="look_up")
            return {
                "encoded": apply(x, method="encode"),
                "tokens": image_tokenizer.encode(model, params, images),
                "looked_up": looked_up,
                "decoded": apply(looked_up, method="decode"),
                "images": image_tokenizer.decode(model, params, tokens),
            }

        self.everything = everything
        self.results = everything(self.params, self.images, self.tokens)


@pytest.fixture(scope="module", params=EVERY)
def tokenizer(request):
    return Tokenizer(request.param)


def test_any_multiples_of_the_stride_are_encoded_and_decoded(tokenizer):
    config, results = tokenizer.model.config, tokenizer.results
    depth = config.vocab if config.quantizer == "gumbel" else config.code_dim
    for name, shape, dtype in (
        ("encoded", (2, 3, 5, depth), np.float32),
        ("tokens", (2, 3, 5), np.int32),
        ("looked_up", (2, 3, 5, config.code_dim), np.float32),
        ("decoded", tokenizer.images.shape, np.float32),
        ("images", tokenizer.images.shape, np.uint8),
    ):
        assert results[name].shape == shape and results[name].dtype == dtype, name
    height, width = 3 * config.stride, 5 * config.stride
    for shape in ((2, height + 1, width, 3), (2, height, width, 4), (height, width, 3)):
        with pytest.raises(ValueError, match=f"multiples of {config.stride}"):
            tokenizer.model.apply(tokenizer.params, np.zeros(shape, np.float32), method="encode")


def test_tokens_are_the_nearest_codes_or_the_largest_logits(tokenizer):
    config, results = tokenizer.model.config, tokenizer.results
    encoded = np.asarray(results["encoded"], np.float64)
    codes = np.asarray(tokenizer.params["quantizer"]["codebook"], np.float64)
    if config.unit_codes:
        encoded, codes = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (encoded, codes))
    wanted = encoded.argmax(-1) if config.quantizer == "gumbel" else brute_force(encoded, codes)
    assert len(np.unique(wanted)) > 1
    np.testing.assert_array_equal(results["tokens"], wanted)
    np.testing.assert_allclose(results["looked_up"], codes[tokenizer.tokens], rtol=1e-5, atol=1e-6)


def test_pixels_come_out_of_the_models_range(tokenizer):
    """Its ends are black and white, and what lies outside is clipped."""
    config = tokenizer.model.config
    low, high = {"symmetric": (-1, 1), "unit": (0, 1), "centered": (-0.5, 0.5)}[config.pixel_range]
    wanted = ((np.asarray(tokenizer.results["decoded"]) - low) / (high - low)).clip(0, 1) * 255
    np.testing.assert_array_equal(tokenizer.results["images"], wanted.round().astype(np.uint8))
    last = "up_0" if config.network == "vqvae" else "conv_out"
    params = dict(tokenizer.params, decoder=dict(tokenizer.params["decoder"]))
    zeros = jax.tree.map(np.zeros_like, params["decoder"][last])
    for share, level in ((0.0, 0), (0.2, 51), (0.8, 204), (1.0, 255), (-0.5, 0), (1.7, 255)):
        params["decoder"][last] = zeros | {"bias": zeros["bias"] + np.float32(low + share * (high - low))}
        images = tokenizer.everything(params, tokenizer.images, tokenizer.tokens)["images"]
        assert (np.asarray(images) == level).all()


@pytest.mark.parametrize("name", ["vqvae", "patches", "gumbel"])
def test_pixels_go_into_the_models_range(name):
    """White, black and grays; `tests/convert/test_vqgan.py` has VQGAN's own numbers."""
    tokenizer = Tokenizer(name)
    low, high = {"vqvae": (-0.5, 0.5), "patches": (-1, 1), "gumbel": (0, 1)}[name]
    x = np.float32(low) + np.float32(high - low) * (tokenizer.images / np.float32(255))
    found = run(tokenizer.model, tokenizer.params, x, method="encode")
    np.testing.assert_allclose(found, tokenizer.results["encoded"], atol=1e-5)


@pytest.mark.parametrize("name", ["vqvae", "patches", "gumbel"])
def test_every_parameter_takes_part(name):
    """`tests/convert/test_vqgan.py` says it of VQGAN."""
    model = build("vq", EVERY[name])
    params, x = random_parameters(model), pixels.to_unit(some_images(2, 16, 16))

    def total(params):
        encoded = model.apply(params, x, method="encode")
        if model.config.quantizer == "gumbel":
            q = jax.nn.softmax(encoded) @ params["quantizer"]["codebook"]
        else:
            q = encoded + model.apply(params, jnp.zeros(encoded.shape[:3], int), method="look_up")
        return jnp.square(model.apply(params, q, method="decode")).sum()

    grads = jax.jit(jax.grad(total))(params)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 1e-6 * largest, path


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16-global", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["vqgan", "vqvae", "patches"])
def test_rounding_to_16_bits_changes_little(name, precision):
    exact, rounded = (build("vq", EVERY[name] | {"precision": p}) for p in ("fp32", precision))
    params, q = random_parameters(exact, deviation=0.2), normal(1, 4, 4, 6)
    found, wanted = (run(model, params, q, method="decode") for model in (rounded, exact))
    assert found.dtype == jnp.float32
    assert 0 < np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_many_devices_give_the_numbers_of_one(name):
    """Batch and parameters cut over a mesh of 8; tokens, pixels and gradients."""
    model = build("vq", EVERY[name])
    params = random_parameters(model, deviation=0.2)
    x = pixels.to_unit(some_images(4, 16, 16))
    tokens = np.arange(64).reshape(4, 4, 4) % 24

    def everything(params, x):
        def total(params):
            decoded = model.apply(params, tokens, method="decode_tokens")
            return jnp.square(model.apply(params, x, method="encode")).mean() + jnp.square(decoded).mean()

        return model.apply(params, x, method="encode_tokens"), jax.value_and_grad(total)(params)

    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    places = sharding.shardings(model.abstract, model.axes, mesh), sharding.batch_sharding(mesh)

    def on_mesh(params, x):
        with sharding.use(mesh):
            return everything(params, x)

    found_tokens, found = jax.jit(on_mesh, in_shardings=places)(*jax.device_put((params, x), places))
    wanted_tokens, wanted = jax.jit(everything)(params, x)
    np.testing.assert_array_equal(found_tokens, wanted_tokens)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * largest)


# The networks


def test_the_vqvae_is_the_example_for_cifar_in_haikus_layers():
    """Two strided convolutions of 4x4, a 3x3 one, two residual blocks; transposed convolutions of 4x4. SAME padding."""
    model = build("vq", VQVAE | {"width": 64, "code_dim": 64, "vocab": 512, "image_size": 32})
    params = random_parameters(model, deviation=0.1)

    def stack(x):
        for _ in range(2):
            h = hk.Conv2D(32, 3)(jax.nn.relu(x))
            x = x + hk.Conv2D(128, 1)(jax.nn.relu(h))
        return jax.nn.relu(x)

    def encoder(x):
        x = jax.nn.relu(hk.Conv2D(64, 4, stride=2)(x))
        x = jax.nn.relu(hk.Conv2D(128, 4, stride=2)(x))
        x = stack(hk.Conv2D(128, 3)(x))
        return hk.Conv2D(64, 1)(x)

    def decoder(x):
        x = stack(hk.Conv2D(128, 3)(x))
        x = jax.nn.relu(hk.Conv2DTranspose(64, 4, stride=2)(x))
        return hk.Conv2DTranspose(3, 4, stride=2)(x)

    blocks = [("stack", f"block_{i}_conv_{j}") for i in (0, 1) for j in (1, 2)]
    encoders = [("encoder", *path) for path in (("down_0",), ("down_1",), ("conv",), *blocks)] + [("quant_conv",)]
    decoders = [("decoder", *path) for path in (("conv",), *blocks, ("up_1",), ("up_0",))]
    for method, function, paths, x in (
        ("encode", encoder, encoders, normal(2, 32, 16, 3)),
        ("decode", decoder, decoders, normal(2, 8, 4, 64)),
    ):
        theirs = hk.without_apply_rng(hk.transform(function))
        shapes = jax.eval_shape(theirs.init, jax.random.key(0), x)
        filled = {}
        # Haiku numbers modules in the order of their making, the transposed ones apart.
        made = sorted(shapes, key=lambda name: ("transpose" in name, name.count("_"), name))
        for module, path in zip(made, paths, strict=True):
            ours = params
            for key in path:
                ours = ours[key]
            # A transposed convolution of Haiku's has outputs before inputs, and its kernel turned by half a circle.
            turned = "transpose" in module
            weight = ours["weight"][::-1, ::-1].swapaxes(2, 3) if turned else ours["weight"]
            assert weight.shape == shapes[module]["w"].shape, (module, path)
            filled[module] = {"w": weight, "b": ours["bias"]}
        wanted = jax.jit(theirs.apply)(filled, x)
        found = run(model, params, x, method=method)
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("mean", "deviation"), [(1_000.0, 1.0), (0.0, 1e-3)])
def test_a_group_norm_is_the_formula(mean, deviation):
    """Against float64. A variance taken as a difference of squares would be lost at a mean of a thousand deviations,
    and at deviations of a thousandth what is added to the variance is as large as it."""
    x = (mean + deviation * normal(2, 4, 6, 64)).astype(np.float32)
    gain, bias = normal(64, seed=1), normal(64, seed=2)
    groups = x.astype(np.float64).reshape(2, 4, 6, 32, 2)
    centered = groups - groups.mean((1, 2, 4), keepdims=True)
    wanted = (centered / np.sqrt((centered**2).mean((1, 2, 4), keepdims=True) + 1e-6)).reshape(x.shape) * gain + bias
    found = vqgan.GroupNorm.__call__(types.SimpleNamespace(gain=gain, bias=bias), x)
    np.testing.assert_allclose(found, wanted, atol=2e-3)  # 1,000 in float32 is exact to 6e-5, at a deviation of 1


@pytest.mark.parametrize("deviation", [1.0, 1e-3])
def test_a_block_on_patches_is_the_formula(deviation):
    """x + W2 silu(W1 * (gain x / rms)), float64, tap by tap."""
    level = patches.Level(8, 1, VQConfig(**PATCHES), nnx.Rngs(0))
    weight_1, weight_2, gain = normal(3, 3, 8, 8), normal(8, 8, seed=1), normal(8, seed=2)
    bias_1, bias_2 = normal(8, seed=3), normal(8, seed=4)
    level.block_0_conv_1.weight[...], level.block_0_conv_1.bias[...] = weight_1, bias_1
    level.block_0_conv_2.weight[...], level.block_0_conv_2.bias[...] = weight_2[None, None], bias_2
    level.block_0_gain[...] = gain
    x = deviation * normal(2, 4, 5, 8, seed=5)
    x64 = x.astype(np.float64)
    normed = np.pad(x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * gain, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = bias_1 + sum(normed[:, i : i + 4, j : j + 5] @ weight_1[i, j] for i, j in np.ndindex(3, 3))
    wanted = x64 + (hidden / (1 + np.exp(-hidden))) @ weight_2 + bias_2
    np.testing.assert_allclose(level(x), wanted, atol=1e-4)  # sums of 8 numbers of size 10


@pytest.mark.parametrize("patch", [1, 2, 4, 6])
def test_folded_pixels_keep_their_places(patch):
    """A changed pixel changes codes near its patch alone, and a changed code pixels near its place: a 3x3 convolution
    sees one position around, a block another, and the end of the decoder one of half a patch, or a whole one."""
    sizes = PATCHES | {"multipliers": (1,), "patch": patch, "image_size": 9 * patch, "pixel_range": "unit"}
    model = build("vq", sizes)
    params = random_parameters(model)
    assert ("fine_up" in params["decoder"]) == (patch >= 4)
    x = pixels.to_unit(some_images(1, 9 * patch, 9 * patch))
    changed = x.copy()
    changed[:, 3 * patch, 6 * patch - 1] += 1  # of patch row 3, column 5
    both = run(model, params, np.concatenate([x, changed]), method="encode")
    rows, columns = np.nonzero(np.abs(both[1] - both[0]).max(-1) > 1e-6)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 5, 3, 7)
    tokens = np.zeros((2, 9, 9), int)
    tokens[1, 3, 5] = 1
    both = run(model, params, tokens, method="decode_tokens")
    rows, columns = np.nonzero(np.abs(both[1] - both[0]).max(-1) > 1e-6)
    reach = patch + 2 * (patch // 2) if patch >= 4 else 2 * patch  # a block, then a finer block and convolution
    assert (rows.min(), rows.max()) == (3 * patch - reach, 4 * patch - 1 + reach)
    assert (columns.min(), columns.max()) == (5 * patch - reach, 6 * patch - 1 + reach)


def test_blocks_on_patches_are_nearly_the_identity_at_first():
    level = patches.Level(64, 2, VQConfig(**PATCHES), nnx.Rngs(0))
    x = normal(2, 4, 4, 64)
    assert 0 < np.linalg.norm(level(x) - x) < 0.2 * np.linalg.norm(x)


def test_a_vqgan_begins_as_pytorchs_convolutions_do():
    conv = vqgan.Middle(64, np.float32, nnx.Rngs(0)).block_1.conv_1
    bound = (9 * 64) ** -0.5
    for leaf in (conv.weight[...], conv.bias[...]):
        assert 0.9 * bound < np.abs(leaf).max() <= bound
        assert abs(leaf.std() / (bound / 3**0.5) - 1) < 0.2  # of 64 numbers or more
