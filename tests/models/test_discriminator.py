"""PatchGAN gives the numbers of taming-transformers' discriminator, whatever the devices.

The golden numbers are what that code made of formula weights and pictures on a CPU, in training mode (`original`); they
may change with those alone. With PyTorch and taming-transformers-rom1504 installed the comparison runs live.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models import discriminator
from dalle_jax.models.discriminator import DiscriminatorConfig
from tests.support import formula_weights
from tests.support.parameters import random_parameters

SHAPES = {
    "main.0.weight": (8, 3, 4, 4),
    "main.0.bias": (8,),
    "main.2.weight": (16, 8, 4, 4),
    "main.3.weight": (16,),
    "main.3.bias": (16,),
    "main.5.weight": (32, 16, 4, 4),
    "main.6.weight": (32,),
    "main.6.bias": (32,),
    "main.8.weight": (64, 32, 4, 4),
    "main.9.weight": (64,),
    "main.9.bias": (64,),
    "main.11.weight": (1, 64, 4, 4),
    "main.11.bias": (1,),
}
# Pixels per side -> logits per side, the first four, the last, their mean and their deviation.
GOLDEN = {
    37: (2, (0.20564608, 0.57482141, 0.34062201, -0.05724919), -0.76285589, 0.08965904, 0.42819065),
    48: (4, (0.05644514, 0.07246846, 1.52411628, -0.39403433), -0.34654710, 0.10328778, 0.60082757),
}
TOLERANCE = dict(rtol=1e-4, atol=1e-5)  # float32 in another order of summation


def pictures(side: int) -> np.ndarray:
    return np.concatenate([formula_weights.image(k, side) for k in (1, 2, 3)])


def as_ours(state):
    """taming's names and layouts -> ours; `main` counts convolutions, norms and ReLUs."""
    layers = {0: "conv_0", 2: "conv_1", 3: "norm_1", 5: "conv_2", 6: "norm_2", 8: "conv_3", 9: "norm_3", 11: "conv_4"}
    params: dict = {}
    for name, array in state.items():
        _, place, leaf = name.split(".")
        layer = layers[int(place)]
        if layer.startswith("norm") and leaf == "weight":
            leaf = "gain"
        params.setdefault(layer, {})[leaf] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return params


@pytest.fixture(scope="module")
def small():
    model = discriminator.model(DiscriminatorConfig(width=8))
    return model, as_ours(formula_weights.weights(SHAPES)), jax.jit(model.apply)


@pytest.mark.parametrize("side", GOLDEN)
def test_golden_numbers(small, side):
    _, params, apply = small
    logits = np.asarray(apply(params, pictures(side)))
    positions, first, last, mean, deviation = GOLDEN[side]
    assert logits.shape == (3, positions, positions) and logits.dtype == np.float32
    assert DiscriminatorConfig(width=8).positions(side) == positions
    np.testing.assert_allclose(logits.ravel()[:4], first, **TOLERANCE)
    np.testing.assert_allclose((logits.ravel()[-1], logits.mean(), logits.std()), (last, mean, deviation), **TOLERANCE)


@pytest.mark.parametrize("side", GOLDEN)
def test_the_golden_numbers_are_tamings(side):
    why = (
        "the comparison takes PyTorch and taming: pip install torch; pip install --no-deps taming-transformers-rom1504"
    )
    torch = pytest.importorskip("torch", reason=why)
    theirs = pytest.importorskip("taming.modules.discriminator.model", reason=why)
    network = theirs.NLayerDiscriminator(3, ndf=8, n_layers=3).train()
    assert {name: tuple(value.shape) for name, value in network.named_parameters()} == SHAPES
    state = {name: torch.from_numpy(array) for name, array in formula_weights.weights(SHAPES).items()}
    network.load_state_dict(state, strict=False)
    with torch.no_grad():
        logits = network(torch.from_numpy(pictures(side).transpose(0, 3, 1, 2).copy())).numpy()
    _, first, last, mean, deviation = GOLDEN[side]
    np.testing.assert_allclose(logits.ravel()[:4], first, **TOLERANCE)
    np.testing.assert_allclose((logits.ravel()[-1], logits.mean(), logits.std()), (last, mean, deviation), **TOLERANCE)


def test_the_published_size():
    """70 x 70 pixels decide a logit (Isola et al. 2017, section 3.2.2), and 256 pixels have 30 x 30."""
    config = DiscriminatorConfig()
    assert config.positions(256) == 30 and config.positions(24) == 1 and config.positions(23) == 0
    reached = 1
    for layer in reversed(range(5)):
        reached = (reached - 1) * (2 if layer < 3 else 1) + 4
    assert reached == 70 and [config.stride(layer) for layer in range(5)] == [2, 2, 2, 1, 1]
    assert config.channels == (64, 128, 256, 512, 1) and DiscriminatorConfig(layers=5).channels[3:5] == (512, 512)
    assert discriminator.model(config).num_params == 2_765_633  # taming's count


def test_initial_weights_are_tamings():
    """Weights and gains with a deviation of 0.02, biases of norms 0, those of convolutions as PyTorch starts them."""
    params = jax.jit(discriminator.model(DiscriminatorConfig(width=16)).init)(jax.random.key(0))
    for layer in range(1, 4):
        assert set(params[f"conv_{layer}"]) == {"weight"}
        assert not np.any(params[f"norm_{layer}"]["bias"])
        np.testing.assert_allclose(np.std(params[f"conv_{layer}"]["weight"]), 0.02, rtol=0.05)
        np.testing.assert_allclose(np.mean(params[f"norm_{layer}"]["gain"]), 1, atol=0.01)
        np.testing.assert_allclose(np.std(params[f"norm_{layer}"]["gain"]), 0.02, rtol=0.3)
    bias = np.asarray(params["conv_0"]["bias"])
    assert 0.1 < np.abs(bias).max() <= 48**-0.5


def test_a_batch_over_two_devices_has_one_mean(small):
    """Two pictures on two devices give what they give on one: the norm's statistics are of both."""
    model, params, apply = small
    x_BHWC = pictures(48)[:2]
    mesh = make_mesh({"replica": 2, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:2])

    def on_mesh(params, x_BHWC):
        with sharding.use(mesh):
            return model.apply(params, x_BHWC)

    cut = jax.device_put(x_BHWC, sharding.batch_sharding(mesh))
    got = jax.jit(on_mesh)(jax.device_put(params, sharding.replicated(mesh)), cut)
    np.testing.assert_allclose(got, apply(params, x_BHWC), **TOLERANCE)
    alone = np.concatenate([apply(params, x_BHWC[:1]), apply(params, x_BHWC[1:])])
    assert np.abs(np.asarray(got) - alone).max() > 0.01  # which a mean of each device's own would give


def test_pictures_of_one_color_give_finite_gradients(small):
    _, params, _ = small
    flat = np.stack([np.full((48, 48, 3), level, np.float32) for level in (-1, 0, 1)])

    def total(params, x_BHWC):
        return discriminator.model(DiscriminatorConfig(width=8)).apply(params, x_BHWC).sum()

    found = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    for batch in (flat, np.zeros_like(flat)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found(params, batch)))


def test_a_group_norm_looks_at_one_picture():
    """It is its formula (Wu & He 2018), and a picture's logits do not change with its neighbors."""
    model = discriminator.model(DiscriminatorConfig(width=32, layers=1, norm="group"))
    params = random_parameters(model)
    apply = jax.jit(model.apply)
    x_BHWC = pictures(12)
    got = np.asarray(apply(params, x_BHWC))
    np.testing.assert_allclose(np.asarray(apply(params, np.repeat(x_BHWC[:1], 3, axis=0)))[0], got[0], **TOLERANCE)

    def conv(z_HWC, layer, stride):
        padded = np.pad(z_HWC, ((1, 1), (1, 1), (0, 0)))
        side = (len(padded) - 4) // stride + 1
        starts = [stride * place for place in range(side)]
        windows = np.array([[padded[i : i + 4, j : j + 4] for j in starts] for i in starts])
        return np.einsum("hwijc,ijco->hwo", windows, layer["weight"]) + layer.get("bias", 0)

    for z, logits in zip(x_BHWC.astype(np.float64), got, strict=True):
        z = conv(z, params["conv_0"], 2)
        z = conv(np.where(z > 0, z, 0.2 * z), params["conv_1"], 1)
        groups = np.split(z, 32, axis=-1)
        z = np.concatenate([(group - group.mean()) / np.sqrt(group.var() + 1e-5) for group in groups], axis=-1)
        z = z * params["norm_1"]["gain"] + params["norm_1"]["bias"]
        np.testing.assert_allclose(conv(np.where(z > 0, z, 0.2 * z), params["conv_2"], 1)[..., 0], logits, rtol=1e-3)


def test_bfloat16_stays_near(small):
    _, params, apply = small
    rounded = jax.jit(discriminator.model(DiscriminatorConfig(width=8, precision="bf16")).apply)(params, pictures(48))
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - apply(params, pictures(48))).max() < 0.05


def test_impossible_sizes_are_refused():
    for values, message in (
        (dict(width=0), "width"),
        (dict(layers=9), "layers"),
        (dict(norm="none"), "norm must be one of"),
        (dict(norm="group", width=24), "multiple of 16"),
        (dict(precision="bf16-paper"), "discriminator"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscriminatorConfig(**values)
