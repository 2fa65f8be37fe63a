"""The variational bound of a diffusion step, which trains a learned variance (Nichol and Dhariwal 2021).

Of the hybrid loss, mean((eps - network's)^2) + length / 1000 * `step_bits`, this is the second term: of one step, in
bits of one dimension, blind to the prediction itself. The bound over all steps times 0.001 is the same.
"""

import math

import jax
import jax.numpy as jnp

from dalle_jax.diffusion import Level, Process

HALF_BIN = 1 / 255  # of 256 levels in [-1, 1]
EDGE = 0.999  # beyond it a value is the first level or the last, whose bin has no end
MIN_PROBABILITY = 1e-12
CUBIC = 0.044715  # of the approximation of the normal distribution function by tanh


def step_bits(process: Process, level: Level, *, x0, x, output, range_output, first_B):
    """The term of each example, float32 [B]: bits per dimension.

    level: of each example's step, broadcast with x. x0: values of 256 levels in [-1, 1]. x: the same with noise.
    output, range_output: of the network, both like x; the first gets no gradient. first_B: bool [B], is it step 0?
    """
    found_x0 = process.x0(level, jax.lax.stop_gradient(output), x)
    mean, log_variance = level.posterior_mean(found_x0, x), level.log_variance(range_output)
    from_posterior = gaussian_kl(level.posterior_mean(x0, x), level.min_log_variance, mean, log_variance)
    from_data = -discretized_log_likelihood(x0, mean, log_variance / 2)
    others = tuple(range(1, x.ndim))
    return jnp.where(first_B, from_data.mean(others), from_posterior.mean(others)) / math.log(2)


def gaussian_kl(mean, log_variance, other_mean, other_log_variance):
    """KL(first | other) of normal distributions, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1
        + jnp.exp(log_variance - other_log_variance)
        + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    )


def discretized_log_likelihood(x, mean, log_std):
    """Logarithm of a normal distribution's probability of the bin around each x, in nats; x of 256 levels in [-1, 1].

    The first and the last bin go on to infinity.
    """

    def below(edge):
        z = (edge - mean) * jnp.exp(-log_std)
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + CUBIC * z**3)))

    upper, lower = below(x + HALF_BIN), below(x - HALF_BIN)
    probability = jnp.where(x < -EDGE, upper, jnp.where(x > EDGE, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, MIN_PROBABILITY))
