"""The dVAE's networks and its objective against slow independent formulas and the paper's counts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax import pixels
from dalle_jax.errors import UserError
from dalle_jax.models import build, dvae
from dalle_jax.train.objectives import dvae as dvae_objective
from dalle_jax.train.objectives.task import OBSERVED
from dalle_jax.train.settings import LIKELIHOODS, Cosine, DVAEObjective
from tests.support.parameters import random_parameters

TINY = {"image_size": 16, "vocab": 12, "width": 8, "groups": 2, "blocks_per_group": 1, "stem": 6, "stem_kernel": 3}
PAPER_GRID, PAPER_VOCAB = 32, 8192


def task_of(model, objective=DVAEObjective()):  # noqa: B008  (frozen)
    """The task of a dVAE of these sizes."""
    settings = types.SimpleNamespace(model=dvae.DVAEConfig(**model), objective=objective)
    return dvae_objective.build(settings, {})


@pytest.fixture(scope="module")
def tiny():
    model = build("dvae", TINY)
    return model, init(model)


def init(model):
    """Parameters as `model.init` makes them, by numpy: compiling the initialisation takes longer than the tests."""
    rng = np.random.default_rng(0)

    def fresh(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        value = rng.normal(0.0, fan_in**-0.5, leaf.shape) if leaf.ndim == 4 else np.zeros(leaf.shape)
        return jnp.asarray(value.astype(leaf.dtype))  # in numpy: JAX compiles a conversion for every shape

    return jax.tree.map(fresh, model.abstract)


def run(model, params, *args, method):
    return jax.jit(lambda params, *args: model.apply(params, *args, method=method))(params, *args)


def measure(task, params, images, *, key=None):
    """Loss and metrics of one batch at step 0."""
    loss = jax.jit(lambda params, batch, key: task.loss(params, {}, batch, key=key, step=0))
    value, metrics = loss(params, {"image": images}, jax.random.key(0) if key is None else key)
    return value, {name: metric for name, metric in metrics.items() if name != OBSERVED}


def some_images(count: int = 2, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def test_the_papers_network_has_the_published_size_and_shapes():
    model = build("dvae", {})
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(model.abstract[part]))  # noqa: E731
    assert (count("encoder"), count("decoder")) == (53_786_240, 43_829_766)
    assert (model.config.grid, model.config.vocab) == (PAPER_GRID, PAPER_VOCAB)
    assert model.config.post_gain == 1 / 64
    x = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    logits = jax.eval_shape(lambda p, x: model.apply(p, x, method="encode"), model.abstract, x)
    output = jax.eval_shape(lambda p, z: model.apply(p, z, method="decode"), model.abstract, logits)
    assert logits.shape == (2, PAPER_GRID, PAPER_GRID, PAPER_VOCAB)
    assert output.shape == (2, 256, 256, 6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_looking_a_code_up_is_decoding_its_one_hot(tiny, precision):
    params = tiny[1]
    model = build("dvae", TINY | {"precision": precision})
    ids = np.random.default_rng(0).integers(0, 12, (2, 8, 8))
    found = run(model, params, ids, method="decode_tokens")
    dense = run(model, params, jax.nn.one_hot(ids, 12), method="decode")
    assert found.dtype == dense.dtype == jnp.float32
    np.testing.assert_allclose(found, dense, atol=1e-6)


PAPERS_DEPTH = {"image_size": 64, "vocab": 512, "width": 64, "groups": 4, "blocks_per_group": 2, "stem": 128}


@pytest.mark.parametrize(
    "sizes, precision, share",
    [
        (TINY | {"width": 32, "blocks_per_group": 2}, "bf16", 0.03),
        pytest.param(PAPERS_DEPTH, "bf16", 0.03, marks=pytest.mark.slow),
        pytest.param(PAPERS_DEPTH, "fp16-global", 0.15, marks=pytest.mark.slow),
    ],
)
def test_rounding_to_16_bits_is_small_beside_what_the_branches_add(sizes, precision, share):
    """At initial values, where branches of gain 1/16 (the paper's are of 1/64) add a few hundredths. With stream, skips
    and ends in bfloat16 too, rounding is a fifth of it here, and half of it in a network of the paper's depth."""
    size = sizes["image_size"]
    image_BHWC = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    x, ids = pixels.to_laplace(pixels.to_unit(image_BHWC)), np.arange(128).reshape(2, 8, 8) % sizes["vocab"]

    def program(precision):
        model = build("dvae", sizes | {"precision": precision})
        return model, jax.jit(
            lambda p: (model.apply(p, x, method="encode"), model.apply(p, ids, method="decode_tokens"))
        )

    (model, exact), (_, rounded) = program("fp32"), program(precision)
    params = init(model)
    bare = jax.tree_util.tree_map_with_path(lambda path, a: 0 * a if path[-2].key == "conv_4" else a, params)
    for found, wanted, without in zip(rounded(params), exact(params), exact(bare), strict=True):
        added = np.linalg.norm(wanted - without)
        assert found.dtype == jnp.float32 and added < 0.1 * np.linalg.norm(wanted)
        print(f"{precision}: {np.linalg.norm(found - wanted) / added:.1%} of what the branches add")
        assert 0 < np.linalg.norm(found - wanted) < share * added


def test_white_is_exact_in_bfloat16_too():
    """A logit-Laplace likelihood grows without bound where mu is exact; bfloat16's nearest to 2.1972 is 2.1875."""
    model = build("dvae", TINY | {"precision": "bf16"})
    params = jax.tree.map(np.zeros_like, init(model))
    params["decoder"]["head"]["bias"] = np.full(6, np.log(0.9 / 0.1), np.float32)
    found = run(model, params, np.zeros((1, 8, 8), int), method="decode_tokens")
    assert np.abs(found - 2.1972246).max() < 1e-5


def test_every_parameter_takes_part(tiny):
    model, params = tiny
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), params)  # zeros, dead units would hide a use
    x = pixels.to_laplace(pixels.to_unit(some_images()))

    def total(params):
        logits = model.apply(params, x, method="encode")
        return jnp.square(model.apply(params, jax.nn.softmax(logits), method="decode")).sum()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(params)):
        assert np.abs(grad).max() > 0, path


def test_folding_pixels_keeps_every_position_in_its_place():
    """With patches of 4 and 1x1 receptive fields, a changed patch changes its own logits and pixels only."""
    sizes = TINY | {"groups": 1, "patch": 4, "stem_kernel": 1, "blocks_per_group": 1}
    model = build("dvae", sizes)
    params = init(model)
    for network in ("encoder", "decoder"):
        params[network]["tower"] = jax.tree.map(np.zeros_like, params[network]["tower"])
        if network == "decoder":
            params[network]["tower"]["group_1_block_1"]["skip"]["weight"] = jnp.eye(6, 8)[None, None]
    image = pixels.to_unit(some_images(1))
    changed = image.copy()
    changed[:, 4:8, 12:16] = 0.5  # patch row 1, patch column 3
    moved = np.abs(run(model, params, changed, method="encode") - run(model, params, image, method="encode")).max(-1)
    assert np.argwhere(moved[0]).tolist() == [[1, 3]]
    ids = np.zeros((1, 4, 4), int)
    other = ids.copy()
    other[0, 1, 3] = 5
    moved = run(model, params, other, method="decode_tokens") - run(model, params, ids, method="decode_tokens")
    where = np.argwhere(np.abs(moved[0]).max(-1))
    assert where.min(0).tolist() == [4, 12] and where.max(0).tolist() == [7, 15]


def test_initialisation_is_normal_with_unit_gain():
    model = build("dvae", TINY | {"width": 64, "groups": 1})
    params = jax.jit(model.init)(jax.random.key(0))
    weight = params["encoder"]["stem"]["weight"]
    assert weight.shape == (3, 3, 3, 64)
    assert abs(float(weight.std()) * np.sqrt(27) - 1) < 0.1  # 1,728 draws: standard error 0.017
    assert all(leaf.any() == (leaf.ndim == 4) for leaf in jax.tree.leaves(params))  # biases are zero


def test_normalized_features_do_not_grow_with_the_contrast():
    model = build("dvae", TINY | {"logits_norm": 2.0})
    params = init(model)
    x = some_images().astype(np.float32) / 255
    once, tenfold = (run(model, params, scale * x, method="encode") for scale in (1.0, 10.0))
    np.testing.assert_allclose(once, tenfold, rtol=1e-3, atol=1e-4)  # zero biases: the net is homogeneous


@pytest.mark.parametrize("wrong", [{"image_size": 20, "groups": 4}, {"width": 6}, {"stem_kernel": 4}, {"vocab": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        dvae.DVAEConfig(**wrong)


def test_a_picture_may_have_any_height_and_width(tiny):
    """Its tokens are those of its tiles where nothing sees across their borders: all kernels are their centers here."""
    model = tiny[0]

    def center(leaf):
        return leaf if leaf.ndim < 4 else np.pad(leaf[1:2, 1:2], ((1, 1), (1, 1), (0, 0), (0, 0)))

    params = jax.tree.map(
        lambda leaf: center(np.asarray(leaf)) if leaf.shape[0] == 3 else leaf, random_parameters(model)
    )
    tiles = some_images(6).reshape(2, 3, 16, 16, 3)  # 2 rows of 3
    whole = np.concatenate(np.concatenate(tiles, axis=1), axis=1)[None]
    assert whole.shape == (1, 32, 48, 3)
    encode, decode = (jax.jit(function, static_argnums=0) for function in (dvae.encode_images, dvae.decode_images))
    tokens = np.asarray(encode(model, params, whole))
    assert tokens.shape == (1, 16, 24) and tokens.dtype == np.int32
    of_tiles = np.asarray(encode(model, params, tiles.reshape(6, 16, 16, 3)))
    assert len({tokens_RC.tobytes() for tokens_RC in of_tiles}) == 6
    np.testing.assert_array_equal(tokens[0, :8, 8:16], of_tiles[1])
    np.testing.assert_array_equal(tokens[0, 8:, :8], of_tiles[3])
    images = np.asarray(decode(model, params, tokens))
    assert images.shape == whole.shape and images.dtype == np.uint8 and len(np.unique(images)) > 3
    np.testing.assert_array_equal(images[0, 16:, :16], np.asarray(decode(model, params, of_tiles))[3])


# The objective


@pytest.mark.parametrize(("mu", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.7)])
def test_the_logit_laplace_density_integrates_to_one(mu, log_scale):
    logit = np.linspace(-40.0, 40.0, 400_001)
    x = 1.0 / (1.0 + np.exp(-logit))
    inside = (x > 1e-6) & (x < 1 - 1e-6)  # float32 cannot tell more extreme values from 0 and 1
    density = np.exp(np.asarray(dvae_objective.log_logit_laplace(jnp.asarray(x[inside]), mu, log_scale), np.float64))
    assert abs(np.trapezoid(density, x[inside]) - 1.0) < 2e-3


def test_the_loss_is_the_formula(tiny):
    """Against numpy loops over pictures, positions and values, float64."""
    model, params = tiny
    objective = DVAEObjective(beta=Cosine(2.0, 2.0, 0), temperature=Cosine(0.7, 0.7, 0))
    key = jax.random.key(3)
    images = some_images()
    task = task_of(TINY, objective)
    loss, metrics = measure(task, params, images, key=key)

    x = 0.8 * (images.astype(np.float64) / 255) + 0.1
    logits = np.asarray(run(model, params, x.astype(np.float32), method="encode"), np.float64)
    noise = np.asarray(jax.random.gumbel(key, logits.shape, jnp.float32), np.float64)
    relaxed = np.zeros_like(logits)
    kl = 0.0
    for index in np.ndindex(logits.shape[:-1]):
        noisy = (logits[index] + noise[index]) / 0.7
        relaxed[index] = np.exp(noisy - noisy.max()) / np.exp(noisy - noisy.max()).sum()
        q = np.exp(logits[index]) / np.exp(logits[index]).sum()
        kl += sum(p * (np.log(p) - np.log(1 / 12)) for p in q)
    output = np.asarray(run(model, params, relaxed.astype(np.float32), method="decode"), np.float64)
    nll, error = 0.0, 0.0
    for index in np.ndindex(x.shape):
        mu, log_b = output[(*index[:3], index[3])], output[(*index[:3], index[3] + 3)]
        value, b = x[index], np.exp(log_b)
        nll -= np.log(np.exp(-abs(np.log(value / (1 - value)) - mu) / b) / (2 * b * value * (1 - value)))
        seen = min(max((1 / (1 + np.exp(-mu)) - 0.1) / 0.8, 0.0), 1.0)
        error += (seen - images[index] / 255) ** 2

    np.testing.assert_allclose(loss, (nll + 2.0 * kl) / x.size, rtol=1e-5)
    np.testing.assert_allclose(metrics["elbo_nats_per_value"], -(nll + kl) / x.size, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction_nats_per_value"], nll / x.size, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_nats_per_token"], kl / logits[..., 0].size, rtol=1e-4)
    np.testing.assert_allclose(metrics["relaxed_error"], error / x.size, rtol=1e-4)


def test_kl_is_zero_at_uniform_and_ln_v_at_one_code():
    logits = jnp.stack([jnp.full(7, 3.0), 1e4 * jax.nn.one_hot(2, 7)])
    np.testing.assert_allclose(dvae_objective.kl_to_uniform(logits), [0.0, np.log(7)], atol=1e-6)


def test_a_cold_relaxation_is_a_sample_of_the_categorical():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    draws = dvae_objective.relax(jnp.broadcast_to(logits, (20_000, 3)), 1e-3, jax.random.key(0))
    np.testing.assert_allclose(draws.max(-1), 1.0, atol=0.5)
    assert (draws.max(-1) > 0.999).mean() > 0.99  # the rest are near ties
    np.testing.assert_allclose(draws.mean(0), [0.5, 0.3, 0.2], atol=0.015)  # 4 standard errors


def test_schedules_at_their_ends_and_middle():
    paper = DVAEObjective()
    assert [float(paper.beta(t)) for t in (0, 2_500, 5_000, 10**6)] == pytest.approx([0.0, 3.3, 6.6, 6.6])
    middle = (1 + 1 / 16) / 2
    temperatures = [float(paper.temperature(t)) for t in (0, 75_000, 150_000, 3 * 10**6)]
    assert temperatures == pytest.approx([1.0, middle, 1 / 16, 1 / 16])
    assert float(Cosine(5.0, 2.0, 0)(0)) == 2.0


def test_a_collapsed_codebook_warns_and_a_healthy_one_does_not():
    task = task_of(TINY | {"vocab": 40, "groups": 1, "stem_kernel": 1, "patch": 2})
    params = init(task.model)
    for bias, collapsed in ((0.0, False), (1e3, True)):
        params["encoder"]["head"]["bias"] = jnp.zeros(40).at[3].set(bias)
        _, metrics = measure(task, params, some_images(8))
        message = task.warn({name: float(value) for name, value in metrics.items()})
        if collapsed:
            assert (float(metrics["codes_used"]), float(metrics["code_perplexity"])) == pytest.approx((1.0, 1.0))
            assert "1 codes in use" in message
        else:
            assert metrics["codes_used"] >= 5 and message is None  # a tenth of 40 is the limit


def test_balance_is_least_where_what_there_is_to_see_spreads_over_the_codes():
    flat_and_detail = np.full((1, 4, 4, 3), 0.9, np.float32)
    flat_and_detail[0, 2:, :, :] = np.random.default_rng(0).random((2, 4, 3))  # two of four patches have detail
    logits = lambda codes: 50.0 * jax.nn.one_hot(jnp.asarray(codes).reshape(1, 2, 2), 2)  # noqa: E731
    spread, piled = (
        dvae_objective._imbalance(logits(codes), flat_and_detail) for codes in ([0, 0, 0, 1], [0, 1, 1, 1])
    )
    assert float(piled) == pytest.approx(np.log(2), abs=1e-4)
    assert float(spread) < 0.05  # the two patches' weights are near, not equal


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_training_lowers_the_loss(likelihood):
    constant = Cosine(0.1, 0.1, 0)
    objective = DVAEObjective(beta=constant, temperature=constant, likelihood=likelihood, balance=0.1)
    task = task_of(TINY | {"groups": 1, "patch": 4, "stem_kernel": 1}, objective)
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (4, 3), np.uint8)[rng.integers(0, 4, (4, 4, 4))]  # four colours
    batch = {"image": tiles.repeat(4, 1).repeat(4, 2)}
    optimizer = optax.adam(0.01)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            grad = jax.value_and_grad(lambda p: task.loss(p, {}, batch, key=key, step=0), has_aux=True)
            (loss, _), grads = grad(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(jax.random.key(0), 100)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    params, losses = train(init(task.model))
    assert losses[-10:].mean() < losses[:10].mean() - 0.1
    pictures = task.pictures(params, {}, batch, jax.random.key(0))
    assert pictures.shape == (2, 4, 16, 16, 3) and pictures.dtype == jnp.uint8
    np.testing.assert_array_equal(pictures[0], batch["image"])


@pytest.mark.parametrize("wrong", [{"likelihood": "mse"}, {"temperature": Cosine(1.0, 0.0, 5)}])
def test_an_impossible_objective_is_refused(wrong):
    with pytest.raises(UserError, match="config.objective"):
        DVAEObjective(**wrong)
