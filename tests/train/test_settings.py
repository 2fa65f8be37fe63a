"""Settings of a training: what is refused in one sentence, and what a workdir accepts."""

import dataclasses
import json
import math

import pytest

from dalle_jax import model_dir
from dalle_jax.errors import UserError
from dalle_jax.models import build
from dalle_jax.train import run
from dalle_jax.train.settings import OBJECTIVE_SETTINGS, TrainSettings, load_settings
from tests.support.demo_settings import demo_settings
from tests.support.parameters import random_parameters

NAN, INF = math.nan, math.inf
STEPS = 2**31  # more than are counted
# Of values that would do harm in silence, or end in a traceback: key -> what is refused.
REFUSED = {
    "seed": (-1, 2**32, 2**64, 0.5),
    "batch_size": (0, -8, 2**40),
    "accumulate": (0, -1, 33),  # more than the examples of a batch
    "optimizer.name": ("sgd",),
    "optimizer.moments": ("fp16",),
    "optimizer.learning_rate": (0.0, -1.0, NAN, INF, 1e9),
    "optimizer.b1": (-0.1, 1.0, 1.5, NAN),
    "optimizer.b2": (-0.1, 1.0, NAN),
    "optimizer.eps": (0.0, -1e-8, NAN),
    "optimizer.weight_decay": (-1e-4, NAN, INF),
    "optimizer.clip_norm": (0.0, -1.0, NAN),
    "optimizer.momentum": (-0.1, 1.0, NAN),
    "optimizer.schedule.name": ("linear",),
    "optimizer.schedule.warmup_steps": (-1, 1_001, STEPS),  # more than the run's
    "optimizer.schedule.decay_steps": (-1, 0, STEPS),
    "optimizer.schedule.end_learning_rate": (-1e-6, 1.0, NAN),  # above the peak
    "optimizer.schedule.plateau.window": (0,),
    "optimizer.schedule.plateau.patience": (0,),
    "optimizer.schedule.plateau.min_improvement": (0.0, 1.0, NAN),
    "optimizer.schedule.plateau.halvings": (-1,),
    "ema.decay": (-0.5, 1.0, NAN),
    "ema.every": (0, 1_001),  # the average would never move
    "storage.params": ("fp8",),
    "compression.rank": (0, -1),
    "compression.format": ("fp16",),
    "objective.likelihood": ("mse",),
    "objective.balance": (-0.1, NAN),
    "objective.beta.end": (-1.0, NAN),
    "objective.beta.steps": (-5,),
    "objective.temperature.end": (0.0, -1.0, NAN),
    "data.image_size": (0, -64, 32),  # not the model's
    "data.augment": ("none",),
    "data.bpe_dropout": (-0.1, 1.1, NAN),
    "data.caption_dropout": (-0.1, 1.1, NAN),
    "data.max_pixels": (0, -1),
    "data.max_aspect_ratio": (0.5, -1.0, NAN),
    "run.steps": (0, -1, STEPS, 10**14),
    "run.log_every": (0, -1, STEPS),
    "run.validate_every": (0, -3),
    "run.validation_batches": (0, -1),
    "run.picture_every": (0, -1),
    "run.checkpoint_every": (0, -1),
    "run.check_replicas_every": (0, -1),
    "run.keep_checkpoints": (0, -1),  # every one would be deleted, the newest too
    "run.keep_every_hours": (0.0, -1.0, NAN, INF),
    "run.rollback_after": (0, -1),
    "run.mesh.replica": (0, -1),
    "run.mesh.tensor": (0, -2),
    "run.processes.hang_seconds": (0, -1, 10**9),
    "run.data.shards": (0, -1),
    "run.data.threads": (-1, 10**6),
    "run.data.prefetch_batches": (0,),
    "run.data.max_bad_share": (-0.1, 1.1, NAN),
}


REFUSED_OF_VQ = {
    "objective.squared": (-1.0, NAN),
    "objective.variance": (0.0, -1.0, NAN),
    "objective.edges": (-0.5, INF),
    "objective.perceptual": (-1.0, NAN),
    "objective.codebook.rule": ("sgd",),
    "objective.codebook.commitment": (-0.25, NAN),
    "objective.codebook.decay": (-0.1, 1.0, NAN),
    "objective.codebook.epsilon": (0.0, NAN),
    "objective.codebook.start": (0, -1, 2**40),
    "objective.codebook.noise": (-0.3, NAN),
    "objective.codebook.dead_below": (0.0, -1.0, NAN),
    "objective.codebook.dead_every": (0, -1),
}


@pytest.mark.parametrize(
    "name, key, value",
    [("dvae", key, value) for key, values in REFUSED.items() for value in values]
    + [("vq", key, value) for key, values in REFUSED_OF_VQ.items() for value in values],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_key(name, key, value):
    with pytest.raises(UserError) as refused:
        demo_settings(name, {key: value})
    message = str(refused.value)
    assert key.rpartition(".")[2] in message and "got" in message and ": " in message and "\n" not in message


def test_the_evaluation_of_samples_is_checked_too():
    for key, value in {"every": 0, "count": 0, "reference_count": 1}.items():
        with pytest.raises(UserError, match=f"config.run.evaluate.{key} to be a whole number of at least"):
            demo_settings("transformer", {f"run.evaluate.{key}": value})
    with pytest.raises(UserError, match="give config.run.evaluate.weights, config.run.evaluate.clip or both"):
        demo_settings("transformer", {"run.evaluate.every": 5})


def test_json_gives_the_same_settings_back():
    for name in ("dvae", "vq", "transformer", "clip"):
        settings = load_settings(f"configs/{name}.py:demo")
        assert TrainSettings.of(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_a_key_of_an_old_version_or_a_typo_is_answered():
    with pytest.raises(UserError, match="unknown config key 'steps': it is called 'run.steps' since version 0.2"):
        demo_settings("dvae", {"steps": 3})
    with pytest.raises(UserError, match="unknown config key 'ema.decai': the nearest valid one is 'ema.decay'"):
        demo_settings("dvae", {"ema.decai": 0.5})


def test_only_what_is_under_run_may_change_in_a_workdir(tmp_path):
    settings = demo_settings("dvae", {"run.data.train": "folder:/nowhere"})
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    other = settings.changed({"run.steps": 900, "run.mesh.tensor": 2, "run.log_every": None})
    with pytest.raises(UserError, match="/nowhere"):  # the workdir is accepted, the data are not there
        run.train(other, tmp_path, progress=False)
    other = settings.changed({"model.width": 64, "seed": 3, "run.steps": 900})
    with pytest.raises(UserError, match=r"another config \(model.width was 128 and is 64, seed was 0 and is 3\)"):
        run.train(other, tmp_path, progress=False)


DVAE = {"image_size": 16, "vocab": 8, "width": 8, "groups": 1, "blocks_per_group": 1, "stem": 4, "patch": 4}


def test_folders_of_version_0_1_are_read_but_not_trained_further(tmp_path):
    """A run then had all keys at the top, its dVAE in dvae/ and the sha256 of that in dvae.sha256."""
    dvae = random_parameters(build("dvae", DVAE))
    model_dir.save(tmp_path / "dvae", {"name": "dvae", "model": DVAE}, dvae)
    found = model_dir.load(tmp_path / "dvae")
    (tmp_path / "dvae.sha256").write_text(f"{found.digest}\n")
    (tmp_path / "config.json").write_text(json.dumps({"name": "dvae", "model": DVAE, "steps": 9, "checkpoint_dir": ""}))
    assert model_dir.load_frozen(tmp_path, "image_tokenizer").digest == found.digest
    assert model_dir.checkpoint_dir(model_dir.read_config(tmp_path)) is None
    with pytest.raises(UserError, match="version 0.1 .* `export` read it; train it further with dalle-jax 0.1"):
        run.train(demo_settings("dvae", {}), tmp_path, progress=False)
    (tmp_path / "dvae.sha256").write_text("0" * 64)
    with pytest.raises(UserError, match="expected the image_tokenizer that the model in .* was trained with"):
        model_dir.load_frozen(tmp_path, "image_tokenizer")


def test_the_name_of_a_config_decides_what_its_objective_is(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Other:
        sharpness: float = 1.0

    monkeypatch.setitem(OBJECTIVE_SETTINGS, "clip", Other)
    values = load_settings("configs/clip.py:demo").changed({"objective": {"sharpness": 2.0}})
    assert values.objective == Other(2.0)
    with pytest.raises(UserError, match="unknown config key 'objective.sharpnes': .*objective.sharpness"):
        values.changed({"objective": {"sharpnes": 2.0}})
