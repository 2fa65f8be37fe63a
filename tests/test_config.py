"""Configs: complete, locked, typos answered, and what a workdir accepts."""

import ast
import dataclasses
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from dalle_jax import config, sharding
from dalle_jax.errors import UserError
from dalle_jax.models import build
from dalle_jax.train.optimizer.build import build_optimizer
from dalle_jax.train.settings import TrainSettings, load_settings
from tests.support import ROOT

FILES = [f"configs/{name}.py" for name in ("dvae", "vq", "transformer", "clip")]
SPECS = [f"{file}:{variant}" for file in FILES for variant in config.variants(file)]


def given(values):
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_lays_out_the_settings_that_it_makes(spec):
    found = config.load(spec)
    settings = TrainSettings.of(found.to_dict())
    assert given(config.flatten(found)) == given(config.flatten(dataclasses.asdict(settings)))
    words = {word for key in config.flatten(found) for word in key.split(".")}
    assert not words & set(dir(ConfigDict())), "a key that is a method of ConfigDict cannot be set by --config.KEY"
    model = build(settings.name, settings.model)
    build_optimizer(settings.optimizer, steps=settings.run.steps, axes=model.axes)
    file, _, variant = spec.partition(":")
    assert re.search(rf"^{variant} +\S", ast.get_docstring(ast.parse((ROOT / file).read_text())), re.MULTILINE)
    mesh = AbstractMesh((8, 128, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    places = sharding.shardings(model.abstract, model.axes, mesh)
    assert len(jax.tree.leaves(places)) == len(jax.tree.leaves(model.abstract))  # no dimension has an unknown name


def test_overrides_change_values_and_keep_types():
    found = config.load(
        "configs/dvae.py:demo",
        ["--config.model.width=64", "--config.run.data.train=folder:a b", "--config.optimizer.learning_rate=1"],
    )
    assert (found.model.width, found.run.data.train) == (64, "folder:a b")
    assert isinstance(found.optimizer.learning_rate, float)
    with pytest.raises(AttributeError):
        found.modle = 1
    assert config.load("configs/dvae.py:demo").model.width != 64


@pytest.mark.parametrize(
    "spec, override, message",
    [
        ("configs/dvae.py:demo", "--config.model.widht=64", "nearest valid one is 'model.width'"),
        ("configs/dvae.py:demo", "--config.optimizer.lr=1", "nearest valid one is 'optimizer.learning_rate'"),
        ("configs/dvae.py:demo", "--config.bs=1", "nearest valid one is 'batch_size'"),
        ("configs/dvae.py:demo", "--config.model.width=wide", "wrong type"),
        ("configs/dvae.py:demo", "--config.model.width", "join key and value"),
        ("configs/dvae.py:tiny", "--config.run.steps=1", "one of paper, emoji, demo"),
        ("configs/vae.py:demo", "", "try configs/clip.py or configs/dvae.py or configs/evaluate.py"),
        ("README.md", "", "expected a Python file with a config, got 'README.md', which is none"),
        ("configs/base.py", "", "expected a config file with a function get_config"),
        ("configs/dvae.py:demo", "--config.steps=1", "'steps': it is called 'run.steps' since version 0.2"),
        (
            "configs/dvae.py:demo",
            "--config.mesh.fsdp=1",
            "'mesh.fsdp': it is called 'run.mesh.fsdp' since version 0.2",
        ),
        ("configs/evaluate.py:demo", "", "expected the config of a model to train, .*, got one of evaluate"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(spec, override, message):
    with pytest.raises(UserError, match=message):
        load_settings(spec, [override] if override else [])


def test_a_config_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dalle_jax.configs import dvae\n"
        "def get_config(variant='demo'):\n"
        "    config = dvae.get_config(variant)\n"
        "    config.run.steps = 7\n"
        "    return config\n"
    )
    assert config.load(str(path)).run.steps == 7
    path.write_text("def get_config(variant):\n    return {'steps': 7}\n")
    with pytest.raises(UserError, match="expected --config FILE.py:VARIANT that get_config takes"):
        config.load(str(path))
    with pytest.raises(UserError, match="to return a ConfigDict, got a dict"):
        config.load(f"{path}:demo")
    path.write_text("def get_config():\n    from dalle_jax.configs import dvae\n    return dvae.get_config('demu')\n")
    with pytest.raises(UserError, match=r"got KeyError in line 3 of .*mine.py \('demu'\): mend the file"):
        config.load(str(path))
    path.write_text("\ndef get_config(:\n")
    with pytest.raises(UserError, match="got SyntaxError in line 2 of"):
        config.load(str(path))


def test_none_is_a_value():
    words = ["--config.run.checkpoint_every=None", "--config.run.keep_every_hours=3", "--config.run.data.validation="]
    run = load_settings("configs/dvae.py:demo", words).run
    assert (run.checkpoint_every, run.keep_every_hours, run.data.validation) == (None, 3.0, None)


def test_the_table_of_configs_is_what_they_say():
    """Parameters of each config, and 16 bytes each in the unit that the table uses."""
    units = {"GB": 1e9, "MB": 1e6}
    rows = {}
    for line in (ROOT / "docs" / "configs.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.split("|")]
        if len(cells) == 6 and cells[1].startswith("configs/"):
            rows[cells[1]] = int(cells[3].replace(",", "")), cells[4]
    assert sorted(rows) == sorted(SPECS)
    for spec, (parameters, memory) in rows.items():
        settings = load_settings(spec)
        assert build(settings.name, settings.model).num_params == parameters
        number, unit = memory.split()
        assert float(number) == pytest.approx(parameters * 16 / units[unit], rel=0.15)
