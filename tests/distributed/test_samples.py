"""Samples of a model that is cut over processes while it trains."""

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax import Pipeline, model_dir
from dalle_jax.checkpoint import reader
from dalle_jax.cli import hooks
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.engine import weight_bytes, widest_mesh
from tests.support import processes, tiny_model
from tests.support.demo_settings import demo_settings

SIZES = {f"model.{name}": value for name, value in tiny_model.TRANSFORMER.items()}
SIZES |= {"model.text_vocab": 384, "data.image_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.write(tmp_path_factory.mktemp("model"))


def test_two_processes_draw_what_the_checkpoint_draws_and_go_on(model, tmp_path):
    """A hook that raises in one of them costs its own share."""
    data = "scenes:train@24"
    values = SIZES | {
        "model.precision": "bf16", "optimizer.schedule.warmup_steps": 0,
        "frozen.image_tokenizer": model / "image_tokenizer", "tokenizer": model,
        "run.data.train": data, "run.data.validation": None, "run.data.threads": 0, "batch_size": 8, "run.steps": 3,
        "run.picture_every": 2, "run.checkpoint_every": 2, "run.mesh.fsdp": 2, "run.mesh.tensor": 2,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in values.items()]
    started = processes.start("samples_driver", tmp_path, 2, *words, devices=2)
    ended = processes.statuses(started)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert ended == [0, 0], "\n".join(logs)
    for step in (1, 2, 3):
        assert f"samples or scores of step {step}, training goes on (the first process alone)" in logs[0]
    workdir = tmp_path / "run"
    assert reader.complete_steps(workdir) == [2, 3]
    captions = hooks.first_captions(data, hooks.CAPTIONS)
    reader.checkpoint_path(workdir)[1].rename(tmp_path / "3")  # the samples are those of step 2
    pipe = Pipeline.load(workdir)
    rows = pipe(captions, seed=list(range(len(captions))))
    sheet = contact_sheet([np.asarray(row[0]) for row in rows], captions, columns=hooks.COLUMNS)
    drawn = np.asarray(Image.open(workdir / "pictures" / "0000002.png"))
    assert (drawn != np.asarray(sheet)).mean() < 0.05  # bfloat16 rounds once more, which may turn a token


def test_weights_that_do_not_fit_beside_the_state_are_not_put_there(model, monkeypatch):
    settings, state = demo_settings("transformer", SIZES), {"ema": model_dir.read_params(model)}
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(state["ema"]))
    monkeypatch.setattr(hooks, "free_bytes", lambda device: 0.2 * weights)
    _, draw = hooks.sample_hook(settings, model)
    with pytest.raises(UserError, match="GB free on each device for the weights to draw with, got 0.0: set config.run"):
        draw(2, state)


def test_weights_to_draw_with_are_cut_as_far_as_heads_divide():
    model = build("transformer", demo_settings("transformer", SIZES).model)
    cut, whole = widest_mesh(model.config.heads, jax.local_devices()), make_mesh({}, devices=jax.devices()[:1])
    assert dict(cut.shape) == {"replica": 4, "fsdp": 1, "tensor": 2}
    all_parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract))
    assert 0.5 * all_parameters < weight_bytes(model, whole) < all_parameters  # the text head is not among them
    assert 0.5 * weight_bytes(model, whole) < weight_bytes(model, cut) < 0.9 * weight_bytes(model, whole)
