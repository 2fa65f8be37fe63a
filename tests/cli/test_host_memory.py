"""Freed memory is kept where the processor computes, and left alone where the user says something about it."""

import os
import platform
import subprocess
import sys

import pytest

from dalle_jax.cli import host_memory

# A thread takes 100 MB, writes all of it and gives it back, five times over; the program prints its page faults.
PROGRAM = """
import ctypes, resource, sys, threading
from dalle_jax.cli import host_memory
host_memory.MAX_CORES = 10**6
host_memory.importlib.util.find_spec = lambda name: None
print(host_memory.keep_freed())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def work():
    for _ in range(5):
        block = libc.malloc(100 << 20)
        libc.memset(block, 1, 100 << 20)
        libc.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator that is set is glibc's")
def test_freed_memory_is_used_again():
    free = {name: value for name, value in os.environ.items() if name not in (*host_memory.SETTINGS, "GLIBC_TUNABLES")}
    done, megabytes = _run(free)
    assert done == "True" and int(megabytes) < 150  # the 100 of the first time
    done, megabytes = _run(free | {"MALLOC_ARENA_MAX": "4"})
    assert done == "False" and int(megabytes) >= 500  # the user's choice, and glibc's habit


def _run(environment):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def test_many_cores_and_accelerators_are_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    monkeypatch.setattr(host_memory.os, "cpu_count", lambda: 64)
    assert not host_memory.keep_freed()
    monkeypatch.setattr(host_memory.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    assert not host_memory.keep_freed()
