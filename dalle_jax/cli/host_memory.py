"""How this process's C library hands out memory, where the processor itself computes.

XLA's CPU backend allocates a program's scratch space anew for every run of it and frees it afterwards. glibc gives
blocks beyond 64 MB, asked for by any thread but the first, straight back to the kernel, which then has to clear and map
every page of them again: 20,000 page faults and 50 ms of two cores in an update of the demo's transformer, of 240.
"""

import ctypes
import importlib.util
import os
import platform

FEW_CORES = 8  # with more, threads that share one pool would wait for one another
# Each by its number in malloc.h, its name in the environment, and its value: one pool for all threads, of blocks up to
# 1 GB, that keeps what is freed.
_SETTINGS = (
    (-8, "MALLOC_ARENA_MAX", 1),
    (-3, "MALLOC_MMAP_THRESHOLD_", 1 << 30),
    (-1, "MALLOC_TRIM_THRESHOLD_", (1 << 31) - 1),
)
SET_BY_USER = (*(name for _, name, _ in _SETTINGS), "GLIBC_TUNABLES")


def as_environment() -> dict[str, str]:
    """The same settings for a process that is yet to be started."""
    return {name: str(value) for _, name, value in _SETTINGS}


def keep_freed() -> bool:
    """Has freed memory kept for the next allocation instead of returned to the kernel, where that pays.

    That is on glibc, with few cores and no accelerator, unless the environment says something about malloc itself. To
    be called before JAX starts its threads; the process then stays as large as it ever was.
    Returns whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or (os.cpu_count() or 1) > FEW_CORES or _has_accelerator_plugin():
        return False
    if any(name in os.environ for name in SET_BY_USER):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(parameter, value) == 1 for parameter, _, value in _SETTINGS]
    return all(done)


def _has_accelerator_plugin() -> bool:
    """Whether JAX could find anything but CPUs: plugins are packages in `jax_plugins`, that for TPUs is `libtpu`."""
    return any(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "libtpu"))
