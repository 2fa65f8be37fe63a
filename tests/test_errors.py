"""`check_number`: what passes, what is refused, and in which words."""

import numpy as np
import pytest

from dalle_jax.errors import UserError, check_number

LIMITS = {
    "at least 1": dict(min=1),
    "1 to 5": dict(min=1, max=5),
    "above 0": dict(above=0),
    "a share": dict(min=0, below=1),
    "whole": dict(whole=True, min=0),
    "optional": dict(optional=True, min=1),
    "any": dict(),
}


@pytest.mark.parametrize(
    "limits, value",
    [
        ("at least 1", 1),
        ("1 to 5", 5),
        ("1 to 5", np.float32(1)),
        ("above 0", 1e-300),
        ("a share", 0.0),
        ("whole", np.int64(3)),
        ("whole", 10**400),
        ("optional", None),
        ("any", -7.5),
    ],
)
def test_numbers_in_range_pass(limits, value):
    assert check_number("x", value, **LIMITS[limits]) is None


@pytest.mark.parametrize(
    "limits, value",
    [
        ("at least 1", 0),
        ("1 to 5", 5.5),
        ("above 0", 0),
        ("a share", 1),
        ("whole", 3.0),
        ("optional", 0),
        *[(limits, value) for limits in LIMITS for value in (float("nan"), float("inf"), np.nan, True, "3", [1])],
        *[(limits, None) for limits in LIMITS if limits != "optional"],
    ],
)
def test_everything_else_is_refused(limits, value):
    with pytest.raises(UserError, match="^expected x to be a .*number.*, got "):
        check_number("x", value, **LIMITS[limits])


def test_the_sentence_names_the_option_the_range_and_what_came():
    def sentence(value, **limits):
        with pytest.raises(UserError) as refused:
            check_number("--count", value, **limits)
        return str(refused.value)

    assert sentence(0, min=1, max=4_000, whole=True) == (
        "expected --count to be a whole number of at least 1 and of at most 4,000, got 0: choose a value in this range"
    )
    assert sentence(-1.5, above=0, below=1, optional=True) == (
        "expected --count to be a number above 0 and below 1, or None, got -1.5: choose a value in this range"
    )
