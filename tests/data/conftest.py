"""A cache folder for each test, and a tokenizer of the captions of `numbers_source`."""

import pytest

from dalle_jax.text.bpe import BPETokenizer
from tests.support.numbers_source import caption


@pytest.fixture(autouse=True)
def _cache_of_the_test(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return BPETokenizer.train([caption(i) for i in range(200)], vocab_size=320)
