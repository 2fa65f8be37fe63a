"""The bound that trains a learned variance: published numbers, integrals done slowly, and who gets a gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.diffusion import Level, Process
from dalle_jax.train.variational import discretized_log_likelihood, gaussian_kl, step_bits
from tests.support.formula_weights import uniform

PROCESS = Process(variance="learned_range")
X0, EPS = (scale * uniform(1000 + k, 48).reshape(1, 3, 4, 4) for k, scale in ((10, 0.9), (11, 1.0)))
OUTPUT, RANGE = np.split(uniform(1012, 96).reshape(1, 6, 4, 4), 2, axis=1)


def bits(steps, output=OUTPUT, range_output=RANGE):
    """float32 [B], for the same example at each of the steps."""
    steps = np.array(steps)
    level = Level(*(jnp.asarray(table, jnp.float32)[steps, None, None, None] for table in PROCESS.levels))
    x0, eps = (jnp.asarray(np.repeat(a, len(steps), 0), jnp.float32) for a in (X0, EPS))
    output, range_output = (jnp.broadcast_to(a, x0.shape).astype(jnp.float32) for a in (output, range_output))
    x = level.add_noise(x0, eps)
    return step_bits(PROCESS, level, x0=x0, x=x, output=output, range_output=range_output, first_B=steps == 0)


def test_published_numbers():
    """What OpenAI's code made of the same arrays; they may never change."""
    assert np.square(EPS - OUTPUT).mean() == pytest.approx(0.753768, abs=1e-6)
    np.testing.assert_allclose(bits([0, 1, 500, 999]), [1.543653, 0.465414, 0.003396, 543.185791], rtol=1e-4)


def test_only_the_range_gets_a_gradient():
    by_output, by_range = jax.grad(lambda *args: bits([0, 1, 500], *args).sum(), (0, 1))(
        jnp.asarray(OUTPUT, jnp.float32), jnp.asarray(RANGE, jnp.float32)
    )
    assert not by_output.any() and np.isfinite(by_range).all() and (by_range != 0).all()


def test_a_kl_is_its_integral():
    mean, log_variance, other_mean, other_log_variance = 0.3, -1.2, -0.4, 0.5
    x = np.linspace(-12, 12, 200_001)

    def log_density(mean, log_variance):
        return -0.5 * (np.log(2 * np.pi) + log_variance + (x - mean) ** 2 * np.exp(-log_variance))

    p, q = log_density(mean, log_variance), log_density(other_mean, other_log_variance)
    wanted = (np.exp(p) * (p - q)).sum() * (x[1] - x[0])
    assert float(gaussian_kl(mean, log_variance, other_mean, other_log_variance)) == pytest.approx(wanted, rel=1e-5)
    assert float(gaussian_kl(mean, log_variance, mean, log_variance)) == 0


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.05), (0.3, 0.01), (-0.95, 0.1), (1.2, 0.5)])
def test_the_bins_of_256_levels_share_the_whole_probability(mean, std):
    """Each is the normal distribution's over its bin, to the error of the approximation by tanh."""
    x = np.arange(256) / 127.5 - 1
    found = np.exp(discretized_log_likelihood(jnp.asarray(x, jnp.float32), mean, math.log(std)))
    assert found.sum() == pytest.approx(1, abs=1e-4)
    edges = np.append(np.append(-np.inf, (x[1:] + x[:-1]) / 2), np.inf)
    below = np.array([0.5 * (1 + math.erf((edge - mean) / std / math.sqrt(2))) for edge in edges])
    np.testing.assert_allclose(found, np.diff(below), atol=1e-3)


def test_no_probability_is_below_a_trillionth():
    assert float(discretized_log_likelihood(jnp.float32(-0.5), 0.9, -8.0)) == pytest.approx(math.log(1e-12), rel=1e-5)
