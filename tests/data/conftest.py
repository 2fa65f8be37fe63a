"""A cache folder for each test, small shards, and a tokenizer of the captions of `numbers_source`."""

import pytest

from dalle_jax.text.bpe import BPETokenizer
from tests.support.broken_shards import TINY, pack, sample
from tests.support.numbers_source import caption


@pytest.fixture(autouse=True)
def _cache_of_the_test(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return BPETokenizer.train([caption(i) for i in range(200)], vocab_size=320)


@pytest.fixture
def shards(tmp_path):
    """Five shards of three samples."""
    for shard in range(5):
        samples = [m for i in range(3) for m in sample(f"{shard}{i}", jpg=TINY, txt=b"caption %d" % i)]
        (tmp_path / f"{shard:05d}.tar").write_bytes(pack(samples))
    return tmp_path
