"""The paper's 16-bit formats: all 65,536 codes of each, rounding, and Adam's clipped second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax.train.optimizer import formats, moments

BOTH = pytest.mark.parametrize("form", [formats.FIRST, formats.SECOND], ids=lambda form: form.name)
CODES = np.arange(2**16, dtype=np.uint16)


def value(code: int, form) -> float:
    """The number a code stands for, by the definition in `formats.py`, in Python's arithmetic."""
    bits = f"{code:016b}"
    sign = -1.0 if form.signed and bits[0] == "1" else 1.0
    exponent, digits = int(bits[-form.significand - 6 : -form.significand], 2), int(bits[-form.significand :], 2)
    if exponent == 63:
        return sign * (float("nan") if digits else float("inf"))
    fraction = digits / 2**form.significand
    return sign * (fraction * 2.0**-58 if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 59))


def finite_values(form) -> np.ndarray:
    """All finite numbers from 0 up, as float64; number i has code i."""
    return np.asarray(formats.decode(jnp.asarray(CODES[: form.infinity]), form), np.float64)


@BOTH
def test_every_code_is_the_number_that_it_should_be(form):
    sign, exponent, significand = map(int, form.name.split("-"))
    assert (form.signed, formats.EXPONENT_BITS, form.significand) == (bool(sign), exponent, significand)
    decoded = np.asarray(formats.decode(jnp.asarray(CODES), form))
    np.testing.assert_array_equal(decoded, [value(int(code), form) for code in CODES])
    assert form.infinity == (63 << form.significand) and np.isposinf(decoded[form.infinity])
    assert decoded[1] == form.smallest and decoded[2**form.significand] == 2.0**-58
    assert 15.98 < decoded[form.infinity - 1] < 16  # "slightly below 16"
    positive = decoded[: form.infinity + 1]
    assert (np.diff(positive) > 0).all()  # monotone
    if form.signed:
        half = 2**15
        np.testing.assert_array_equal(decoded[half : half + form.infinity + 1], -positive)
        assert np.signbit(decoded[half])


@BOTH
def test_every_code_comes_back_whatever_the_rounding(form):
    for key in (None, jax.random.key(0), jax.random.key(1)):
        back = np.asarray(formats.encode(formats.decode(jnp.asarray(CODES), form), form, key))
        is_nan = np.isnan(formats.decode(jnp.asarray(CODES), form))
        np.testing.assert_array_equal(back[~is_nan], CODES[~is_nan])
        assert np.isnan(formats.decode(jnp.asarray(back[is_nan]), form)).all() and is_nan.sum() > 500


@BOTH
def test_rounding_to_the_nearest_between_all_neighbors(form):
    low, codes = finite_values(form), np.arange(form.infinity)
    middle = ((low[:-1] + low[1:]) / 2).astype(np.float32)  # exact: float32 has 13 bits more
    lower, upper = codes[:-1], codes[1:]

    def encode(x):
        return np.asarray(formats.encode(jnp.asarray(x), form))

    np.testing.assert_array_equal(encode(middle), np.where(lower % 2 == 0, lower, upper))  # ties to even
    np.testing.assert_array_equal(encode(np.nextafter(middle, np.float32(0))), lower)
    np.testing.assert_array_equal(encode(np.nextafter(middle, np.float32(99))), upper)
    if form.signed:
        np.testing.assert_array_equal(encode(-np.nextafter(middle, np.float32(99))), upper + 2**15)


@BOTH
def test_rounding_at_random_has_the_right_mean_everywhere(form):
    """Three tenths of the way up between all neighbors: as often up, whatever the exponent, and never further."""
    low = finite_values(form)
    x = jnp.asarray((low[:-1] + 0.3 * np.diff(low)).astype(np.float32))
    draws = [np.asarray(formats.encode(x, form, jax.random.key(seed))) - np.arange(len(x)) for seed in range(4)]
    assert set(np.unique(draws)) == {0, 1}
    by_exponent = np.mean(draws, axis=0)[: 62 << form.significand].reshape(62, -1).mean(1)  # 2,048 draws or more
    np.testing.assert_allclose(by_exponent, 0.3, atol=5 * (0.21 / (4 * 2**form.significand)) ** 0.5)
    tiny = jnp.full(100_000, form.smallest / 64)  # far below the smallest: now and then the smallest, else 0
    drawn = np.asarray(formats.encode(tiny, form, jax.random.key(9)))
    assert set(np.unique(drawn)) == {0, 1} and drawn.mean() == pytest.approx(1 / 64, rel=0.15)
    assert not np.asarray(formats.encode(tiny, form)).any()


@BOTH
def test_what_lies_outside(form):
    largest = finite_values(form)[-1]
    x = jnp.array([1e9, largest * 1.0001, jnp.inf, 1e-45, 0.0, -1e9, -jnp.inf, -0.0, jnp.nan, -1.0])
    for key in (None, jax.random.key(3)):
        got = formats.decode(formats.encode(x, form, key), form)
        minus = -1.0 if form.signed else 0.0
        wanted = [largest, largest, np.inf, 0, 0, minus * largest, minus * np.inf, 0, np.nan, minus]
        np.testing.assert_array_equal(got, [w if not np.isnan(w) or i == 8 else 0 for i, w in enumerate(wanted)])


def test_the_second_moment_is_clipped_before_it_is_used():
    gradients = {"w": jnp.array([0.01, -1.0, 100.0])}
    plain, clipped = optax.scale_by_adam(b2=0.96, eps=1e-8), moments.scale_by_clipped_adam(b1=0.9, b2=0.96, eps=1e-8)
    states = [opt.init(gradients) for opt in (plain, clipped)]
    for count in range(1, 4):
        (wanted, states[0]), (got, states[1]) = (
            opt.update(gradients, state) for opt, state in zip((plain, clipped), states, strict=True)
        )
        np.testing.assert_allclose(got["w"][:2], wanted["w"][:2], rtol=1e-5)  # 0.01 and 1 stay below
        large = 100.0 / np.sqrt(5.0 / (1 - 0.96**count))  # 100 does not
        np.testing.assert_allclose([got["w"][2], states[1].nu["w"][2]], [large, 5.0], rtol=1e-5)
