"""The diffusion process against Bayes' rule and Gaussians, by what its samplers must keep, and by published numbers.

The numbers are what OpenAI's code made, in float64 where they are tables; they may never change. With PyTorch and
guided-diffusion-sdk, its modules alone, all tables are compared bit for bit.
"""

import itertools

import numpy as np
import pytest

from dalle_jax.diffusion import PREDICTIONS, SCHEDULES, VARIANCES, Process, spaced
from dalle_jax.errors import UserError
from tests.support.formula_weights import uniform

ROUNDING = 1e-7  # of a respaced last step, whose 1 - beta, 2e-9 and more, is a difference of numbers near 1
SPACINGS = [None, "2", "7", "27", "250", "fast27", "ddim25", "ddim27", "10,10,3,2,2", "1,1", "40,30,20,10,5,1,1"]
EVERY = [*itertools.product(SCHEDULES, SPACINGS)]


def values(k, channels=3):
    return uniform(1000 + k, channels * 16).reshape(1, channels, 4, 4)


def at(table, step):
    """The level or update of one step."""
    return type(table)(*(column[step] for column in table))


def test_check_values():
    cosine, linear = Process(), Process("linear")
    betas = [4.12842e-5, 4.61418e-5, 3.155691e-3, 0.555554, 0.7499994, 0.999]
    np.testing.assert_allclose(cosine.betas[[0, 1, 500, 997, 998, 999]], betas, rtol=1e-5)
    bars = [0.9999587158, 0.4938435904, 2.428767e-6, 2.428767e-9]
    np.testing.assert_allclose(cosine.alpha_bar[[0, 499, 998, 999]], bars, rtol=1e-6)
    assert (cosine.betas[:-1] < 0.999).all() and cosine.betas[-1] == 0.999
    np.testing.assert_allclose(linear.betas[[0, 1, 999]], [1e-4, 1.19920e-4, 2e-2], rtol=1e-5)
    np.testing.assert_allclose(linear.alpha_bar[[0, 999]], [0.9999, 4.035830e-5], rtol=1e-6)
    np.testing.assert_allclose(Process("linear", 100).betas[[0, 99]], [1e-3, 0.2], rtol=1e-12)
    assert cosine.posterior_variance[0] == 0 and cosine.posterior_variance[1] == pytest.approx(2.1789496e-5, rel=1e-7)
    learned = Process(variance="learned_range").levels
    np.testing.assert_allclose(learned.min_log_variance[:2], [-10.7340825] * 2, rtol=1e-8)
    np.testing.assert_allclose(learned.max_log_variance[:2], [-10.0950301, -9.9837923], rtol=1e-8)


STEPS = {
    "7": [0, 166, 333, 500, 666, 832, 999],
    "15": [0, 71, 143, 214, 285, 357, 428, 500, 571, 642, 714, 785, 856, 928, 999],
    "25": [0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832, 874,
           916, 957, 999],
    "27": [0, 38, 77, 115, 154, 192, 231, 269, 307, 346, 384, 423, 461, 499, 538, 576, 615, 653, 692, 730, 768, 807,
           845, 884, 922, 961, 999],
    "fast27": [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399, 400, 500,
               599, 600, 799, 800, 997],
    "ddim15": [*range(0, 939, 67)],
    "ddim25": [*range(0, 961, 40)],
    "ddim27": [*range(0, 989, 38)],
}  # fmt: skip


@pytest.mark.parametrize("spacing", STEPS)
def test_published_steps(spacing):
    assert spaced(spacing, 1000) == STEPS[spacing]
    assert Process(spacing=spacing).timesteps.tolist() == STEPS[spacing]


def test_steps_asked_are_steps_made():
    for length in (2, 3, 50, 999, 1000, 4000):
        for count in {2, 3, 7, 48, 50, length // 2, length - 1, length}:
            if 2 <= count <= length:
                steps = spaced(count, length)
                assert len(set(steps)) == count and steps == sorted(steps) and (steps[0], steps[-1]) == (0, length - 1)
    for count in (50, 100, 250, 500, 1000):
        assert len(spaced(f"ddim{count}", 1000)) == count
    assert spaced("3,2", 10) == [0, 2, 4, 5, 9]
    assert spaced("2,1,2", 11) == [0, 3, 4, 8, 10]  # parts of 4, 4 and 3
    assert spaced("250", 1000)[:3] == [0, 4, 8] and spaced("250", 1000)[-3:] == [991, 995, 999]
    # Bao et al. count from 1: round(1 + i (T - 1) / (N - 1)).
    assert spaced("64", 1000) == [round(1 + i * 999 / 63) - 1 for i in range(64)]


@pytest.mark.parametrize(
    ("spacing", "words"),
    [(0, "2 to 1,000"), ("1", "2 to 1,000"), ("1001", "2 to 1,000"), ("27,0", "at least 1 in each part"),
     ("10,600", "at most 500 .* part 2 of 2"), ("ddim64", "ddim63 or ddim67, or 64"), ("ddim1", "2 to 1,000"),
     ("-3", "'-3'"), ("27,", "'27,'"), ("", "''"), ("ddim", "'ddim'"), (2.5, "'2.5'"), ("fast28", "'fast28'"),
     ("ddim5,5", "'ddim5,5'"), ("٣٣", "write, say, 27"), ("9" * 5000, "write, say, 27")],
)  # fmt: skip
def test_impossible_steps_are_refused_in_one_sentence(spacing, words):
    with pytest.raises(UserError, match=words):
        Process(spacing=spacing)


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "cosin"}, {"prediction": "noise"}, {"variance": "learned"}, {"length": 1}, {"length": 10**7},
     {"length": 10.0}, {"spacing": "fast27", "length": 40}],
)  # fmt: skip
def test_what_is_no_process_is_refused(wrong):
    with pytest.raises(UserError, match="expected"):
        Process(**wrong)


@pytest.mark.parametrize(("schedule", "spacing"), EVERY)
def test_the_chain_is_a_product_of_gaussian_steps(schedule, spacing):
    """Steps of variance beta one after another give alpha_bar; kept ones are as noisy as in the whole chain."""
    process, whole = Process(schedule, spacing=spacing), Process(schedule)
    np.testing.assert_allclose(process.alpha_bar, whole.alpha_bar[process.timesteps], rtol=ROUNDING)
    signal, variance = 1.0, 0.0
    for step, beta in enumerate(process.betas):
        signal, variance = signal * np.sqrt(1 - beta), variance * (1 - beta) + beta
        level = at(process.levels, step)
        np.testing.assert_allclose([level.signal, level.noise**2], [signal, variance], rtol=1e-9)


@pytest.mark.parametrize(("schedule", "spacing"), EVERY)
def test_the_posterior_is_bayes_rule(schedule, spacing):
    """q(before | x, x0) by adding the precisions of q(before | x0) and q(x | before)."""
    process = Process(schedule, spacing=spacing)
    x0, x = 0.7, -0.4
    for step in range(1, len(process.betas)):
        beta, bar = process.betas[step], process.alpha_bar[step - 1]
        precision = 1 / (1 - bar) + (1 - beta) / beta
        mean = (np.sqrt(bar) * x0 / (1 - bar) + np.sqrt(1 - beta) * x / beta) / precision
        level = at(process.levels, step)
        assert level.posterior_mean(x0, x) == pytest.approx(mean, rel=1e-7, abs=1e-9)
        assert process.posterior_variance[step] == pytest.approx(1 / precision, rel=1e-7)
        assert level.min_log_variance == pytest.approx(-np.log(precision), rel=1e-7)
    first = at(process.levels, 0)
    assert first.posterior_mean(x0, x) == pytest.approx(x0) and first.min_log_variance > -40


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_a_network_predicts_gives_back_x0_and_noise(prediction):
    process = Process(prediction=prediction, spacing="27")
    x0, eps = values(0), values(1)
    for step in range(26):  # at the last, 5e-5 of x are x0
        level = at(process.levels, step)
        x = level.add_noise(x0, eps)
        target = process.target(level, x0, eps)
        np.testing.assert_allclose(process.x0(level, target, x), x0, atol=1e-9)
        np.testing.assert_allclose(level.eps(x0, x), eps, atol=1e-9)
    bar = process.alpha_bar[13]
    level = at(process.levels, 13)
    wanted = {"eps": eps, "x0": x0, "v": np.sqrt(bar) * eps - np.sqrt(1 - bar) * x0}[prediction]
    np.testing.assert_allclose(process.target(level, x0, eps), wanted, rtol=1e-12)


def test_the_three_variances():
    small, large, learned = (Process(variance=variance, spacing="27") for variance in VARIANCES)
    posterior, betas = small.posterior_variance, small.betas
    np.testing.assert_allclose(np.exp(small.levels.min_log_variance), np.append(posterior[1], posterior[1:]))
    np.testing.assert_allclose(np.exp(large.levels.max_log_variance), np.append(posterior[1], betas[1:]))
    for fixed in (small, large):
        np.testing.assert_allclose(fixed.levels.log_variance(np.full(27, 0.3)), fixed.levels.min_log_variance)
        found = fixed.ancestral().noise
        np.testing.assert_allclose(found[1:], np.exp(fixed.levels.min_log_variance / 2)[1:])
        assert found[0] == 0
    low, high = (np.append(posterior[1], posterior[1:]), betas)
    for share in (0.0, 0.25, 1.0, 1.5):  # beyond the ends, too
        found = learned.levels.log_variance(np.full(27, 2 * share - 1))
        np.testing.assert_allclose(np.exp(found), low ** (1 - share) * high**share)
    assert learned.ancestral().noise.tolist() == [0.0] + [1.0] * 26


# Step -> the first two values of x0, mean before, log variance, DDIM with eta 0 (all with x0 clamped), inversion
# (without). x is X(11), the network's output X(12), '27' steps of the cosine schedule.
GOLDEN = {
    0: [(0.99857, -0.04522), (0.99857, -0.04522), (-10.10165, -10.09553), (0.99857, -0.04522), (0.97645, -0.05819)],
    1: [(1.0, -0.03337), (0.99997, -0.03348), (-9.3067, -5.57279), (0.99993, -0.03454), (0.97391, -0.05724)],
    13: [(1.0, 0.11783), (0.98906, -0.0202), (-2.33939, -2.24348), (1.01998, -0.03378), (0.91027, -0.05914)],
    26: [(1.0, 1.0), (0.06001, 0.05915), (-0.00293, -0.00022), (1.0542, 0.01284), (-0.27058, -0.18158)],
}


@pytest.mark.parametrize("step", GOLDEN)
def test_published_numbers(step):
    process = Process(variance="learned_range", spacing="27")
    level, x, (output, range_output) = at(process.levels, step), values(11), np.split(values(12, 6), 2, axis=1)
    x0 = process.x0(level, output, x)
    clamped = x0.clip(-1, 1)
    found = [
        clamped,
        at(process.ancestral(), step).apply(clamped, x, 0),
        level.log_variance(range_output),
        at(process.ddim(), step).apply(clamped, x, 0),
        at(process.inversion(), step).apply(x0, x, 0),
    ]
    np.testing.assert_allclose([a[0, 0, 0, :2] for a in found], GOLDEN[step], atol=6e-6)


@pytest.mark.parametrize(("schedule", "spacing"), EVERY)
def test_ddim_with_eta_1_is_the_ancestral_step(schedule, spacing):
    """The same noise, and the same mean given x0 and x."""
    process = Process(schedule, spacing=spacing)
    for ours, wanted in zip(process.ddim(1.0), process.ancestral(), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_keeps_the_noise_that_it_does_not_draw(eta):
    """From x0 with noise to x0 with as much noise as the step before has."""
    process, x0, eps = Process(spacing="27"), 0.3, -1.2
    update, bar = process.ddim(eta), np.append(1.0, process.alpha_bar)
    for step in range(27):
        mean = at(update, step).apply(x0, at(process.levels, step).add_noise(x0, eps), 0)
        kept = np.sqrt(1 - bar[step] - update.noise[step] ** 2)
        assert mean == pytest.approx(np.sqrt(bar[step]) * x0 + kept * eps, abs=1e-9)
    assert (update.noise > 0).any() == (eta > 0) and update.noise[0] == 0


def test_inversion_undoes_ddim():
    process, x0, eps = Process(spacing="27"), values(0), values(1)
    forward, back = process.ddim(), process.inversion()
    for step in range(26):
        x = at(process.levels, step).add_noise(x0, eps)
        above = at(back, step).apply(x0, x, 0)
        np.testing.assert_allclose(above, at(process.levels, step + 1).add_noise(x0, eps), atol=1e-9)
        np.testing.assert_allclose(at(forward, step + 1).apply(x0, above, 0), x, atol=1e-9)
    last = at(process.levels, 26).add_noise(x0, eps)
    np.testing.assert_allclose(at(back, 26).apply(x0, last, 0), eps, atol=1e-9)


@pytest.mark.parametrize("variance", [0.05, 0.29, 1.0])
@pytest.mark.parametrize("spacing", ["5", "27"])
def test_analytic_steps_keep_the_distribution_of_gaussian_data(spacing, variance):
    """With the best network for data of N(0, variance), every step's x is as broad as it must be, however few."""
    process = Process(spacing=spacing)
    bar = process.alpha_bar
    total = bar * variance + 1 - bar  # variance of x
    update = process.analytic((1 - bar) / total)
    x0_of_x = np.sqrt(bar) * variance / total
    broad = total[-1]
    for step in reversed(range(1, len(bar))):
        broad = (update.x0[step] * x0_of_x[step] + update.x[step]) ** 2 * broad + update.noise[step] ** 2
        assert broad == pytest.approx(total[step - 1], rel=ROUNDING)
    assert update.noise[0] == 0


def test_analytic_variances_are_bounded():
    process = Process(spacing="27")
    levels, posterior = process.levels, process.posterior_variance
    for squares, bound, x0_variance in ((1.5, 1.0, 0.0), (-1e9, 0.29, 0.29), (-1e9, 1.0, 1.0)):
        found = process.analytic(np.full(27, squares), max_variance=bound).noise
        np.testing.assert_allclose(found[1:] ** 2, (posterior + levels.posterior_x0**2 * x0_variance)[1:])


@pytest.mark.parametrize(("schedule", "spacing"), EVERY)
def test_tables_are_the_originals_bit_for_bit(schedule, spacing):
    pytest.importorskip("torch", reason="the comparison takes PyTorch and guided-diffusion-sdk")
    gd = pytest.importorskip("guided_diffusion.gaussian_diffusion", reason="the comparison takes guided-diffusion-sdk")
    respace = pytest.importorskip("guided_diffusion.respace", reason="the comparison takes guided-diffusion-sdk")
    counts = "10,10,3,2,2" if spacing == "fast27" else spacing or "1000"
    kept = respace.space_timesteps(1000, counts)
    if spacing == "fast27":  # the replacement is GLIDE's
        kept = kept - {999} | {997}
    kinds = {"model_mean_type": gd.ModelMeanType.EPSILON, "model_var_type": gd.ModelVarType.LEARNED_RANGE}
    kinds |= {"loss_type": gd.LossType.RESCALED_MSE, "betas": gd.get_named_beta_schedule(schedule, 1000)}
    theirs = respace.SpacedDiffusion(kept, **kinds) if spacing else gd.GaussianDiffusion(**kinds)
    process = Process(schedule, variance="learned_range", spacing=spacing)
    assert process.timesteps.tolist() == (theirs.timestep_map if spacing else [*range(1000)])
    ours = {name: getattr(process, name) for name in ("betas", "alpha_bar", "posterior_variance")}
    ours |= process.levels._asdict()
    wanted = {
        "betas": theirs.betas,
        "alpha_bar": theirs.alphas_cumprod,
        "posterior_variance": theirs.posterior_variance,
        "signal": theirs.sqrt_alphas_cumprod,
        "noise": theirs.sqrt_one_minus_alphas_cumprod,
        "x0_of_x": theirs.sqrt_recip_alphas_cumprod,
        "x0_of_eps": theirs.sqrt_recipm1_alphas_cumprod,
        "posterior_x0": theirs.posterior_mean_coef1,
        "posterior_x": theirs.posterior_mean_coef2,
        "min_log_variance": theirs.posterior_log_variance_clipped,
        "max_log_variance": np.log(theirs.betas),
    }
    assert ours.keys() == wanted.keys()
    for name, table in wanted.items():
        assert ours[name].dtype == np.float64 and (ours[name] == table).all(), name
