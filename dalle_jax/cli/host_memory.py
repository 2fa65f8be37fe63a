"""Keeps freed memory in this process, which makes training on a CPU of few cores a fifth faster.

XLA's CPU backend allocates a program's scratch space at every run and frees it afterwards. glibc returns blocks beyond
64 MB, unless the first thread asked for them, to the kernel, which clears and maps every page again: 20,000 page faults
and 50 ms of two cores in an update of the demo's transformer, of 240.
"""

import ctypes
import importlib.util
import os
import platform

MAX_CORES = 8  # with more, threads that share one pool would wait for one another
# Name in the environment -> its number in malloc.h, and a value: one pool for all threads, of blocks up to 1 GB, that
# keeps what is freed.
SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 30),
    "MALLOC_TRIM_THRESHOLD_": (-1, (1 << 31) - 1),
}


def keep_freed() -> bool:
    """Keep freed memory for the next allocation, and return whether that is so.

    Done on glibc, on few cores and without an accelerator, unless the environment configures malloc. Call it before JAX
    starts its threads; the process then stays as large as it ever was.
    """
    accelerated = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))  # JAX finds more than CPUs
    configured = any(name in os.environ for name in (*SETTINGS, "GLIBC_TUNABLES"))
    many_cores = (os.cpu_count() or 1) > MAX_CORES
    if platform.libc_ver()[0] != "glibc" or many_cores or accelerated or configured:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(number, value) == 1 for number, value in SETTINGS.values()]
    return all(done)
