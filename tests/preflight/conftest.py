"""The compiled job that tests of preflight share."""

import pytest

from dalle_jax.preflight import search
from tests.support.pods import emulated


@pytest.fixture(scope="session")
def result():
    """The demo transformer, compiled for the eight emulated devices."""
    return search.examine(emulated())
