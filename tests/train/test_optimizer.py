"""Optimizers: schedules by formula, who decays, halving on plateaus, and Muon on stacked layers."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from dalle_jax import config as configs
from dalle_jax.errors import UserError
from dalle_jax.train.optimizer import build

AXES = {
    "embedding": ("vocab", "embed"),
    "position": ("position", "embed"),
    "qkv": ("layers", "embed", "qkv", "heads", "head"),
    "qkv_bias": ("layers", "qkv", "heads", "head"),
    "out": ("layers", "heads", "head", "embed"),
    "up": ("layers", "embed", "mlp"),
    "gain": ("layers", "embed"),
    "conv": (None, None, "in", "out"),
    "bias": ("out",),
    "head": ("embed", "vocab"),
}
SIZES = {
    "vocab": 7,
    "position": 5,
    "embed": 8,
    "layers": 3,
    "qkv": 3,
    "heads": 2,
    "head": 4,
    "mlp": 16,
    "in": 6,
    "out": 4,
}
DECAYED = {"qkv", "out", "up", "conv", "head"}
HIDDEN = {"qkv", "out", "up", "conv"}


def config(name="adamw", schedule="warmup_constant", **values):
    """AdamW at a constant step size, nothing else, and then `values`."""
    config = ml_collections.ConfigDict(configs.load("configs/dvae.py:paper").optimizer.to_dict())
    config.schedule.update(name=schedule, warmup_steps=0, decay_steps=0, end_learning_rate=0.0)
    config.update({"name": name, "weight_decay": 0.0, "clip_norm": 0.0, **values})
    return config


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=[SIZES.get(axis, 3) for axis in axes]), jnp.float32)
        for name, axes in AXES.items()
    }


def first_update(built, weights, gradient):
    return jax.jit(lambda p, g: built.update(g, built.init(p), p, value=1.0))(weights, gradient)


def values(schedule, counts):
    return np.array([float(schedule(count)) for count in counts])


def test_cosine_is_the_papers_and_stays_at_its_end():
    shape = config(learning_rate=1e-4)
    shape.schedule.update(name="cosine", decay_steps=1_200_000, end_learning_rate=1.25e-6)
    got = values(build.schedule(shape, steps=3_000_000), [0, 600_000, 1_200_000, 2_999_999])
    np.testing.assert_allclose(got, [1e-4, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6], rtol=1e-5)


@pytest.mark.parametrize(
    "name, end", [("warmup_constant", 1.0), ("plateau", 1.0), ("warmup_cosine", 0.1), ("warmup_linear", 0.0)]
)
def test_warm_up_is_linear_from_the_first_update(name, end):
    shape = config(learning_rate=1.0)
    shape.schedule.update(name=name, warmup_steps=4, end_learning_rate=0.1)
    schedule = build.schedule(shape, steps=104)
    np.testing.assert_allclose(values(schedule, range(5)), [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(float(schedule(104)), end, atol=1e-6)
    middle = {"warmup_cosine": 0.55, "warmup_linear": 0.5}.get(name, 1.0)
    np.testing.assert_allclose(float(schedule(54)), middle, rtol=1e-5)


def test_who_decays_and_who_is_a_hidden_matrix():
    assert {name for name, decays in build.decay_mask(AXES).items() if decays} == DECAYED
    found = {name: build.matrix_dimensions(axes) for name, axes in AXES.items()}
    assert {name for name, dimensions in found.items() if dimensions} == HIDDEN
    assert tuple(found["qkv"]) == ((1,), (3, 4)) and tuple(found["out"]) == ((1, 2), (3,))
    assert tuple(found["up"]) == ((1,), (2,)) and tuple(found["conv"]) == ((0, 1, 2), (3,))


@pytest.mark.parametrize("name", build.OPTIMIZERS)
def test_without_gradient_only_the_decayed_shrink(name):
    before = params()
    built = build.build(config(name, learning_rate=0.1, weight_decay=0.5), steps=10, axes=AXES)
    changes, _ = first_update(built, before, jax.tree.map(jnp.zeros_like, before))
    for key, change in changes.items():
        wanted = -0.1 * 0.5 * before[key] if key in DECAYED else jnp.zeros_like(change)
        np.testing.assert_allclose(change, wanted, atol=1e-7, err_msg=key)


def test_clipping_bounds_the_norm_that_adam_sees():
    gradient = jax.tree.map(lambda p: 1e3 * p, params(1))
    clipped = optax.tree.scale(4.0 / optax.tree.norm(gradient), gradient)
    states = []
    for grads, clip_norm in [(gradient, 4.0), (clipped, 0.0)]:
        built = build.build(config(clip_norm=clip_norm), steps=10, axes=AXES)
        _, state = first_update(built, params(), grads)
        states.append(optax.tree.get(state, "mu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *states)


def test_muon_treats_each_layer_alone():
    gradient, layer = params(1)["up"], {"w": ("embed", "mlp")}
    stacked = build.build(config("muon", learning_rate=0.1), steps=10, axes={"w": AXES["up"]})
    changes, _ = first_update(stacked, {"w": gradient}, {"w": gradient})
    single = build.build(config("muon", learning_rate=0.1), steps=10, axes=layer)
    for index in range(SIZES["layers"]):
        one = {"w": gradient[index]}
        wanted, _ = first_update(single, one, one)
        np.testing.assert_allclose(changes["w"][index], wanted["w"], rtol=1e-5, atol=1e-7)


def test_muon_makes_every_matrix_nearly_orthogonal():
    before = params()
    built = build.build(config("muon", learning_rate=1.0), steps=10, axes=AXES)
    changes, _ = first_update(built, before, params(1))
    matrices = {
        "qkv": jnp.einsum("ldcnh->lcdnh", changes["qkv"]).reshape(9, 8, 8),
        "out": changes["out"].reshape(3, 8, 8),
        "up": changes["up"],
        "conv": changes["conv"].reshape(1, 54, 4),
    }
    for name, matrix in matrices.items():
        scale = build.CONSISTENT_RMS * max(matrix.shape[1:]) ** 0.5
        singular = np.linalg.svd(np.asarray(matrix) / scale, compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1, not to it; a random matrix's smallest may stay small.
        assert singular.max() < 1.3 and np.median(singular) > 0.6, name


def test_plateau_halves_at_most_five_times_and_only_without_improvement():
    shape = config(schedule="plateau", learning_rate=1.0)
    shape.schedule.plateau.update(window=2, patience=2, min_improvement=0.01, halvings=5)
    built = build.build(shape, steps=100, axes={"w": ("out",)})
    weights = {"w": jnp.ones(2)}
    update = jax.jit(lambda state, value: built.update(weights, state, weights, value=value)[1])
    state, scales = built.init(weights), []
    for count in range(60):
        state = update(state, jnp.float32(max(1.0 - 0.05 * count, 0.5)))  # falls for ten updates, then stands still
        scales.append(float(build.plateau_scale(state)))
    assert scales[9] == 1.0 and scales[-1] == 0.5**5
    assert set(scales) == {0.5**halvings for halvings in range(6)}
    assert build.plateau_scale(build.build(config(), steps=1, axes={"w": ("out",)}).init(weights)) == 1.0


@pytest.mark.parametrize("wrong", [{"name": "sgd"}, {"schedule": "step"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(UserError, match="must be one of"):
        build.build(config(**wrong), steps=1, axes=AXES)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"patience": 0}, "plateau.patience of at least 1, got 0: set --config.optimizer.schedule.plateau.patience=N"),
        ({"window": 0}, "plateau.window of at least 1"),
        ({"halvings": -1}, "plateau.halvings of at least 0"),
        ({"min_improvement": 0.0}, "plateau.min_improvement between 0 and 1"),
    ],
)
def test_a_plateau_that_means_nothing_is_refused(values, message):
    shape = config(schedule="plateau")
    shape.schedule.plateau.update(values)
    with pytest.raises(UserError, match=message):
        build.build(shape, steps=1, axes=AXES)
    shape.schedule.name = "cosine"  # which asks for none of them
    build.build(shape, steps=1, axes=AXES)


def test_a_norm_below_zero_would_turn_gradients_round_and_is_refused():
    with pytest.raises(UserError, match="clip_norm of at least 0, got -1.0: 0 clips nothing"):
        build.build(config(clip_norm=-1.0), steps=1, axes=AXES)


def test_clipping_is_optaxs_but_for_a_norm_that_is_told():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
    clip = build._clip(2.0)
    wanted = optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0]
    for told, scale in (({}, 1.0), ({"norm": jnp.float32(5)}, 1.0), ({"norm": jnp.float32(10)}, 0.5)):
        found, _ = clip.update(grads, clip.init(grads), value=jnp.float32(0), **told)
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda g, scale=scale: scale * g, wanted))
    found, _ = clip.update(grads, clip.init(grads), norm=jnp.float32(1.9))
    jax.tree.map(np.testing.assert_array_equal, found, grads)
