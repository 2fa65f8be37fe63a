"""What tests share: places, small models and runs, stand-ins for servers and buckets, programs that tests start."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
