"""Shared parts of tests: places, small models and runs, stand-ins for servers and buckets, programs to start."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
