"""Real processes train as one does, stop together, and fewer of them go on at the same records."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax import model_dir
from dalle_jax.checkpoint import reader
from dalle_jax.data.shards import ShardedBatches
from dalle_jax.errors import EXIT_RESTART
from dalle_jax.train import run
from tests.support import processes, train_driver, update_driver
from tests.support.demo_settings import demo_settings
from tests.support.line_task import logged

RECORDS, BATCH, STEPS = 24, 8, 9
# The paper's step size: a large one lets Adam blow rounding of near-zero gradients up to its own size.
VALUES = {
    "run.steps": STEPS, "batch_size": BATCH, "run.log_every": 1, "run.validate_every": 3, "run.picture_every": 3,
    "run.checkpoint_every": 4, "run.keep_checkpoints": 9, "run.mesh.fsdp": 1, "run.mesh.replica": None,
    "optimizer.learning_rate": 2e-5, "optimizer.schedule.warmup_steps": STEPS,
    "optimizer.schedule.end_learning_rate": 0.0, "data.image_size": train_driver.SIDE, "run.data.threads": 1,
    "model.image_size": train_driver.SIDE,
}  # fmt: skip


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Pictures whose first pixel is their number; ten to validate with, one of them broken."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", RECORDS), ("validation", 10)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
            pixels[0, 0] = number
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    (folder / "validation" / "03.png").write_bytes(b"no picture")
    return VALUES | {
        name: f"folder:{folder / name.rpartition('.')[2]}" for name in ("run.data.train", "run.data.validation")
    }


def words(values, **more):
    return [f"--config.{key}={value}" for key, value in (values | more).items()]


def here(values, workdir, **more):
    """The same run in this process, on its eight devices; returns the result and the records of each batch."""
    seen, take, build = [], ShardedBatches.__next__, run.build_task
    train_driver.note_records(seen)
    run.build_task = train_driver.toy_task
    try:
        return run.train(demo_settings("dvae", values | more), workdir, progress=False), seen
    finally:
        ShardedBatches.__next__, run.build_task = take, build


@pytest.fixture(scope="module")
def alone(values, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, *here(values, workdir, **{"run.data.shards": 4})


@pytest.fixture(scope="module")
def four(values, tmp_path_factory):
    """Four processes, one of which gets SIGTERM in its fourth update."""
    folder = tmp_path_factory.mktemp("four")
    ended = processes.statuses(processes.start("train_driver", folder, 4, folder / "run", 2, *words(values)))
    logs = [(folder / f"{rank}.log").read_text() for rank in range(4)]
    assert ended == [EXIT_RESTART] * 4, "\n".join(logs)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)], logs


def together(found):
    """The records of each global batch, sorted."""
    return [sorted(sum(parts, [])) for parts in zip(*(process["records"] for process in found), strict=True)]


def test_a_signal_to_one_process_stops_all_after_the_same_update(four):
    folder, found, _ = four
    assert {process["step"] for process in found} == {6} and reader.complete_steps(folder / "run") == [4, 6]


def test_parameters_are_the_same_on_every_process(four):
    assert len({process["digest"] for process in four[1]}) == 1


def test_each_process_reads_its_own_records_and_all_read_each_once_an_epoch(four):
    _, found, _ = four
    for process in found:
        assert all(len(records) == BATCH // 4 for records in process["records"])
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(sum((sum(process["records"][epoch], []) for process in found), [])) == list(range(RECORDS))


def test_files_are_written_once_and_people_are_told_once(four):
    folder, _, logs = four
    assert list(logged(folder / "run", "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert list(logged(folder / "run", "validation/loss")) == [3, 6]
    assert len(list((folder / "run").glob("events.out.tfevents.*"))) == 1
    assert {path.name for path in (folder / "run" / "pictures").iterdir()} >= {"0000003.png"}
    assert "step 6/9: loss" in logs[0] and not any("loss" in log for log in logs[1:])


def test_four_processes_train_as_one_does(four, alone):
    folder, found, _ = four
    workdir, _, seen = alone
    assert together(found) == [sorted(records) for records in seen[:6]]
    wanted = logged(workdir, "train/loss")
    for step, loss in logged(folder / "run", "train/loss").items():
        assert loss == pytest.approx(wanted[step], rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_another_number_of_processes_goes_on_at_the_same_records(count, four, alone, values, tmp_path):
    workdir, result, seen = alone
    shutil.copytree(four[0] / "run", tmp_path / "run")
    if count == 1:
        _, records = here(values, tmp_path / "run")
        records = [sorted(batch) for batch in records]
    else:
        sizes = {"run.mesh.fsdp": 2, "run.mesh.replica": 2, "run.validate_every": None, "run.picture_every": None}
        ended = processes.statuses(
            processes.start("train_driver", tmp_path, count, tmp_path / "run", "", *words(values, **sizes), devices=2)
        )
        assert ended == [0] * count, (tmp_path / "0.log").read_text()
        found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
        assert len({process["digest"] for process in found}) == 1
        records = together(found)
    assert records == [sorted(batch) for batch in seen[6:]]
    wanted = {step: pytest.approx(loss, rel=1e-5) for step, loss in logged(workdir, "train/loss").items()}
    assert logged(tmp_path / "run", "train/loss") == wanted
    average = model_dir.read_params(tmp_path / "run")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), average, jax.device_get(result.state["ema"]))


@pytest.mark.parametrize(("kind", "devices"), [pytest.param("clip", 1, marks=pytest.mark.slow), ("compressed", 4)])
def test_two_processes_train_as_one_does(kind, devices, tmp_path):
    """A CLIP: a loss of each process's half of the batch would have half of the captions to tell apart. Compressed
    gradients: with what was left out, where the replicas are processes instead of devices of one."""
    started = processes.start("update_driver", tmp_path, 2, kind, devices=devices)
    wanted, arrays = update_driver.train(kind)  # meanwhile
    assert processes.statuses(started) == [0, 0], (tmp_path / "0.log").read_text()
    assert wanted[0]["loss"] > 0.1 and wanted[0]["grad_norm"] > 0.1 and wanted[0]["loss"] != wanted[1]["loss"]
    assert kind == "clip" or np.abs(arrays["error"]["matrix"]).max() > 1e-3
    for rank in range(2):
        measured, found = processes.read(tmp_path, rank)
        assert measured == [{name: pytest.approx(value, rel=1e-5) for name, value in one.items()} for one in wanted]
        for ours, theirs in zip(found, jax.tree.leaves(arrays), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
