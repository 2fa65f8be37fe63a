"""The adversarial loss has taming's gradients, taken here the plain way: one jax.grad for each term.

A tokenizer of one hidden and one last convolution, the smallest in which the last weight is not the only one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dalle_jax.errors import UserError
from dalle_jax.models import discriminator
from dalle_jax.models.layers import Model, param
from dalle_jax.models.ops import conv
from dalle_jax.train.adversary import Adversary, against, hinge_loss, made_by

STEP, START = 7, 5
JUDGE = discriminator.model(Adversary(width=4, layers=1).discriminator("fp32"))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.hidden = param(rngs, (3, 3, 3, 6), axes=(None, None, "in", "out"), std=0.2)
        self.last = param(rngs, (3, 3, 6, 3), axes=(None, None, "in", "out"), std=0.2)

    def __call__(self, x_BHWC):
        return conv(jnp.tanh(conv(x_BHWC, self.hidden[...])), self.last[...])


DECODER = Model(None, Decoder)


def error_of(made, real):
    return jnp.abs(made - real).mean() + 0.3 * jnp.square(made - real).mean()


@pytest.fixture(scope="module")
def parts():
    """Parameters of both sides, and pictures."""
    rng = np.random.default_rng(0)

    def filled(model):
        return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), model.abstract)

    params = {**filled(DECODER), "discriminator": filled(JUDGE)}
    return params, rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


def joined(adversary, params, real, step):
    """Our loss and metrics."""
    own = {name: leaf for name, leaf in params.items() if name != "discriminator"}
    made, by_last = made_by(DECODER, own, real[:, ::-1], method="__call__", last=("last",))
    error, gradient = jax.value_and_grad(error_of)(jax.lax.stop_gradient(made), real)
    judged = params["discriminator"]
    return against(
        adversary,
        JUDGE.apply,
        judged,
        real=real,
        made=made,
        by_last=by_last,
        error=error,
        error_gradient=gradient,
        step=step,
    )


@pytest.fixture(scope="module")
def plain(parts):
    """taming's terms, each with its gradient: of the error, of the generator, of the discriminator."""

    @jax.jit
    def terms(params, real):
        own = {name: leaf for name, leaf in params.items() if name != "discriminator"}
        judge = params["discriminator"]

        def nll(own):
            return error_of(DECODER.apply(own, real[:, ::-1]), real)

        def g_loss(own):
            return -JUDGE.apply(judge, DECODER.apply(own, real[:, ::-1])).mean()

        def d_loss(judge):
            logits_real, logits_fake = JUDGE.apply(judge, real), JUDGE.apply(judge, DECODER.apply(own, real[:, ::-1]))
            return 0.5 * (jnp.maximum(0, 1 - logits_real).mean() + jnp.maximum(0, 1 + logits_fake).mean())

        return [jax.value_and_grad(term)(of) for term, of in ((nll, own), (g_loss, own), (d_loss, judge))]

    return jax.tree.map(np.asarray, terms(*parts))


def ours(adversary, params, real, step=STEP):
    run = jax.jit(jax.value_and_grad(lambda p, step: joined(adversary, p, real, step), has_aux=True))
    (value, measured), grads = run(params, step)
    return value, grads, measured


@pytest.mark.parametrize("values", [dict(), dict(adaptive=False), dict(max_weight=0.01, weight=3.0)], ids=str)
def test_value_and_gradients_are_tamings(parts, plain, values):
    adversary = Adversary(start=START, width=4, layers=1, **values)
    value, grads, measured = ours(adversary, *parts)
    (nll, by_nll), (g_loss, by_g), (d_loss, by_d) = plain
    d_weight = np.linalg.norm(by_nll["last"]) / (np.linalg.norm(by_g["last"]) + 1e-4)  # of the last layer
    d_weight = adversary.weight * (min(d_weight, adversary.max_weight) if adversary.adaptive else 1.0)
    np.testing.assert_allclose(measured["adversary_weight"], d_weight, rtol=1e-4)
    np.testing.assert_allclose(value, nll + d_weight * g_loss + d_loss, rtol=1e-5)
    np.testing.assert_allclose(
        (measured["generator_loss"], measured["discriminator_loss"]), (g_loss, d_loss), rtol=1e-5
    )
    want = {name: by_nll[name] + d_weight * by_g[name] for name in by_nll} | {"discriminator": by_d}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, want)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in (by_g["hidden"], by_nll["hidden"], by_d["conv_1"]["weight"]))


def test_when_each_side_comes_in(parts):
    """The discriminator learns from 3 on; its gradient counts from 5 on, rising to the whole in 4 updates."""
    params, real = parts
    adversary = Adversary(learns_from=3, start=START, ramp=4, width=4, layers=1, adaptive=False)
    without = jax.grad(lambda p: error_of(DECODER.apply({k: p[k] for k in ("hidden", "last")}, real[:, ::-1]), real))(
        params
    )
    run = jax.jit(jax.value_and_grad(lambda p, step: joined(adversary, p, real, step), has_aux=True))
    weights = []
    for step in range(11):
        (value, measured), grads = run(params, step)
        learns = any(np.any(leaf) for leaf in jax.tree.leaves(grads["discriminator"]))
        assert learns == (step >= 3) and np.isfinite(value)
        assert step >= 3 or not any(map(np.any, measured.values()))
        same = all(np.allclose(grads[name], without[name], rtol=1e-5, atol=1e-8) for name in ("hidden", "last"))
        assert same == (step <= START)
        weights.append(float(measured["adversary_weight"]))
    np.testing.assert_allclose(weights, 0.8 * np.array([0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]), rtol=1e-6)


def test_without_a_ramp_it_counts_in_whole_at_the_start():
    adversary = Adversary(start=START)
    assert [float(adversary.weight_at(step)) for step in (0, 4, 5, 6)] == [0, 0, np.float32(0.8), np.float32(0.8)]


def test_the_hinge():
    assert hinge_loss(jnp.array([2.0, 0.0]), jnp.array([-3.0, 1.0])) == 0.5 * (0.5 + 1.0)


def test_defaults_are_tamings():
    found = Adversary()
    assert (found.weight, found.max_weight, found.start, found.width, found.layers, found.norm) == (
        0.8, 1e4, 10_000, 64, 3, "batch",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(weight=0), "adversary.weight"),
        (dict(max_weight=-1), "adversary.max_weight"),
        (dict(learns_from=-1), "adversary.learns_from"),
        (dict(learns_from=10, start=10), "untrained discriminator"),
        (dict(start=0), "adversary.start"),
        (dict(ramp=1.5), "adversary.ramp"),
        (dict(norm="layer"), "batch, group"),
        (dict(norm="group", width=20), "multiple of 16"),
        (dict(layers=0), "layers"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Adversary(**values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(microbatch=1), "norm=group"),
        (dict(image_size=20), "layers = 3"),
        (dict(steps=10_000), "never counts"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(given, message):
    fits = dict(microbatch=2, image_size=24, steps=10_001)
    Adversary().check_fits(**fits)
    with pytest.raises(UserError, match=message):
        Adversary().check_fits(**{**fits, **given})
    if "microbatch" in given:
        Adversary(norm="group").check_fits(**{**fits, **given})
