"""A run of a real model, tiny: what it leaves behind, what it refuses, and that a stopped one goes on bit for bit."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dalle_jax import files, model_dir
from dalle_jax.checkpoint import reader
from dalle_jax.errors import UserError
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.text.malevich import MalevichTokenizer
from dalle_jax.train import objectives, run
from tests.support import GOLDEN
from tests.support.demo_settings import demo_settings
from tests.support.line_task import digest_of, logged
from tests.support.trees import identical

pytestmark = pytest.mark.usefixtures("compile_once")
DVAE = {
    "run.steps": 6, "batch_size": 8, "run.log_every": 2, "run.validate_every": 3, "run.validation_batches": 1,
    "run.picture_every": 3,
    "run.checkpoint_every": 2, "run.mesh.fsdp": 1, "run.mesh.replica": None, "model.image_size": 16, "model.vocab": 8,
    "model.width": 8, "model.stem": 4, "model.patch": 4, "data.image_size": 16, "data.augment": "dvae",
    "run.data.threads": 2,
}  # fmt: skip
TRANSFORMER = {
    "run.steps": 2, "batch_size": 8, "run.validate_every": None, "run.picture_every": None, "model.num_layers": 2,
    "model.width": 16,
    "model.heads": 2, "model.head_size": 8, "model.text_len": 8, "model.grid": 4, "model.image_vocab": 8,
    "model.text_vocab": 290, "data.image_size": 16, "run.data.threads": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty pictures with captions, two of them broken."""
    path, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(path / f"{index:02d}.png")
        (path / f"{index:02d}.txt").write_text(f"picture number {index} of many")
    (path / "20.png").write_bytes(b"no picture")
    (path / "20.txt").write_text("broken")
    return path


@pytest.fixture(scope="module")
def dvae_values(folder):
    return DVAE | {"run.data.train": f"folder:{folder}", "run.data.validation": f"folder:{folder}"}


@pytest.fixture(scope="module")
def straight(dvae_values, tmp_path_factory):
    """A run of six updates that nothing stopped, on eight devices."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run.train(demo_settings("dvae", dvae_values), workdir, progress=False)


@pytest.mark.slow
def test_jaxs_flags_do_not_change_the_numbers_of_a_seed(straight, dvae_values, tmp_path):
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        found = run.train(demo_settings("dvae", dvae_values), tmp_path, progress=False)
    identical(found.state, straight[1].state)


def test_a_run_leaves_everything_behind(straight, folder):
    workdir, result = straight
    assert (result.step, result.signal, int(result.state["step"])) == (6, 0, 6)
    assert {"train/loss", "train/images_per_second", "train/learning_rate", "validation/loss"} <= set(result.metrics)
    parts = {"reconstruction_nats_per_value", "kl_nats_per_token", "elbo_nats_per_value", "beta", "temperature"}
    parts |= {"relaxed_error", "hard_error", "codes_used", "codes_used_share", "code_perplexity"}
    assert {f"{kind}/{name}" for kind in ("train", "validation") for name in parts} <= set(result.metrics)
    assert list(logged(workdir, "train/loss")) == [2, 4, 6] and list(logged(workdir, "validation/loss")) == [3, 6]
    assert reader.complete_steps(workdir) == [4, 6]
    assert list(workdir.glob("events.out.tfevents.*"))
    for picture in ("curves.png", "pictures/0000003.png", "pictures/0000006.png"):
        assert np.asarray(Image.open(workdir / picture).convert("L")).std() > 0, picture
    identical(model_dir.load(workdir, name="dvae").params, result.state["ema"])
    assert not list(folder.glob("*.tfevents*"))


class Killed(BaseException):
    """Stands for a machine that goes away: nothing is saved on the way out."""


def kill_at(n):
    def hook(step, state):
        if step == n:
            raise Killed

    return (1, hook)


def test_stopped_anywhere_it_goes_on_bit_for_bit(straight, dvae_values, tmp_path):
    with pytest.raises(Killed):
        run.train(demo_settings("dvae", dvae_values), tmp_path, progress=False, hooks=[kill_at(3)])
    assert reader.complete_steps(tmp_path) == [2]

    def interrupt(step, state):
        if step == 4:  # the next one is under way when the signal is seen
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run.train(demo_settings("dvae", dvae_values), tmp_path, progress=False, hooks=[(1, interrupt)])
    assert (stopped.signal, stopped.step) == (signal.SIGTERM, 5)
    assert reader.complete_steps(tmp_path)[-1] == 5
    done = run.train(demo_settings("dvae", dvae_values), tmp_path, progress=False)
    identical(done.state, straight[1].state)
    assert digest_of(tmp_path) == digest_of(straight[0])
    assert data_position(tmp_path) == data_position(straight[0])
    losses = [logged(workdir, "validation/loss") for workdir in (tmp_path, straight[0])]
    assert losses[0] == losses[1]  # the line of update 3 was written by the killed run, and once


def data_position(workdir):
    return reader.data_position(reader.checkpoint_path(workdir)[1])


def test_a_finished_run_is_left_as_it_is_and_more_steps_go_on_where_the_data_moved(
    straight, dvae_values, folder, tmp_path
):
    workdir, result = straight
    again = run.train(demo_settings("dvae", dvae_values), workdir, progress=False)
    identical(again.state, result.state)
    assert again.step == 6
    here, moved = shutil.copytree(workdir, tmp_path / "run"), shutil.copytree(folder, tmp_path / "moved")
    settings = demo_settings("dvae", dvae_values | {"run.data.train": f"folder:{moved}", "run.data.validation": None})
    assert run.train(settings.changed({"run.steps": 7}), here, progress=False).step == 7
    for kind in ("png", "txt"):
        (moved / f"00.{kind}").rename(moved / f"99.{kind}")
    with pytest.raises(UserError, match="got record .*01.* in the place of .*00"):
        run.train(settings.changed({"run.steps": 8}), here, progress=False)


def test_a_workdir_has_one_training(straight, dvae_values, tmp_path):
    """The second one neither tidies up what the first is writing nor takes a line out of its log."""
    workdir = shutil.copytree(straight[0], tmp_path / "run")
    writing = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    writing.mkdir()
    content = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with files.locked(workdir / run.LOCK), pytest.raises(UserError, match="without another training at work in it"):
        run.train(demo_settings("dvae", dvae_values), workdir, progress=False)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == content


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    captions = [f"picture number {index} of many" for index in range(20)]
    return BPETokenizer.train(captions, vocab_size=290).save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def transformer_values(straight, folder, tokenizer):
    return TRANSFORMER | {
        "run.data.train": f"folder:{folder}",
        "frozen.image_tokenizer": straight[0],
        "tokenizer": tokenizer,
    }


def test_a_transformers_workdir_needs_nothing_from_outside(transformer_values, tokenizer, tmp_path):
    settings = demo_settings("transformer", transformer_values, checkpoint_every=1)
    with pytest.raises(Killed):
        run.train(settings, tmp_path, progress=False, hooks=[kill_at(2)])
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["model"]["text_vocab"] == 290
    hidden = tokenizer.rename(tokenizer.with_name("elsewhere"))
    try:
        result = run.train(settings, tmp_path, progress=False)
    finally:
        hidden.rename(tokenizer)
    assert result.step == 2 and np.isfinite(float(jnp.sum(result.state["params"]["image_head"])))
    kept, given = model_dir.load_frozen(tmp_path, "image_tokenizer"), model_dir.load(settings.frozen["image_tokenizer"])
    identical(kept.params, given.params)
    assert kept.config == {key: given.config[key] for key in ("name", "model")}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("frozen.image_tokenizer", None, "needs a trained image tokenizer: .* --config.frozen.image_tokenizer=DIR"),
        ("frozen.image_tokenizer", "/nowhere", "check the path"),
        ("tokenizer", None, "needs a tokenizer"),
        ("model.text_vocab", 291, "tokenizer of 291 entries .* got 290"),
        ("model.grid", 2, "config.model.grid = 4 as the image tokenizer in .* has it"),
        ("model.image_vocab", 9, "config.model.image_vocab = 8 as"),
        ("data.image_size", 8, "config.data.image_size = 16 as"),
        ("run.data.train", None, "name its source"),
        ("run.data.train", "folder:/nowhere", "nowhere"),
        ("model.heads", 0, "heads must be at least 1"),
        ("batch_size", 9, "multiple of 8"),
        ("run.mesh.fsdp", 3, "does not fit 8 device"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(
    transformer_values, tmp_path, key, value, message
):
    with pytest.raises(UserError, match=message):
        run.train(demo_settings("transformer", transformer_values | {key: value}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_published_models_tokenizer_is_that_of_the_model(transformer_values, tmp_path):
    content = json.loads((GOLDEN / "text_tokenizers.json").read_text(encoding="utf-8"))["malevich"]
    tokenizer = MalevichTokenizer({"model": content})
    tokenizer.save(tmp_path / "published")
    sizes = {"model.text_vocab": tokenizer.vocab_size, "tokenizer": str(tmp_path / "published")}
    settings = demo_settings("transformer", transformer_values | sizes)
    malevich = settings.changed({"model.family": "malevich"})
    assert run._load_tokenizer(malevich, tmp_path / "new").digest == tokenizer.digest
    assert run._load_tokenizer(malevich.changed({"tokenizer": None}), tmp_path / "published").digest == tokenizer.digest
    with pytest.raises(UserError, match=r"expected a tokenizer with the marks None .*, got \(2, 3\) and None"):
        run._load_tokenizer(settings, tmp_path / "new")
    with pytest.raises(UserError, match=rf"expected a tokenizer of 190 entries .*, got {tokenizer.vocab_size}"):
        run._load_tokenizer(malevich.changed({"model.text_vocab": 190}), tmp_path / "new")


def test_a_workdir_that_cannot_be_written_is_refused(dvae_values, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a workdir to write to"):
        run.train(demo_settings("dvae", dvae_values), tmp_path / "file" / "run", progress=False)


def test_image_tokens_need_no_image_tokenizer_and_every_other_frozen_model(dvae_values):
    of_images = demo_settings("dvae", dvae_values)
    of_tokens = of_images.changed({"run.data.train": "tokens:somewhere", "run.data.validation": None})
    task = objectives.build_task(of_images, {})
    task = dataclasses.replace(task, frozen={"image_tokenizer": {"a": 1}, "teacher": {"b": 2}})
    assert run.frozen_in_use(of_images, task) == task.frozen
    assert run.frozen_in_use(of_tokens, task) == {"teacher": {"b": 2}}


def test_a_model_of_another_name_is_no_task(dvae_values):
    settings = dataclasses.replace(demo_settings("dvae", dvae_values), name="gan")
    with pytest.raises(UserError, match="one of dvae, vq, transformer, clip, got 'gan'"):
        objectives.frozen_roles(settings)


def test_warnings_and_lines_reach_the_terminal(dvae_values, tmp_path, capfd):
    run.train(
        demo_settings("dvae", dvae_values | {"run.validate_every": None, "run.picture_every": None}, steps=2), tmp_path
    )
    text = capfd.readouterr().err
    assert "dvae step 2/2: loss" in text and "images/s" in text
    assert f"2 of 2 updates in {tmp_path}" in text
