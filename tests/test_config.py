"""Configs: complete, locked, typos answered, and what a workdir accepts."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from dalle_jax import config as configs
from dalle_jax import sharding
from dalle_jax.data.pipeline import DataConfig
from dalle_jax.errors import UserError
from dalle_jax.models import build
from dalle_jax.train import run
from dalle_jax.train.objectives.dvae import Objective
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from tests.support import ROOT

SPECS = [f"configs/dvae.py:{v}" for v in ("paper", "emoji", "demo")] + [
    f"configs/transformer.py:{v}" for v in ("12b", "5b6", "2b8", "1b3", "400m", "emoji", "demo")
]
SPECS += [f"configs/clip.py:{v}" for v in ("b32", "b16", "l14", "demo")]


@pytest.mark.parametrize("spec", SPECS)
def test_every_config_builds_what_it_configures(spec):
    config = configs.load(spec)
    model = build(config.name, config.model)
    data = {key: value for key, value in config.data.items() if key not in run.SOURCE_KEYS}
    assert DataConfig(**data).image_size == config.data.image_size
    build_optimizer(Optimizer(**config.optimizer), steps=config.steps, axes=model.axes)
    if config.name == "dvae":
        Objective(**config.objective)
    if config.name in ("dvae", "clip"):
        assert model.config.image_size == config.data.image_size
    assert config.steps > 0 and config.batch_size > 0
    assert spec.rpartition(":")[2] in configs._module(configs._find(spec.partition(":")[0])).__doc__


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_dimension_has_a_known_name(spec):
    config = configs.load(spec)
    model = build(config.name, config.model)
    mesh = AbstractMesh((8, 128, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    places = sharding.shardings(model.abstract, model.axes, mesh)
    assert len(jax.tree.leaves(places)) == len(jax.tree.leaves(model.abstract))  # and no name was unknown


def test_the_12b_parameters_are_really_cut_over_128_devices():
    model = build("transformer", configs.load("configs/transformer.py:12b").model)
    mesh = AbstractMesh((8, 128, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    places = sharding.shardings(model.abstract, model.axes, mesh)
    sizes = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), model.abstract, places)
    # All matrices have a dimension of 3968 = 128 * 31; only a few vectors (biases of heads) stay whole.
    assert sum(jax.tree.leaves(sizes)) < 1.05 * model.num_params / 128


def test_only_a_model_is_trained():
    with pytest.raises(UserError, match="expected the config of a model to train, got one of evaluate"):
        run.check_values(configs.load("configs/evaluate.py:demo"))


@pytest.mark.parametrize(
    "word, message",
    [
        ("keep_checkpoints=0", "keep_checkpoints of at least 1, got 0"),  # every one would be deleted, the newest too
        ("rollback_after=-1", "rollback_after of at least 0, got -1"),
        ("ema.every=0", "ema.every to be a whole number of at least 1"),
        ("ema.decay=1.0", "ema.decay to be a number of at least 0 and below 1, got 1.0"),
        ("ema.decay=-0.5", "ema.decay to be a number of at least 0"),
    ],
)
def test_values_that_would_do_harm_in_silence_are_refused(word, message):
    config = configs.load("configs/dvae.py:demo")
    run.check_values(config)
    with pytest.raises(UserError, match=message):
        run.check_values(configs.load("configs/dvae.py:demo", [f"--config.{word}"]))


def test_overrides_change_values_and_keep_types():
    config = configs.load(
        "configs/dvae.py:demo",
        ["--config.model.width=64", "--config.data.train=folder:a b", "--config.optimizer.learning_rate=1"],
    )
    assert (config.model.width, config.data.train) == (64, "folder:a b")
    assert isinstance(config.optimizer.learning_rate, float)
    with pytest.raises(AttributeError):
        config.modle = 1
    assert configs.load("configs/dvae.py:demo").model.width != 64


@pytest.mark.parametrize(
    "spec, override, message",
    [
        ("configs/dvae.py:demo", "--config.model.widht=64", "nearest valid one is 'model.width'"),
        ("configs/dvae.py:demo", "--config.model.width=wide", "wrong type"),
        ("configs/dvae.py:demo", "--config.model.width", "join key and value"),
        ("configs/dvae.py:tiny", "--config.steps=1", "one of paper, emoji, demo"),
        ("configs/vae.py:demo", "--config.steps=1", "try configs/clip.py or configs/dvae.py or configs/evaluate.py"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(spec, override, message):
    with pytest.raises(UserError, match=message):
        configs.load(spec, [override])


def test_a_config_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dalle_jax.configs import dvae\n"
        "def get_config(variant='demo'):\n"
        "    config = dvae.get_config(variant)\n"
        "    config.steps = 7\n"
        "    return config\n"
    )
    assert configs.load(str(path)).steps == 7
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        configs.load(str(path))


def test_json_gives_the_same_config_back():
    config = configs.load("configs/transformer.py:demo")
    assert not configs.differences(config, configs.from_json(configs.to_json(config)))


def test_only_free_keys_may_change_in_a_workdir():
    old = configs.load("configs/dvae.py:demo")
    free = configs.load("configs/dvae.py:demo", ["--config.steps=9", "--config.mesh.tensor=2", "--config.log_every=1"])
    assert set(configs.differences(old, free)) == {"steps", "mesh.tensor", "log_every"}
    configs.refuse_other(old, free, where="runs/x")
    other = configs.load("configs/dvae.py:demo", ["--config.model.width=64", "--config.seed=3", "--config.steps=9"])
    with pytest.raises(
        UserError, match=r"runs/x belongs to another config \(model.width was 128 and is 64, seed was 0"
    ):
        configs.refuse_other(old, other, where="runs/x")


def test_free_keys_exist():
    known = configs.flatten(configs.load("configs/transformer.py:demo"))
    for free in configs.FREE_KEYS:
        assert any(key == free or key.startswith(free) for key in known), free


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
        config = configs.load(spec)
        assert build(config.name, config.model).num_params == parameters
        number, unit = memory.split()
        assert float(number) == pytest.approx(parameters * 16 / units[unit], rel=0.15)
