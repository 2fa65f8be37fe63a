"""Fuzzing with Hypothesis: the same inputs in every run, so that a failure comes again; nothing is stored."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy


def few_and(many: int, *, few: int = 50):
    """A parameter `inputs`: few in the default suite, many in the slow one."""
    return pytest.mark.parametrize("inputs", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(check: Callable[..., None], *strategies: SearchStrategy, inputs: int) -> None:
    """Call `check` with so many inputs drawn from the strategies; the smallest that fails is shown."""
    fixed = settings(
        max_examples=inputs, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    fixed(given(*strategies)(check))()


def damaged(whole: bytes):
    """`whole` with some bytes changed, and cut somewhere or not at all."""
    edits = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=10)

    def damage(changed, cut):
        data = bytearray(whole)
        for place, byte in changed:
            data[place] = byte
        return bytes(data[:cut])

    return st.builds(damage, edits, st.none() | st.integers(0, len(whole)))
