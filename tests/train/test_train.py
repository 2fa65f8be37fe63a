"""The update on any mesh, the loop, and the promise that a stopped run goes on bit for bit."""

import dataclasses
import json
import os
import signal
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dalle_jax import config as configs
from dalle_jax import model_dir, sharding
from dalle_jax.checkpoint import manager, reader
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models.layers import Model, param
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.train import loop, objectives, run
from dalle_jax.train.ema import Ema
from dalle_jax.train.monitor import metrics
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer.build import OPTIMIZERS, Optimizer, build_optimizer
from dalle_jax.train.step import TrainStep

VOCAB, WIDTH, LENGTH, BATCH = 16, 8, 9, 16


class Toy(nnx.Module):
    """A next-token model with every kind of parameter the real ones have: tables, stacked matrices, gains, a head."""

    def __init__(self, rngs):
        self.table = param(rngs, (VOCAB, WIDTH), axes=("vocab", "embed"), std=0.3)
        self.gain = param(rngs, (2, WIDTH), axes=("layers", "embed"), fill=1.0)
        self.matrix = param(rngs, (2, WIDTH, WIDTH), axes=("layers", "embed", "mlp"), std=0.3)
        self.head = param(rngs, (WIDTH, VOCAB), axes=("embed", "vocab"), std=0.1)

    def __call__(self, text_BT):
        x = self.table[...][text_BT]
        for gain, matrix in zip(self.gain[...], self.matrix[...], strict=True):
            x = sharding.constrain(x + jnp.tanh((x * gain) @ matrix), ("batch", "sequence", "embed_activation"))
        return x @ self.head[...]


MODEL = Model(types.SimpleNamespace(), Toy)


def toy_loss(params, frozen, batch, *, key, step):
    del key, step
    logits = jax.nn.log_softmax(MODEL.apply(params, batch["text"][:, :-1]) * frozen["temperature"])
    loss = -jnp.take_along_axis(logits, batch["text"][:, 1:, None], axis=-1).mean()
    return loss, {"twice": 2 * loss}


TOY = Task("toy", MODEL, toy_loss, frozen={"temperature": np.float32(1.5)})


def toy_optimizer(name="adamw", **values):
    config = ml_collections.ConfigDict(configs.load("configs/transformer.py:12b").optimizer.to_dict())
    config.update({"name": name, "learning_rate": 0.05, "clip_norm": 0.5, **values})
    config.schedule.update(name="warmup_constant", warmup_steps=2)
    return build_optimizer(Optimizer(**config), steps=100, axes=MODEL.axes)


def toy_batch(index):
    return {"text": np.random.default_rng(index).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)}


def toy_run(mesh, *, updates=6, built=None, batch=toy_batch, **options):
    built = built or toy_optimizer()
    step = TrainStep(TOY, built, mesh, **{"ema": Ema(decay=0.9), **options})
    state = step.init(jax.random.key(0))
    measured = []
    for index in range(updates):
        state, values = step.update(state, TOY.frozen, sharding.shard_batch(batch(index), mesh), jax.random.key(1))
        measured.append(jax.device_get(values))
    return state, measured


def one_device():
    return make_mesh({}, devices=jax.devices()[:1])


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), jax.device_get(a), jax.device_get(b))


def identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def single():
    return toy_run(one_device())


# float32 sums in another order differ by about 1e-7 of their size; six updates may multiply that.
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (1, 4, 2), (2, 2, 2)])
def test_every_mesh_gives_the_single_device_curve(single, sizes):
    state, measured = toy_run(make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=True))))
    close([m["loss"] for m in measured], [m["loss"] for m in single[1]], rtol=1e-5)
    close([m["grad_norm"] for m in measured], [m["grad_norm"] for m in single[1]], rtol=1e-4)
    close(state["ema"], single[0]["ema"], rtol=1e-3, atol=1e-5)
    matrix = state["params"]["matrix"]
    assert matrix.addressable_shards[0].data.size == matrix.size // (sizes[1] * sizes[2])
    assert optimizer_copies(state, "matrix")[0].sharding == matrix.sharding


def optimizer_copies(state, name):
    found = jax.tree_util.tree_leaves_with_path(state["opt_state"])
    return [leaf for path, leaf in found if path and getattr(path[-1], "key", None) == name]


def test_training_learns_and_the_average_follows(single):
    state, measured = toy_run(one_device(), updates=40, batch=lambda _: toy_batch(0))
    assert measured[-1]["loss"] < 0.7 * measured[0]["loss"]
    assert int(state["step"]) == 40 and int(state["skipped"]) == 0
    np.testing.assert_allclose(measured[3]["twice"], 2 * measured[3]["loss"], rtol=1e-6)
    ema, params = (jax.device_get(single[0][name]["head"]) for name in ("ema", "params"))
    assert 0 < np.abs(ema - params).max()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accumulation_equals_the_whole_batch(name):
    whole, parts = (toy_run(one_device(), built=toy_optimizer(name), accumulate=n, updates=4) for n in (1, 4))
    close([m["loss"] for m in parts[1]], [m["loss"] for m in whole[1]], rtol=1e-5)
    close([m["grad_norm"] for m in parts[1]], [m["grad_norm"] for m in whole[1]], rtol=1e-4)
    close(parts[0]["params"], whole[0]["params"], rtol=1e-3, atol=1e-4)


def test_accumulation_on_a_mesh(single):
    _, measured = toy_run(make_mesh({"replica": 2, "fsdp": 2, "tensor": 2}), accumulate=2)
    close([m["loss"] for m in measured], [m["loss"] for m in single[1]], rtol=1e-5)


def test_the_average_moves_every_nth_update_only():
    mesh, built = one_device(), toy_optimizer()
    step = TrainStep(TOY, built, mesh, ema=Ema(decay=0.75, every=2))
    state = step.init(jax.random.key(0))
    before = jax.device_get(state["ema"]["head"])
    state, _ = step.update(state, TOY.frozen, toy_batch(0), jax.random.key(1))
    identical(state["ema"]["head"], before)
    state, _ = step.update(state, TOY.frozen, toy_batch(1), jax.random.key(1))
    close(state["ema"]["head"], 0.75 * before + 0.25 * jax.device_get(state["params"]["head"]), rtol=1e-6)


def test_without_decay_the_average_is_the_parameters():
    state, _ = toy_run(one_device(), updates=2, ema=Ema())
    identical(state["ema"], state["params"])


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    mesh, built = one_device(), toy_optimizer()
    step = TrainStep(TOY, built, mesh, ema=Ema(decay=0.9))
    state = step.init(jax.random.key(0))
    state, _ = step.update(state, TOY.frozen, toy_batch(0), jax.random.key(1))
    before = jax.device_get(state)
    state, measured = step.update(state, {"temperature": np.float32(np.nan)}, toy_batch(1), jax.random.key(1))
    identical((state["params"], state["opt_state"]), (before["params"], before["opt_state"]))
    assert (int(state["step"]), int(measured["skipped"])) == (2, 1)
    state, measured = step.update(state, TOY.frozen, toy_batch(1), jax.random.key(1))
    assert int(measured["skipped"]) == 1 and np.isfinite(measured["loss"])
    assert np.abs(jax.device_get(state["params"]["head"]) - before["params"]["head"]).max() > 0


# The real thing, tiny.


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """The runs below compile the same programs over and over; a run that resumes may read them from disk."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


DVAE = {
    "steps": 6, "batch_size": 8, "log_every": 2, "validate_every": 3, "validation_batches": 1, "picture_every": 3,
    "checkpoint_every": 2, "mesh.fsdp": 1, "mesh.replica": -1, "model.image_size": 16, "model.vocab": 8,
    "model.width": 8, "model.stem": 4, "model.patch": 4, "data.image_size": 16, "data.augment": "dvae",
    "data.threads": 2,
}  # fmt: skip
TRANSFORMER = {
    "steps": 2, "batch_size": 8, "validate_every": 0, "picture_every": 0, "model.num_layers": 2, "model.width": 16,
    "model.heads": 2, "model.head_size": 8, "model.text_len": 8, "model.grid": 4, "model.image_vocab": 8,
    "model.text_vocab": 0, "data.image_size": 16, "data.threads": 0,
}  # fmt: skip


def tiny(variant, values, **more):
    return configs.load(f"configs/{variant}.py:demo", [f"--config.{k}={v}" for k, v in (values | more).items()])


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
    return DVAE | {"data.train": f"folder:{folder}", "data.validation": f"folder:{folder}"}


@pytest.fixture(scope="module")
def straight(dvae_values, tmp_path_factory):
    """A run of six updates that nothing stopped, on eight devices."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run.train(tiny("dvae", dvae_values), workdir, progress=False)


def test_a_run_leaves_everything_behind(straight, folder):
    workdir, result = straight
    assert (result.step, result.signal, int(result.state["step"])) == (6, 0, 6)
    assert {"train/loss", "train/images_per_second", "train/learning_rate", "validation/loss"} <= set(result.metrics)
    parts = {"reconstruction_nats_per_value", "kl_nats_per_token", "elbo_nats_per_value", "beta", "temperature"}
    parts |= {"relaxed_error", "hard_error", "codes_used", "codes_used_share", "code_perplexity"}
    assert {f"{kind}/{name}" for kind in ("train", "validation") for name in parts} <= set(result.metrics)
    lines = metrics.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "validation/loss" in line] == [3, 6]
    assert reader.complete_steps(workdir) == [4, 6]
    assert list(workdir.glob("events.out.tfevents.*"))
    for picture in ("curves.png", "pictures/0000003.png", "pictures/0000006.png"):
        assert np.asarray(Image.open(workdir / picture).convert("L")).std() > 0, picture
    identical(model_dir.load(workdir, name="dvae").params, result.state["ema"])
    assert not list(folder.glob("*.tfevents*"))


class Killed(Exception):
    """Stands for a machine that goes away: nothing is saved on the way out."""


def kill_at(n):
    def hook(step, state):
        if step == n:
            raise Killed

    return (1, hook)


def test_stopped_anywhere_it_goes_on_bit_for_bit(straight, dvae_values, tmp_path):
    with pytest.raises(Killed):
        run.train(tiny("dvae", dvae_values), tmp_path, progress=False, hooks=[kill_at(3)])
    assert reader.complete_steps(tmp_path) == [2]

    def interrupt(step, state):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = run.train(tiny("dvae", dvae_values), tmp_path, progress=False, hooks=[(1, interrupt)])
    assert (stopped.signal, stopped.step) == (signal.SIGTERM, 5)
    assert reader.complete_steps(tmp_path)[-1] == 5
    done = run.train(tiny("dvae", dvae_values), tmp_path, progress=False)
    identical(done.state, straight[1].state)
    saved = [manager.Checkpoints(path, keep=2) for path in (straight[0], tmp_path)]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), done.state)
    (a, position_a), (b, position_b) = (reader.restore(6, shapes) for reader in saved)
    identical(a, b)
    assert position_a == position_b
    losses = [
        {
            line["step"]: line["validation/loss"]
            for line in metrics.read(path / "metrics.jsonl")
            if "validation/loss" in line
        }
        for path in (straight[0], tmp_path)
    ]
    assert losses[0] == losses[1]  # the line of update 3 was written by the killed run, and once


def test_a_finished_run_is_left_as_it_is_and_more_steps_go_on(straight, dvae_values):
    workdir, result = straight
    again = run.train(tiny("dvae", dvae_values), workdir, progress=False)
    identical(again.state, result.state)
    assert again.step == 6


def test_another_config_is_refused_with_the_keys(straight, dvae_values):
    with pytest.raises(UserError, match=r"\(batch_size was 8 and is 16, model.width was 8 and is 12\)"):
        run.train(tiny("dvae", dvae_values | {"model.width": 12, "batch_size": 16}), straight[0], progress=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    captions = [f"picture number {index} of many" for index in range(20)]
    return BPETokenizer.train(captions, vocab_size=290).save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def transformer_values(straight, folder, tokenizer):
    return TRANSFORMER | {"data.train": f"folder:{folder}", "dvae": straight[0], "tokenizer": tokenizer}


def test_a_transformers_workdir_needs_nothing_from_outside(transformer_values, tokenizer, tmp_path):
    config = tiny("transformer", transformer_values, checkpoint_every=1)
    with pytest.raises(Killed):
        run.train(config, tmp_path, progress=False, hooks=[kill_at(2)])
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["model"]["text_vocab"] == 290
    hidden = tokenizer.rename(tokenizer.with_name("elsewhere"))
    try:
        result = run.train(config, tmp_path, progress=False)
    finally:
        hidden.rename(tokenizer)
    assert result.step == 2 and np.isfinite(float(jnp.sum(result.state["params"]["image_head"])))
    kept, given = model_dir.load(tmp_path / "dvae", name="dvae"), model_dir.load(config.dvae)
    identical(kept.params, given.params)
    assert kept.config == {key: given.config[key] for key in ("name", "model")}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("dvae", "", "needs a trained dVAE"),
        ("dvae", "/nowhere", "check the path"),
        ("tokenizer", "", "needs a tokenizer"),
        ("model.text_vocab", 291, "tokenizer of 291 entries .* got 290"),
        ("model.grid", 2, "model.grid = 4, the dVAE's grid"),
        ("model.image_vocab", 9, "model.image_vocab = 8, the dVAE's vocab"),
        ("data.image_size", 8, "data.image_size = 16, the dVAE's image_size"),
        ("data.train", "", "name its source"),
        ("data.train", "folder:/nowhere", "nowhere"),
        ("model.heads", 0, "heads must be at least 1"),
        ("batch_size", 9, "multiple of 8"),
        ("mesh.fsdp", 3, "does not fit 8 device"),
        ("data.bpe_dropout", 2.0, "bpe_dropout"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(
    transformer_values, tmp_path, key, value, message
):
    config = tiny("transformer", transformer_values | {key: value})
    with pytest.raises(UserError, match=message):
        run.train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused(dvae_values, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a workdir to write to"):
        run.train(tiny("dvae", dvae_values), tmp_path / "file" / "run", progress=False)


def test_a_model_of_another_name_is_no_task(dvae_values):
    with pytest.raises(UserError, match="must be dvae, transformer or clip"):
        objectives.build_task(tiny("dvae", dvae_values, name="gan"))


class ToyBatches:
    """What the loop asks of `Batches`, for the toy."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return toy_batch(self.position)

    def get_state(self):
        return {"position": self.position}


def test_hopeless_training_stops_with_a_sentence(dvae_values, tmp_path):
    hopeless = dataclasses.replace(TOY, frozen={"temperature": np.float32(np.nan)})
    config = tiny("dvae", dvae_values)
    with pytest.raises(UserError, match="expected finite losses and gradients, got none in the last 2 updates"):
        loop.run(run.step_for(config, hopeless, one_device()), config, tmp_path, batches=ToyBatches(), progress=False)
    assert not metrics.read(tmp_path / "metrics.jsonl")


def test_warnings_and_lines_reach_the_terminal(dvae_values, tmp_path, capfd):
    run.train(tiny("dvae", dvae_values | {"validate_every": 0, "picture_every": 0}, steps=2), tmp_path)
    text = capfd.readouterr().err
    assert "dvae step 2/2: loss" in text and "images/s" in text
    assert f"2 of 2 updates in {tmp_path}" in text
