"""Fixtures of the tests of training."""

import jax
import pytest


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Runs of one module compile the same programs over and over; a run that resumes may read them from disk."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
