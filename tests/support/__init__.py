"""Shared parts of tests: places, small models and runs, stand-ins for servers and buckets, programs to start."""

import pathlib
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
# XLA's flags for quick instead of fast programs: tests compile for longer than they compute.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def until(condition, seconds: float = 10.0):
    """Waits until it is true; fails if it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
