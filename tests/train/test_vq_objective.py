"""The objective of image tokenizers with a codebook: against slow formulas, and as a training."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.train import run
from dalle_jax.train.codebook import Codebook
from dalle_jax.train.objectives import build_task, frozen_roles, vq
from dalle_jax.train.objectives.task import CODE_COUNTS, OBSERVED
from dalle_jax.train.settings import Cosine, VQObjective
from tests.support.demo_settings import demo_settings
from tests.support.parameters import random_parameters
from tests.support.toy_task import one_device
from tests.support.trees import identical

BATCH, SIZE, GRID, VOCAB, DIM = 8, 16, 4, 12, 4
TINY = {
    "model.image_size": SIZE, "data.image_size": SIZE, "model.multipliers": (1,), "model.width": 8,
    "model.vocab": VOCAB, "model.code_dim": DIM, "batch_size": BATCH, "run.steps": 60,
    "objective.codebook.start": 2, "objective.codebook.dead_every": 2,
}  # fmt: skip
GUMBEL = TINY | {
    "model.quantizer": "gumbel", "model.unit_codes": False, "objective.codebook": None, "objective.kl": 0.3,
    "objective.temperature": Cosine(2.0, 0.5, 10),
}  # fmt: skip


def settings_of(values=None):
    values = TINY | (values or {})
    if values.get("objective.codebook", 1) is None:
        values = {key: value for key, value in values.items() if ".codebook." not in key}
    return demo_settings("vq", values)


def task_of(values=None):
    return build_task(settings_of(values), {})


def images_of(number=0, count=BATCH):
    return np.random.default_rng(number).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def measured(task, params, images, *, memory=None, step=0, key=None):
    key = jax.random.key(3) if key is None else key
    options = {"memory": memory} if task.memory else {}
    return jax.jit(task.loss)(params, {}, {"image": images}, key=key, step=step, **options)


def slow_charbonnier(d):
    return np.sqrt(d**2 + 0.001**2)


def slow_pictures(x, y, weights):
    """In float64, pixel by pixel where it says so; x and y in [0, 1] are in the model's range, too."""
    d = y - x
    edges = [d[:, 1:] - d[:, :-1], d[:, :, 1:] - d[:, :, :-1]]
    perceptual = []
    for scale in (1, 2, 4):
        B, H, W, _ = d.shape
        coarse = d.reshape(B, H // scale, scale, W // scale, scale, 3).mean((2, 4))
        steps = [coarse[:, 1:] - coarse[:, :-1], coarse[:, :, 1:] - coarse[:, :, :-1]]
        perceptual.append(np.abs(np.concatenate([step.reshape(-1) for step in steps])).mean())
    return (
        weights.absolute * np.abs(d).mean()
        + weights.squared * (d**2).mean() / weights.variance
        + weights.charbonnier * slow_charbonnier(d).mean()
        + weights.edges * np.concatenate([slow_charbonnier(edge).reshape(-1) for edge in edges]).mean()
        + weights.perceptual * np.mean(perceptual)
    )


WEIGHTS = VQObjective(
    absolute=0.3,
    squared=0.7,
    variance=0.2,
    charbonnier=1.1,
    edges=0.6,
    perceptual=0.9,
    codebook=Codebook(commitment=0.4),
)


def test_the_loss_is_the_formula():
    """Against numpy in float64, with the encoder's vectors and the decoder's pictures as the model gives them."""
    keys = {f.name: getattr(WEIGHTS, f.name) for f in dataclasses.fields(WEIGHTS)}
    values = {f"objective.{name}": value for name, value in keys.items() if name != "codebook"}
    task = task_of(values | {"objective.codebook": {"commitment": 0.4}, "model.unit_codes": False})
    params, images = random_parameters(task.model), images_of()
    loss, metrics = measured(task, params, images, memory=task.memory(jax.random.key(0)))
    x = images / 255.0
    z = np.asarray(task.model.apply(params, x.astype(np.float32), method="encode"), np.float64)
    codes = np.asarray(params["quantizer"]["codebook"], np.float64)
    tokens = ((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
    y = np.asarray(task.model.apply(params, codes[tokens].astype(np.float32), method="decode"), np.float64)
    commitment = ((z - codes[tokens]) ** 2).mean()
    np.testing.assert_allclose(loss, slow_pictures(x, y, WEIGHTS) + 0.4 * commitment, rtol=1e-4)
    np.testing.assert_allclose(metrics["quantization_error"], commitment, rtol=1e-4)
    np.testing.assert_allclose(metrics["squared_error"], ((y.clip(0, 1) - x) ** 2).mean(), rtol=1e-4)
    np.testing.assert_array_equal(metrics[OBSERVED][CODE_COUNTS], np.bincount(tokens.reshape(-1), minlength=VOCAB))
    assert metrics["codes_used"] == len(np.unique(tokens))


def test_gumbels_codes_are_hard_forward_and_soft_backward():
    """The value is that of one code for each position, the gradient that of the mixture (taming-transformers)."""
    task = task_of(GUMBEL)
    assert task.memory is None and task.followed == ()
    params, images, key = random_parameters(task.model), images_of(), jax.random.key(4)
    x = jnp.asarray(images / 255.0, jnp.float32)
    logits = jax.jit(lambda params: task.model.apply(params, x, method="encode"))(params)
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    temperature = 0.5 + 1.5 * (1 + np.cos(np.pi * 0.5)) / 2  # half way
    weights = settings_of(GUMBEL).objective

    def soft(logits):
        return jax.nn.softmax((logits + noise) / temperature, axis=-1)

    def total(params, distribution):
        q = distribution @ params["quantizer"]["codebook"]
        y = task.model.apply(params, q, method="decode")
        d = y - x
        edges = [d[:, 1:] - d[:, :-1], d[:, :, 1:] - d[:, :, :-1]]
        root = jnp.concatenate([jnp.sqrt(edge**2 + 1e-6).reshape(-1) for edge in edges]).mean()
        return (
            weights.squared * (d**2).mean() + weights.charbonnier * jnp.sqrt(d**2 + 1e-6).mean() + weights.edges * root
        )

    hard = jax.nn.one_hot(soft(logits).argmax(-1), VOCAB)
    q = jax.nn.softmax(logits, axis=-1)
    kl = (q * jnp.log(q * VOCAB)).sum(-1).mean()
    loss, metrics = measured(task, params, images, step=5, key=key)
    np.testing.assert_allclose(loss, jax.jit(total)(params, hard) + 0.3 * kl, rtol=1e-5)
    assert metrics["temperature"] == pytest.approx(temperature) and metrics["kl_nats_per_token"] == pytest.approx(kl)
    np.testing.assert_array_equal(
        metrics[OBSERVED][CODE_COUNTS], np.bincount(logits.argmax(-1).reshape(-1), minlength=VOCAB)
    )

    def by_chain(params):
        """d total / d distribution at the hard one, through d soft / d logits."""
        by_hard = jax.lax.stop_gradient(jax.grad(total, argnums=1)(params, hard))
        logits = task.model.apply(params, x, method="encode")
        q = jax.nn.softmax(logits, axis=-1)
        kl = (q * jnp.log(q * VOCAB)).sum(-1).mean()
        return (soft(logits) * by_hard).sum() + total(params, hard) + weights.kl * kl

    found = jax.jit(jax.grad(lambda p: task.loss(p, {}, {"image": images}, key=key, step=5)[0]))(params)
    wanted = jax.jit(jax.grad(by_chain))(params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def tile_batches():
    """Endless pictures of tiles in six colors, one a position."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (6, 3), np.uint8)
    while True:
        tiles = colors[rng.integers(0, 6, (BATCH, GRID, GRID))]
        yield {"image": tiles.repeat(SIZE // GRID, 1).repeat(SIZE // GRID, 2)}


def updated(step, state, batches, frozen=None):
    values = []
    for batch in batches:
        state, measured = step.update(state, frozen or {}, sharding.shard_batch(batch, step.mesh), jax.random.key(1))
        values.append(jax.device_get(measured))
    return state, values


def test_a_training_learns_and_goes_on_bit_for_bit(tmp_path):
    """150 updates on pictures of six colors: start without codes, k-means, dead codes. Stopped in both phases."""
    fast = {"model.width": 32, "run.steps": 150, "optimizer.learning_rate": 0.01, "optimizer.schedule.warmup_steps": 5}
    settings = settings_of(fast | {"objective.codebook.start": 15, "objective.codebook.dead_below": 0.05})
    task = build_task(settings, {})
    step = run.step_for(settings, task, one_device())
    stream = tile_batches()
    batches = [next(stream) for _ in range(150)]
    straight, values = updated(step, step.init(jax.random.key(0)), batches)
    assert [v["codes_within_reach"] for v in values[:16]] == [0.0] * 15 + [VOCAB]
    colors = np.concatenate([batch["image"] for batch in batches]).reshape(-1, 3) / 255.0
    assert values[-1]["squared_error"] < 0.75 * colors.var(0).mean()  # the best picture of one color has 1
    assert values[-1]["codes_used"] >= 6
    identical(straight["ema"]["quantizer"]["codebook"], straight["params"]["quantizer"]["codebook"])
    checkpoints = Checkpoints(tmp_path, keep=5)
    state = step.init(jax.random.key(0))
    for begin, end in ((0, 10), (10, 30), (30, 150)):
        state, _ = updated(step, state, batches[begin:end])
        checkpoints.save(end, step.to_saved(state), {})
        state = step.from_saved(checkpoints.restore_latest(step.saved)[1])
    checkpoints.close()
    identical(state, straight)
    kept = jax.device_get({name: state[name] for name in ("params", "memory")})
    state["params"]["decoder"] = jax.tree.map(lambda x: x * np.float32(np.nan), state["params"]["decoder"])
    after, (skipped,) = updated(step, state, batches[:1])
    assert not skipped["finite"]
    identical(after["memory"], kept["memory"])
    identical(after["params"]["quantizer"], kept["params"]["quantizer"])
    pictures = task.pictures(straight["ema"], {}, batches[0], jax.random.key(0))
    assert pictures.shape == (2, BATCH, SIZE, SIZE, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[0], batches[0]["image"])


@pytest.mark.slow
def test_microbatches_and_devices_change_nothing_but_rounding():
    settings = settings_of(
        {"objective.codebook.noise": 0.0, "optimizer.learning_rate": 1e-4}
    )  # noise is per microbatch
    stream = tile_batches()
    batches = [next(stream) for _ in range(4)]

    def after(devices, accumulate):
        task = build_task(settings, {})
        mesh = make_mesh({"fsdp": devices}, devices=jax.devices()[:devices])
        step = run.step_for(settings.changed({"accumulate": accumulate}), task, mesh)
        return updated(step, step.init(jax.random.key(0)), batches)

    (one, values), (many, others) = after(1, 1), after(4, 2)
    for a, b in zip(values, others, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    np.testing.assert_allclose(one["memory"]["counts"], many["memory"]["counts"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        one["params"]["quantizer"]["codebook"], many["params"]["quantizer"]["codebook"], atol=1e-2
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective.codebook.start": 60}, "start below config.run.steps = 60, got 60"),
        ({"model.vocab": 300}, "at least 300 vectors for the 300 codes to start from, got 256"),
        (GUMBEL | {"objective.temperature": None}, "a config.objective.temperature .* = gumbel, got none"),
        ({"objective.temperature": Cosine(1.0, 0.5, 3)}, "no config.objective.temperature .* = nearest, got one"),
        ({"objective.codebook": None}, "a config.objective.codebook .* = nearest, got none"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(values, message):
    with pytest.raises(UserError, match=message):
        task_of(values)


@pytest.mark.parametrize("wrong", [{"absolute": 0.0}, {"variance": 0.0}, {"perceptual": -1.0}, {"kl": np.nan}])
def test_an_impossible_objective_is_refused(wrong):
    with pytest.raises(UserError, match="config.objective"):
        VQObjective(**wrong)


def test_a_collapse_names_the_remedies_of_its_quantizer():
    metrics = {"codes_used": 1.0, "codes_within_reach": 12.0, "code_perplexity": 1.0}
    assert "dead_below" in task_of().warn(metrics) and "kl" in task_of(GUMBEL).warn(metrics)
    assert task_of().warn(metrics | {"codes_used": 0.0, "codes_within_reach": 0.0}) is None  # before the start


def test_lpips_may_be_missing():
    assert frozen_roles(settings_of()) == ("lpips",)
    assert run.load_frozen(settings_of(), pathlib.Path("/nowhere")) == {}
    assert vq.OPTIONAL == ("lpips",)


def test_pictures_too_small_for_lpips_are_refused():
    class Given:
        model, params = None, {}

    with pytest.raises(UserError, match="at least 16 pixels with config.frozen.lpips, got config.model.image_size = 8"):
        build_task(settings_of({"model.image_size": 8, "data.image_size": 8}), {"lpips": Given})
