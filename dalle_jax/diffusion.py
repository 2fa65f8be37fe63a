"""The diffusion process: how noise covers x0 step by step, what a network predicts, and how a sample walks back.

Steps are numbered from 0, the least noisy; step j has x_j = signal_j x0 + noise_j eps. Everything is computed in
float64; cast it last. `Process` gives tables [N] over its steps: `Level`, what one step means, and `Update`, one step
of a sampler. Both are tuples of arrays: pick or cast their parts alike, so that they broadcast with x, which may be a
numpy or a JAX array of any shape. Sources: Ho et al. 2020, Nichol and Dhariwal 2021 and its code (cosine, learned
range, spacing), Song et al. 2021 (DDIM), Bao et al. 2022 (Analytic DPM).
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.errors import UserError, check_choice, check_number

SCHEDULES = ("cosine", "linear")
PREDICTIONS = ("eps", "x0", "v")
# Variance of an ancestral step: the posterior's, beta, or between the two in its logarithm as the network says.
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
OFFSET, MAX_BETA = 0.008, 0.999  # of the cosine schedule
LINEAR = (1e-4, 2e-2)  # first and last beta of 1,000 steps; those of N steps are 1,000 / N times as large
FAST27 = "10,10,3,2,2"  # of GLIDE's upsampler, whose last step stands a little earlier
MAX_LENGTH = 1 << 16


class Level(NamedTuple):
    """A step's coefficients: x = signal x0 + noise eps, and x0 = x0_of_x x - x0_of_eps eps."""

    signal: Any
    noise: Any
    x0_of_x: Any
    x0_of_eps: Any
    posterior_x0: Any  # the mean of the step before, given x0 and x
    posterior_x: Any
    min_log_variance: Any  # of the step before: the posterior's, and beta; equal where the variance is fixed
    max_log_variance: Any

    def add_noise(self, x0, eps):
        return self.signal * x0 + self.noise * eps

    def eps(self, x0, x):
        """The noise in x if x0 is its clean part."""
        return (self.x0_of_x * x - x0) / self.x0_of_eps

    def posterior_mean(self, x0, x):
        """Mean of q(x before | x, x0)."""
        return self.posterior_x0 * x0 + self.posterior_x * x

    def log_variance(self, range_output):
        """The logarithm of the variance of p(x before | x). range_output: the network's, about -1 to 1."""
        share = (range_output + 1) / 2
        return share * self.max_log_variance + (1 - share) * self.min_log_variance


class Update(NamedTuple):
    """A sampler's step, from x with its predicted x0 and fresh noise z: x0 * `x0` + x * `x` + z * `noise`."""

    x0: Any
    x: Any
    noise: Any

    def apply(self, x0, x, z):
        return self.x0 * x0 + self.x * x + self.noise * z


@dataclasses.dataclass(frozen=True)
class Process:
    """A chain of steps, what a network predicts of them, and which of them are taken.

    schedule: one of SCHEDULES. length: steps that a network is trained on. prediction: one of PREDICTIONS; v is
    signal eps - noise x0. variance: one of VARIANCES; with 'learned_range' a network gives twice the channels, the
    prediction first. spacing: the steps that are taken, see `spaced`; None for all.

    Raises:
      UserError: an unknown name, or steps that are impossible.
    """

    schedule: str = "cosine"
    length: int = 1_000
    prediction: str = "eps"
    variance: str = "fixed_small"
    spacing: str | int | None = None

    def __post_init__(self):
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_choice("variance", self.variance, VARIANCES)
        check_number("the length of a diffusion process", self.length, min=2, max=MAX_LENGTH, whole=True)
        _ = self.timesteps

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """int64 [N], ascending: what a network is told at each step, a place in the chain of `length`."""
        if self.spacing is None:
            return _fixed(np.arange(self.length))
        return _fixed(np.array(spaced(self.spacing, self.length)))

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """[N]: the share of a step's variance that is new noise."""
        betas = _betas(self.schedule, self.length)
        if self.spacing is not None:
            kept = np.cumprod(1.0 - betas)[self.timesteps]
            betas = 1.0 - kept / np.append(1.0, kept[:-1])
        return _fixed(betas)

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """[N]: the share of x0 in the variance of a step."""
        return _fixed(np.cumprod(1.0 - self.betas))

    @functools.cached_property
    def _before(self) -> np.ndarray:
        return np.append(1.0, self.alpha_bar[:-1])

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """[N]: of q(x before | x, x0); 0 at step 0."""
        return _fixed(self.betas * (1.0 - self._before) / (1.0 - self.alpha_bar))

    @functools.cached_property
    def levels(self) -> Level:
        """The table of all steps. At step 0, where the posterior has no variance, its logarithm is that of step 1."""
        betas, bar, before = self.betas, self.alpha_bar, self._before
        small = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        large = np.log(betas)
        if self.variance == "fixed_small":
            large = small
        elif self.variance == "fixed_large":
            small = large = np.append(small[0], large[1:])
        table = Level(
            signal=np.sqrt(bar),
            noise=np.sqrt(1.0 - bar),
            x0_of_x=np.sqrt(1.0 / bar),
            x0_of_eps=np.sqrt(1.0 / bar - 1),
            posterior_x0=betas * np.sqrt(before) / (1.0 - bar),
            posterior_x=(1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - bar),
            min_log_variance=small,
            max_log_variance=large,
        )
        return Level(*map(_fixed, table))

    def x0(self, level: Level, output, x):
        """The clean x that an output, without the channels of a range, predicts."""
        if self.prediction == "x0":
            return output
        if self.prediction == "v":
            return level.signal * x - level.noise * output
        return level.x0_of_x * x - level.x0_of_eps * output

    def target(self, level: Level, x0, eps):
        """The output that a network should give for x0 with noise eps."""
        return {"x0": x0, "eps": eps, "v": level.signal * eps - level.noise * x0}[self.prediction]

    def ancestral(self) -> Update:
        """Draw from the posterior, with no noise at step 0.

        With 'learned_range' the standard deviation is the network's, exp(log_variance / 2), times this `noise`.
        """
        learned = self.variance == "learned_range"
        noise = np.ones(len(self.betas)) if learned else np.exp(0.5 * self.levels.min_log_variance)
        return Update(self.levels.posterior_x0, self.levels.posterior_x, _last_without(noise))

    def ddim(self, eta: float = 0.0) -> Update:
        """Song et al. 2021, equation 12; eta 0 takes no noise, 1 as much as the posterior has."""
        bar, before = self.alpha_bar, self._before
        sigma = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
        return self._towards(before, sigma)

    def inversion(self) -> Update:
        """DDIM backwards: from a step to the noisier one, or to pure noise; exact where x0 is not clamped."""
        return self._towards(np.append(self.alpha_bar[1:], 0.0), np.zeros_like(self.alpha_bar))

    def analytic(self, eps_squares: np.ndarray, *, max_variance: float = 1.0) -> Update:
        """The ancestral step with the best variance for a trained network (Bao et al. 2022).

        eps_squares: [N], the mean square of a coordinate of the noise that the network finds at each step, measured
        over data. max_variance: a bound on the variance of a coordinate of x0.
        """
        levels, bar = self.levels, self.alpha_bar
        x0_variance = np.clip((1 - bar) / bar * (1 - np.asarray(eps_squares, np.float64)), 0.0, max_variance)
        noise = np.sqrt(self.posterior_variance + levels.posterior_x0**2 * x0_variance)
        return Update(levels.posterior_x0, levels.posterior_x, _last_without(noise))

    def _towards(self, bar, sigma) -> Update:
        """To x0 and the noise that is in x, mixed anew for this share of x0, and sigma of fresh noise."""
        eps = np.sqrt(1 - bar - sigma**2)
        of_x0 = np.sqrt(bar) - eps / self.levels.x0_of_eps
        return Update(of_x0, eps * self.levels.x0_of_x / self.levels.x0_of_eps, _last_without(sigma))


def _last_without(noise: np.ndarray) -> np.ndarray:
    """The table without noise in a sampler's last step, step 0."""
    return np.append(0.0, noise[1:])


def _fixed(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table


def _betas(schedule: str, length: int) -> np.ndarray:
    if schedule == "linear":
        first, last = (1_000 / length * beta for beta in LINEAR)
        return np.linspace(first, last, length)

    def bar(share):
        return math.cos((share + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / length) / bar(i / length), MAX_BETA) for i in range(length)])


def spaced(spacing: str | int, length: int) -> list[int]:
    """The steps that are taken of a chain of `length`, ascending; as many as are asked for.

    spacing: 'N', evenly from the first to the last; 'N1,N2,..', so many of each of equal parts of the chain, the least
    noisy first; 'ddimN', every s-th from the first for a whole number s; 'fast27', GLIDE's for its upsampler.

    Raises:
      UserError: another form, fewer than 2 steps in all or none in a part, or more than there are.
    """
    text = str(spacing)
    if text == "fast27":
        return [*_evenly([int(count) for count in FAST27.split(",")], length)[:-1], length - 3]
    if not re.fullmatch(r"ddim\d{1,9}|\d{1,9}(,\d{1,9})*", text, re.ASCII):
        raise UserError(
            "expected diffusion steps as a number, numbers with commas for equal parts of the chain, ddim and a "
            f"number, or fast27, got {text!r}: write, say, 27"
        )
    counts = [int(count) for count in text.removeprefix("ddim").split(",")]
    if min(counts) < 1 or not 2 <= sum(counts) <= length:
        raise UserError(
            f"expected 2 to {length:,} diffusion steps and at least 1 in each part, got {text!r}: choose as many"
        )
    return _strided(counts[0], length) if text.startswith("ddim") else _evenly(counts, length)


def _strided(count: int, length: int) -> list[int]:
    made = {len(range(0, length, stride)): stride for stride in range(length - 1, 0, -1)}
    if count not in made:
        near = sorted(sorted(made, key=lambda number: abs(number - count))[:2])
        raise UserError(
            f"expected ddim with a number of steps that a whole stride through {length:,} makes, got ddim{count}: take "
            f"{' or '.join(f'ddim{number}' for number in near)}, or {count}, which is spaced evenly"
        )
    return list(range(0, length, made[count]))


def _evenly(counts: list[int], length: int) -> list[int]:
    """So many of each part, its first and last among them; of parts of unequal sizes the first are longer."""
    steps, start = [], 0
    for index, count in enumerate(counts):
        size = length // len(counts) + (index < length % len(counts))
        if count > size:
            raise UserError(
                f"expected at most {size:,} diffusion steps in part {index + 1} of {len(counts)}, which has no more, "
                f"got {count:,}: take fewer"
            )
        stride, place = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):
            steps.append(start + round(place))
            place += stride  # summed up, as in the released code: now and then it rounds to another step
        start += size
    return steps
