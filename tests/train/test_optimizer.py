"""Optimizers: schedules by formula, who decays, halving on plateaus, and Muon on stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.train.optimizer import matrices
from dalle_jax.train.optimizer.build import CONSISTENT_RMS, OPTIMIZERS, Optimizer, build_optimizer, clip_by_norm
from dalle_jax.train.optimizer.schedule import Plateau, Schedule, learning_rate, measured

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
    "vocab": 7, "position": 5, "embed": 8, "layers": 3, "qkv": 3, "heads": 2, "head": 4, "mlp": 16, "in": 6, "out": 4,
}  # fmt: skip
DECAYED = {"qkv", "out", "up", "conv", "head"}
HIDDEN = {"qkv", "out", "up", "conv"}


def built(axes=AXES, **values):
    return build_optimizer(Optimizer(**values), steps=10, axes=axes)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=[SIZES.get(axis, 3) for axis in axes]), jnp.float32)
        for name, axes in AXES.items()
    }


def first_update(optimizer, weights, gradient):
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p, value=1.0))(weights, gradient)


def values(schedule, counts):
    return np.array([float(schedule(count)) for count in counts])


def test_cosine_is_the_papers_and_stays_at_its_end():
    schedule = Schedule("cosine", decay_steps=1_200_000, end_learning_rate=1.25e-6)
    got = values(learning_rate(schedule, 1e-4, steps=3_000_000), [0, 300_000, 600_000, 1_200_000, 2_999_999])
    quarter = 1.25e-6 + (1e-4 - 1.25e-6) * (1 + 0.5**0.5) / 2  # of the way: cos(pi / 4)
    np.testing.assert_allclose(got, [1e-4, quarter, (1e-4 + 1.25e-6) / 2, 1.25e-6, 1.25e-6], rtol=1e-5)


@pytest.mark.parametrize(
    "name, end", [("warmup_constant", 1.0), ("plateau", 1.0), ("warmup_cosine", 0.1), ("warmup_linear", 0.0)]
)
def test_warm_up_is_linear_from_the_first_update(name, end):
    rate = learning_rate(Schedule(name, warmup_steps=4, end_learning_rate=0.1), 1.0, steps=104)
    np.testing.assert_allclose(values(rate, range(5)), [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(float(rate(104)), end, atol=1e-6)
    middle = {"warmup_cosine": 0.55, "warmup_linear": 0.5}.get(name, 1.0)
    np.testing.assert_allclose(float(rate(54)), middle, rtol=1e-5)


def test_who_decays_and_who_is_a_hidden_matrix():
    assert {name for name, decays in matrices.decay_mask(AXES).items() if decays} == DECAYED
    found = {name: matrices.dimensions(axes) for name, axes in AXES.items()}
    assert {name for name, dimensions in found.items() if dimensions} == HIDDEN
    assert tuple(found["qkv"]) == ((1,), (3, 4)) and tuple(found["out"]) == ((1, 2), (3,))
    assert tuple(found["up"]) == ((1,), (2,)) and tuple(found["conv"]) == ((0, 1, 2), (3,))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_gradient_only_the_decayed_shrink(name):
    before = params()
    optimizer = built(name=name, learning_rate=0.1, weight_decay=0.5)
    changes, _ = first_update(optimizer, before, jax.tree.map(jnp.zeros_like, before))
    for key, change in changes.items():
        wanted = -0.1 * 0.5 * before[key] if key in DECAYED else jnp.zeros_like(change)
        np.testing.assert_allclose(change, wanted, atol=1e-7, err_msg=key)


def test_clipping_bounds_the_norm_that_adam_sees():
    gradient = jax.tree.map(lambda p: 1e3 * p, params(1))
    clipped = optax.tree.scale(4.0 / optax.tree.norm(gradient), gradient)
    states = []
    for grads, clip_norm in [(gradient, 4.0), (clipped, None)]:
        _, state = first_update(built(clip_norm=clip_norm), params(), grads)
        states.append(optax.tree.get(state, "mu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *states)


def test_clipping_is_optaxs_but_for_a_norm_that_is_given():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # norm 5
    clip = clip_by_norm(2.0)
    wanted = optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())[0]
    for given, scale in (({}, 1.0), ({"norm": jnp.float32(5)}, 1.0), ({"norm": jnp.float32(10)}, 0.5)):
        found, _ = clip.update(grads, clip.init(grads), value=jnp.float32(0), **given)
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda g, scale=scale: scale * g, wanted))
    found, _ = clip.update(grads, clip.init(grads), norm=jnp.float32(1.9))
    jax.tree.map(np.testing.assert_array_equal, found, grads)


def test_muon_treats_each_layer_alone():
    """To the roundings of float32, which five Newton-Schulz steps multiply by 3.4445 each at most."""
    gradient, layer = params(1)["up"], {"w": ("embed", "mlp")}
    stacked, single = (built(axes, name="muon", learning_rate=0.1) for axes in ({"w": AXES["up"]}, layer))
    changes, _ = first_update(stacked, {"w": gradient}, {"w": gradient})
    for index in range(SIZES["layers"]):
        one = {"w": gradient[index]}
        wanted, _ = first_update(single, one, one)
        rounding = 2.0**-24 * 3.4445**5 * float(jnp.abs(wanted["w"]).max())
        np.testing.assert_allclose(changes["w"][index], wanted["w"], rtol=0, atol=rounding)


def test_muon_makes_every_matrix_nearly_orthogonal():
    changes, _ = first_update(built(name="muon", learning_rate=1.0), params(), params(1))
    stacks = {
        "qkv": jnp.einsum("ldcnh->lcdnh", changes["qkv"]).reshape(9, 8, 8),
        "out": changes["out"].reshape(3, 8, 8),
        "up": changes["up"],
        "conv": changes["conv"].reshape(1, 54, 4),
    }
    for name, stack in stacks.items():
        scale = CONSISTENT_RMS * max(stack.shape[1:]) ** 0.5
        singular = np.linalg.svd(np.asarray(stack) / scale, compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1, not to it; a random matrix's smallest may stay small.
        assert singular.max() < 1.3 and np.median(singular) > 0.6, name


def test_plateau_halves_at_most_five_times_and_only_without_improvement():
    schedule = Schedule("plateau", plateau=Plateau(window=2, patience=2, min_improvement=0.01, halvings=5))
    optimizer = built({"w": ("out",)}, learning_rate=1.0, schedule=schedule)
    weights = {"w": jnp.ones(2)}
    update = jax.jit(lambda state, value: optimizer.update(weights, state, weights, value=value)[1])
    state, scales = optimizer.init(weights), []
    for count in range(60):
        state = update(state, jnp.float32(max(1.0 - 0.05 * count, 0.5)))  # falls for ten updates, then stands still
        scales.append(float(measured(state)["plateau_scale"]))
    assert scales[9] == 1.0 and scales[-1] == 0.5**5
    assert set(scales) == {0.5**halvings for halvings in range(6)}
    assert measured(built({"w": ("out",)}).init(weights)) == {}
