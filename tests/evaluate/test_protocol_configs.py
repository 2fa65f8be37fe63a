"""The captions and networks that a protocol takes, values that are refused, and that every config is complete."""

import dataclasses
import json

import numpy as np
import pytest

from dalle_jax import config, model_dir
from dalle_jax.cli.evaluate import OTHER_KEYS
from dalle_jax.data.sources import open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, drawing, report
from dalle_jax.evaluate.features import Extractor
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.evaluate.protocol import Draw, Evaluation, Metrics, Overlap
from tests.support import ROOT
from tests.support.evaluation import CAPTIONS, IMAGES, run

SPECS = [variant for variant in config.variants("configs/evaluate.py") if variant != "reconstructions"]


def test_captions_are_chosen_by_the_seed_without_one_twice(coco):
    source = open_source(f"coco:{coco}")
    one, same, other = (drawing.choose(source, Draw(count=20, seed=seed), {}) for seed in (1, 1, 2))
    assert one.ids == same.ids != other.ids and len(set(one.ids)) == 20
    everything = drawing.choose(source, Draw(), {})
    assert len(everything.ids) == IMAGES * CAPTIONS and set(one.ids) < set(everything.ids)

    class Twice:
        name = "twice"

        def __len__(self):
            return 4

        def __getitem__(self, row):
            return drawing.Dropped("x", "no image") if row == 3 else dataclasses.replace(source[0], key=str(row))

    unique = drawing.choose(Twice(), Draw(unique=True), {})
    assert unique.ids == ["0#0", "0#1"] and unique.dropped == {"no image": 1} and unique.records == 4


@pytest.mark.parametrize("variant", SPECS)
def test_every_protocol_is_complete(variant):
    found = config.load(f"configs/evaluate.py:{variant}").to_dict()
    values = {key: value for key, value in found.items() if key not in OTHER_KEYS}
    evaluation = Evaluation.from_json(values, where=variant)
    assert (evaluation.protocol is None) == (evaluation.draw is None) == (variant == "sets")
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json())), where="report") == evaluation
    assert variant in (ROOT / "configs" / "evaluate.py").read_text().partition("VARIANTS")[0]


MANY = 10**11
IMPOSSIBLE = {
    Metrics: (
        {"blur": (1.0, 1.0)}, {"blur": ()}, {"blur": (float("nan"),)}, {"blur": (float("inf"),)}, {"resize": "x"},
        {"pools": "clean"}, {"splits": 0}, {"candidates": 1}, {"seed": -1}, {"side": 0, "crop": "center"}, {"side": 9},
        {"splits": MANY}, {"candidates": MANY},
    ),
    Draw: ({"count": 1}, {"count": MANY}, {"best_of": 0}, {"seed": 2**32}, {"shard_size": 1.5}, {"shard_size": MANY}),
    Overlap: ({"min_cosine": float("nan")},),
    Evaluation: (
        {"pictures": "x", "count": 0}, {"pictures": "x", "reference_count": MANY}, {},
        {"pictures": "x", "draw": Draw()},
    ),
}  # fmt: skip


def test_values_that_cannot_be_are_refused():
    for part, cases in IMPOSSIBLE.items():
        for values in cases:
            with pytest.raises(UserError, match=r"^expected .*, got "):
                part(**values)
    with pytest.raises(UserError, match="unexpected keyword"):
        Evaluation.from_json({"pictures": "x", "nonsense": 1}, where="here")


def test_the_inception_score_can_be_that_of_another_network(coco, weights, tmp_path, capsys):
    found = model_dir.load(weights)
    params = found.params
    other, pictures = tmp_path / "other", f"folder:{coco / 'val2014'}"
    preprocess = Preprocess(resize="dm-gan-score", crop="center", side=32)

    def seen_by(network):
        return network.of_source(open_source(pictures, captions_required=False), preprocess=preprocess)

    # Surer of its classes, and not of the same one for all pictures.
    mean_F, weight_FV = seen_by(Extractor.load(weights)).features_XF.mean(0), params["logits"]["weight"]
    params["logits"]["weight"] = 10 * (weight_FV - np.outer(mean_F, mean_F @ weight_FV) / (mean_F @ mean_F))
    model_dir.save(other, found.config, params)
    values = {
        "source": f"coco:{coco}", "weights": weights, "reference_exactly": IMAGES, "count": IMAGES,
        "measure.pools": "fid", "measure.side": 32, "measure.blur": "(0.0,)", "measure.splits": 2,
    }  # fmt: skip

    def evaluated(**more):
        words = [f"--config.{key}={value}" for key, value in {**values, **more}.items()]
        common = ("--config", "configs/evaluate.py:coco", "--pictures", pictures, "--out", tmp_path / "out", "--json")
        status = run(*common, *words)
        return status, *capsys.readouterr()

    assert evaluated(count=0)[2].splitlines()[-1].count("got a count of 30000: give more pictures") == 1
    same, scored = (json.loads(evaluated(**more)[1]) for more in ({}, {"score_weights": other}))
    assert scored["scores"]["fid"] == same["scores"]["fid"] and "scored_by" not in same
    extractor = Extractor.load(other)
    logits_XV = seen_by(extractor).logits_XV
    order = np.random.default_rng(0).permutation(IMAGES)
    want = distances.inception_score(logits_XV[order], splits=2)[0]
    assert scored["scores"]["inception_score"] == pytest.approx(want, rel=1e-5)
    assert want > 1.05 > same["scores"]["inception_score"]
    scored_by = f"IS by {extractor.network} {extractor.digest[:12]}, resize dm-gan-score."
    assert scored_by in (tmp_path / "out" / "report.md").read_text()
    assert "count 12 instead of 30000" in scored["evaluation"]["departures"]
    assert scored["scored_by"]["digest"] == extractor.digest and scored["scored_by"]["resize"] == "dm-gan-score"
    wrong = {"measure.score_pools": "torchvision"}
    status, _, err = evaluated(score_weights=other, **wrong)
    assert status == 2 and "expected the network 'torchvision' for dalle-coco-30k" in err
    doubtful = json.loads(evaluated(**wrong)[1])
    assert any("Inception score by the network 'fid' instead of 'torchvision'" in note for note in doubtful["notes"])


def test_on_cub_the_inception_score_is_said_to_be_no_published_one(coco, weights, tmp_path, capsys):
    pictures = f"folder:{coco / 'val2014'}"
    values = {"source": f"coco:{coco}", "weights": weights, "measure.pools": "fid", "measure.side": 32}
    values |= {"measure.blur": "(0.0,)", "measure.splits": 2}
    words = [f"--config.{key}={value}" for key, value in values.items()]
    out = tmp_path / "out"
    assert run("--config", "configs/evaluate.py:cub", "--pictures", pictures, "--out", out, "--json", *words) == 0
    assert report.CUB_SCORE in json.loads(capsys.readouterr().out)["notes"]
    table = (out / "report.md").read_text()
    assert f"- {report.CUB_SCORE}" in table and report.CUB in table
