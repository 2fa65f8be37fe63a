"""Checkpoints on gs://, written and read by Orbax, TensorStore and gcsfs as on the cloud; the server is in memory."""

import importlib.util

import fsspec.config
import jax
import pytest

from dalle_jax.checkpoint import digest, manager, reader
from dalle_jax.mesh import make_mesh
from tests.support import stand_in_bucket
from tests.support.checkpoints import abstract, state
from tests.support.trees import identical

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs, of the extra test")


@pytest.fixture(scope="module")
def bucket():
    """One for all tests, as TensorStore and gcsfs ask for the address once."""
    with stand_in_bucket.serve() as (bucket, url), pytest.MonkeyPatch.context() as patch:
        for name, value in stand_in_bucket.environment(url).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})  # read from the environment when it is imported
        yield bucket


@pytest.fixture
def name(request):
    """Of the run in the bucket, each test's own."""
    return request.node.name


@pytest.fixture
def open_run(tmp_path, bucket, name):
    """A function that opens the run's checkpoints once more, as the next start does."""
    said, opened = [], []

    def function():
        opened.append(manager.Checkpoints(tmp_path, folder=f"gs://bucket/{name}", keep=2, warn=said.append))
        return opened[-1], said

    yield function
    for one in opened:
        one.close()


def saved(run, *steps):
    for step in steps:
        run.save(step, state(step), {"position": [step]})
    assert run.latest() == steps[-1]


def test_a_run_goes_on_from_its_bucket_on_another_mesh(open_run, bucket, name):
    run, said = open_run()
    saved(run, 1, 5, 9)
    path = reader.checkpoint_folder("elsewhere", f"gs://bucket/{name}")
    assert reader.steps_in(path) == [5, 9]
    assert not any(file.startswith(f"{name}/1/") for file in bucket.objects)  # no longer kept
    run, said = open_run()
    step, restored, position = run.restore_latest(abstract(make_mesh({"fsdp": -1})))
    assert (step, position, said) == (9, {"position": [9]}, [])
    identical(restored, state(9))
    assert restored["params"]["block"]["w"].addressable_shards[0].data.shape == (1, 2)
    assert reader.state_digests(path / "9")["params"] == digest.of_tree(jax.device_get(state(9)["params"]))


def test_damage_in_a_bucket_is_found_and_set_aside(open_run, bucket, name):
    run, said = open_run()
    saved(run, 5, 9)
    arrays = [file for file in bucket.objects if file.startswith(f"{name}/9/state/")]
    largest = max(arrays, key=lambda file: len(bucket.objects[file][0]))
    content = bytearray(bucket.objects[largest][0])
    content[len(content) // 2] ^= 0x10
    bucket.put(largest, bytes(content))
    step, restored, _ = run.restore_latest(abstract())
    assert step == 5
    identical(restored, state(5))
    (line,) = said
    assert "damaged-9-1" in line
    assert any(file.startswith(f"{name}/damaged-9-1/state/") for file in bucket.objects)


def test_an_unfinished_checkpoint_in_a_bucket_is_never_read(open_run, bucket, name):
    """There it lies under its final name from the start, and only its last file tells."""
    run, _ = open_run()
    saved(run, 5, 9)
    del bucket.objects[f"{name}/9/commit_success.txt"]
    metadata = f"{name}/9/_CHECKPOINT_METADATA"
    bucket.put(metadata, bucket.objects[metadata][0].replace(b'"commit_timestamp_nsecs": ', b'"x": '))
    run, _ = open_run()
    step, restored, _ = run.restore_latest(abstract())
    assert step == 5
    identical(restored, state(5))
    saved(run, 9)


def test_a_bucket_that_refuses_costs_a_checkpoint_and_no_more(open_run, bucket, name):
    run, said = open_run()
    saved(run, 5)
    bucket.refuses = True
    run.save(9, state(9), {})
    run.save(12, state(12), {})  # waits for the one before
    bucket.refuses = False
    run.save(13, state(13), {"position": [13]})
    assert run.latest() == 13
    assert len(said) == 2 and "step 9 " in said[0] and "step 12 " in said[1]
    step, restored, _ = run.restore_latest(abstract())
    assert step == 13
    identical(restored, state(13))
