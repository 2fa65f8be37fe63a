"""Small evaluations: of pictures in memory, and as a hook of a training."""

import dataclasses

import jax
import numpy as np
import pytest

from dalle_jax import model_dir
from dalle_jax.cli import hooks
from dalle_jax.data.sources import scenes
from dalle_jax.errors import UserError
from dalle_jax.evaluate.probe import by_clip
from dalle_jax.sample.rerank import Reranker
from dalle_jax.train.monitor import metrics
from dalle_jax.train.settings import Evaluate
from tests.support.demo_settings import demo_settings
from tests.support.line_task import train

COUNT = 12


@pytest.fixture(scope="module")
def clip(model):
    return Reranker.load(model / "clip")


@pytest.fixture(scope="module")
def captioned():
    records = [scenes.open_scenes("val")[i] for i in range(COUNT)]
    return [record.image for record in records], [record.captions[0] for record in records]


def test_real_pictures_are_at_no_distance_and_blurred_ones_are_further_than_others(clip, captioned):
    pictures, captions = captioned
    same = by_clip(clip, pictures, captions, pictures)
    assert abs(same["clip_fid"]) < 1e-5 and same["reference"] == COUNT and "not Inception" in same["note"]
    wrong = by_clip(clip, [255 - picture for picture in pictures], captions, pictures)
    assert wrong["clip_fid"] > 0.01 and wrong["clip"] == clip.digest
    alone = [2.5 * max(0, clip.score(p[None], c)[0]) for p, c in zip(pictures, captions, strict=True)]
    assert same["clip_score"] == pytest.approx(np.mean(alone), abs=1e-5)


def test_the_hook_scores_samples_of_held_out_captions(model, weights):
    evaluate = Evaluate(every=5, clip=str(model / "clip"), weights=str(weights), count=3, reference_count=4)
    # The model that lies there, which the workdir of a training would have written.
    values = {f"model.{key}": value for key, value in model_dir.read_config(model)["model"].items()}
    settings = demo_settings("transformer", values)
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, evaluate=evaluate))
    assert [every for every, _ in hooks.hooks_of(settings, model)] == [2_000, 5]
    every, score = hooks.evaluate_hook(settings, model)
    average = jax.device_put(model_dir.read_params(model))
    state = {"ema": average, "params": average}
    scores = score(5, state)
    assert set(scores) == {"samples/fid", "samples/clip_fid", "samples/clip_score"}
    assert scores["samples/fid"] > 0 and score(10, state) == scores  # the same captions and seeds
    other = score(15, {**state, "ema": jax.tree.map(lambda x: -x, state["ema"])})
    assert other["samples/fid"] != scores["samples/fid"]


@pytest.mark.parametrize(("clip", "message"), [(None, "give config.run.evaluate.weights"), ("nowhere", "config.json")])
def test_a_hook_without_a_network_is_refused_at_the_start(clip, message, tmp_path):
    with pytest.raises(UserError, match=message):
        settings = demo_settings("transformer", {"run.evaluate.every": 5, "run.evaluate.clip": clip})
        hooks.hooks_of(settings, tmp_path)


def test_what_a_hook_measures_is_in_the_metrics(tmp_path):
    train(
        tmp_path, hooks=[(2, lambda step, state: {"samples/fid": 10.0 * step}), (1, lambda step, state: None)], steps=4
    )
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["samples/fid"]) for line in lines if "samples/fid" in line] == [(2, 20.0), (4, 40.0)]
