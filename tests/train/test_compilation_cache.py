"""Programs kept in a workdir are read back by the next start, wherever it lies, and compute the same bits."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from dalle_jax.train import compilation_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch):
    monkeypatch.setattr(compilation_cache, "MIN_SECONDS", 0.0)


@contextlib.contextmanager
def read_back():
    """Counts the programs that are read back in this block."""
    found = []

    def note(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(note)


def of_a_new_process():
    """The result of a program that this process has not compiled yet, as far as JAX knows."""
    jax.clear_caches()
    x = jnp.linspace(-1.0, 1.0, 1000)
    return np.asarray(jax.jit(lambda x: jnp.tanh(x @ jnp.outer(x, x)).sum() + jnp.sin(x))(x))


def entries(workdir):
    return list((workdir / compilation_cache.FOLDER).rglob("*-cache"))


def test_programs_are_kept_and_read_back_also_where_the_workdir_was_moved(tmp_path):
    """Each block has its own folder, as the stages of the demo, which train one after the other in one process."""
    before = [getattr(jax.config, name) for name in SETTINGS]
    with compilation_cache.kept(tmp_path / "run"), read_back() as found:
        compiled = of_a_new_process()
        assert not found
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    kept = entries(tmp_path / "run")
    assert kept
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with compilation_cache.kept(tmp_path / "moved"), read_back() as found:
        np.testing.assert_array_equal(of_a_new_process(), compiled)
        assert len(found) == len(kept) == len(entries(tmp_path / "moved"))
    with read_back() as found:
        of_a_new_process()
    assert not found and not entries(tmp_path / "run")
    with compilation_cache.kept(tmp_path / "other"):
        of_a_new_process()
    assert entries(tmp_path / "other")


@pytest.mark.parametrize("own", ["elsewhere", ""])
def test_the_users_own_choice_wins(tmp_path, own):
    jax.config.update("jax_compilation_cache_dir", own and str(tmp_path / own))  # as the environment variable does
    try:
        with compilation_cache.kept(tmp_path / "run"):
            assert jax.config.jax_compilation_cache_dir == (own and str(tmp_path / own))
            of_a_new_process()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax_cache.reset_cache()
    assert not (tmp_path / "run").exists()


def test_a_program_that_a_kill_cut_off_is_compiled(tmp_path):
    with compilation_cache.kept(tmp_path):
        compiled = of_a_new_process()
    for path in entries(tmp_path):
        path.write_bytes(path.read_bytes()[:-40])
    with compilation_cache.kept(tmp_path), pytest.warns(UserWarning, match="Error reading persistent compilation"):
        np.testing.assert_array_equal(of_a_new_process(), compiled)


def test_a_folder_that_cannot_be_made_stops_nobody(tmp_path):
    (tmp_path / compilation_cache.FOLDER).write_text("a file where the folder goes")
    with compilation_cache.kept(tmp_path), pytest.warns(UserWarning, match="persistent compilation cache"):
        assert np.isfinite(of_a_new_process()).all()


def test_processors_of_other_extensions_keep_their_own_programs(monkeypatch):
    read = compilation_cache.pathlib.Path.read_text
    names = set()
    for flags in ("sse2 avx2", "sse2 avx2 avx512f", "sse2 avx2"):
        text = f"model name: any\nflags : {flags}\n"
        monkeypatch.setattr(
            compilation_cache.pathlib.Path,
            "read_text",
            lambda self, *rest, text=text: text if str(self) == "/proc/cpuinfo" else read(self, *rest),
        )
        names.add(compilation_cache._processor())
    assert len(names) == 2
