"""Folders of models: what comes back, and what is refused."""

import json

import jax
import numpy as np
import pytest

from dalle_jax import files, model_dir
from dalle_jax.errors import UserError
from dalle_jax.models import build
from tests.support.checkpoints import state
from tests.support.parameters import random_parameters
from tests.support.trees import identical

CONFIG = {"name": "dvae", "model": {"width": 4}}


def test_an_exported_model_comes_back_as_it_was(tmp_path):
    params = state(1)["params"] | {"whole": np.arange(4, dtype=np.int32), "turned": np.arange(6.0).reshape(2, 3).T}
    model_dir.save(tmp_path / "a" / "b", CONFIG, params)
    config, loaded = model_dir.read_config(tmp_path / "a" / "b"), model_dir.read_params(tmp_path / "a" / "b")
    assert config == CONFIG and loaded["whole"].dtype == np.int32
    identical(loaded, params)
    model_dir.save(tmp_path / "a" / "b", CONFIG, {"b": np.zeros(1)})
    identical(model_dir.read_params(tmp_path / "a" / "b"), {"b": np.zeros(1)})
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "params.safetensors"]


def test_a_write_that_fails_leaves_no_half_model(tmp_path, monkeypatch):
    model_dir.save(tmp_path, CONFIG, {"b": np.zeros(1)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        model_dir.save(tmp_path, CONFIG, {"b": np.ones(1)})
    monkeypatch.undo()
    with pytest.raises(UserError, match="config.json"):
        model_dir.load(tmp_path)


def test_wrong_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="check the path"):
        model_dir.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="train it first"):
        model_dir.load(tmp_path)
    with pytest.raises(UserError, match="expected a transformer in .*, got a dvae"):
        model_dir.load(tmp_path, name="transformer")
    (tmp_path / "params.safetensors").write_bytes(b"12345678 no")
    with pytest.raises(UserError, match="export it again"):
        model_dir.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="json"):
        model_dir.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="without 'name'"):
        model_dir.load(tmp_path)


def test_parameters_of_another_model_are_refused():
    params = state(0)["params"]
    model_dir.check_params(params, jax.eval_shape(lambda: params), where="x")
    with pytest.raises(UserError, match=r"parameter block/w of shape \(4, 2\) in x, got \(8, 2\)"):
        model_dir.check_params(params, {"block": {"w": np.zeros((4, 2))}, "b": np.zeros(3)}, where="x")
    with pytest.raises(UserError, match="parameter b of shape None"):
        model_dir.check_params(params, {"block": {"w": np.zeros((8, 2))}}, where="x")


def test_a_frozen_model_of_any_role_comes_back_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setitem(model_dir.ROLES, "teacher", ("dvae",))
    sizes = {"image_size": 16, "vocab": 8, "width": 8, "groups": 1, "blocks_per_group": 1, "stem": 4, "patch": 4}
    model_dir.save(tmp_path / "given", {"name": "dvae", "model": sizes}, random_parameters(build("dvae", sizes)))
    found = model_dir.load(tmp_path / "given")
    run = tmp_path / "run"
    run.mkdir()
    assert not model_dir.has_frozen(run, "teacher")
    model_dir.save_frozen(run, {"teacher": found})
    assert model_dir.has_frozen(run, "teacher") and model_dir.load_frozen(run, "teacher").digest == found.digest
    for text in ("{", "[]"):
        (run / model_dir.FROZEN).write_text(text)
        with pytest.raises(UserError, match=r"expected the sha256 of frozen models in .*frozen.json, got .*: restore"):
            model_dir.load_frozen(run, "teacher")
    (run / model_dir.FROZEN).write_text(json.dumps({"teacher": "0" * 64}))
    with pytest.raises(UserError, match="expected the teacher that the model in .* was trained with"):
        model_dir.load_frozen(run, "teacher")


def test_what_only_training_needs_is_left_behind(tmp_path):
    """The parameters of an adversary lie beside the model's in a run, and are no part of the trained model."""
    config = {"image_size": 8, "vocab": 4, "width": 4, "groups": 1, "blocks_per_group": 1, "stem": 4, "stem_kernel": 1}
    params = random_parameters(build("dvae", config))
    for name, extra in (
        ("plain", {}),
        ("adversarial", {"discriminator": {"conv_0": {"bias": np.ones(3, np.float32)}}}),
    ):
        model_dir.save(tmp_path / name, {"name": "dvae", "model": config}, {**params, **extra})
    plain, adversarial = (model_dir.load(tmp_path / name) for name in ("plain", "adversarial"))
    identical(adversarial.params, params)
    assert adversarial.digest == plain.digest
