"""Any number for any key of a training config: the settings hold it, within bounds, or one sentence refuses it."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dalle_jax import config
from dalle_jax.errors import UserError
from dalle_jax.train.settings import load_settings

SPECS = {
    spec: load_settings(f"configs/{spec}")
    for spec in ("dvae.py:demo", "vq.py:demo", "transformer.py:12b", "clip.py:demo")
}
TEXTS = ("train", "validation", "tokenizer", "image_tokenizer", "checkpoint_dir", "weights", "clip")
KEYS = [
    (spec, key)
    for spec, made in SPECS.items()
    for key, value in config.flatten(dataclasses.asdict(made)).items()
    if not isinstance(value, bool | str | list) and key.rpartition(".")[2] not in TEXTS
]
EDGES = [sign * value for value in (2**31, 2**32, 2**53, 2**63, 10**14, 10**400, 1e-320, 1e300) for sign in (1, -1)]
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.floats(-2, 2),
    st.sampled_from([*EDGES, math.nan, math.inf, -math.inf]),
    st.builds(lambda power, more: 2**power + more, st.integers(0, 70), st.integers(-1, 1)),
)
MOST = 2**40  # no number of a training is larger


def given_or_refused(make, key, value):
    try:
        made = make()
    except UserError as error:
        assert str(error).count("\n") == 0 and ": " in str(error)
        return
    kept = config.flatten(dataclasses.asdict(made))[key]
    assert kept is None or kept == value and abs(kept) <= MOST


def check_value(key, value):
    spec, name = key
    given_or_refused(lambda: SPECS[spec].changed({name: value}), name, value)


def check_word(key, value):
    """As it comes from the command line: a float with a whole value is one for a key of whole numbers, too."""
    spec, name = key
    given_or_refused(lambda: load_settings(f"configs/{spec}", [f"--config.{name}={value}"]), name, value)


def fuzz(check, examples):
    keys = st.sampled_from(KEYS)
    settings(max_examples=examples, derandomize=True, deadline=None, database=None)(given(keys, NUMBERS)(check))()


def test_any_number_of_a_config():
    fuzz(check_value, 200)
    fuzz(check_word, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_number_of_a_config_at_length():
    fuzz(check_value, 27_000)
    fuzz(check_word, 3_000)
