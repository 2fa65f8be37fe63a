"""Eight emulated CPU devices for every test, and quick instead of fast programs; set before anything imports JAX."""

import os
import signal

import pytest

from tests.support import QUICK

FLAGS = ("--xla_force_host_platform_device_count=8", QUICK)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")  # broadcasting is written out, in commands of tests too
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

# Whole files go to the processes of pytest in this order, then by name: for a long one at the end, all would wait.
# `--dist worksteal` needs no order, but builds the fixtures of a module in every process, models and programs included.
LONGEST_FIRST = (
    "demo many_processes memory train distributed powersgd meshes transformer sampling precision encode protocols "
    "attention_kernels survival signals clip pipeline_api commands"
).split()


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def interruptible():
    """Where this runs in the background of a shell, SIGINT is ignored, and bash then cannot be told to heed it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """An exported tiny model with random parameters; copy it to change it."""
    from tests.support import tiny_model  # imports JAX, which must not come before the flags

    return tiny_model.write(tmp_path_factory.mktemp("model"))
