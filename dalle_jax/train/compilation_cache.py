"""Compiled programs kept beside a run, so that its next start reads them back instead of compiling again.

This is JAX's persistent cache, in WORKDIR/compilation_cache. Lying there, it ends with the run, nobody loads programs
that another user left, and a restart on another machine finds it.
"""

import contextlib
import hashlib
import pathlib
import platform
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compilation_cache"  # inside the workdir
MIN_SECONDS = 0.2  # of compiling, for a program to be kept; JAX's 1.0 leaves out a second of a restart


@contextlib.contextmanager
def kept(workdir: pathlib.Path) -> Iterator[None]:
    """Programs compiled in this block are kept in the workdir, or read back from there.

    Nothing is done where the user has chosen a folder, or none (`JAX_COMPILATION_CACHE_DIR`, empty for none;
    `JAX_ENABLE_COMPILATION_CACHE=false`). With several processes the first one writes and all read. A program that
    cannot be read or written is a warning by JAX and compiled.
    """
    folder, platform_ = workdir / FOLDER, jax.default_backend()
    if platform_ == "cpu":
        folder /= _processor()
    settings = {
        "jax_compilation_cache_dir": str(folder.absolute()),
        "jax_persistent_cache_min_compile_time_secs": MIN_SECONDS,
    }
    if platform_ != "gpu":  # of use to GPUs alone, and makes the folder's path a part of what a program is found by
        settings["jax_persistent_cache_enable_xla_caches"] = ""
    before = {name: getattr(jax.config, name) for name in settings}
    if before["jax_compilation_cache_dir"] is not None:  # the user's choice
        yield
        return
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # opens the folder of its first use for good


def _processor() -> str:
    """A name for processors that run the same machine code, by type and extensions; JAX does not distinguish them."""
    what = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        what += [next((line for line in lines if line.startswith(("flags", "Features"))), "")]
    return f"{platform.machine()}-{hashlib.sha256(' '.join(what).encode()).hexdigest()[:12]}"
