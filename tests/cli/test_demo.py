"""`dalle-jax demo` from end to end with a handful of updates: every part runs and the report is complete."""

import json

import pytest
from PIL import Image

from dalle_jax.cli import demo, main

FEW = [
    "--config.run.steps=3",
    "--config.batch_size=16",
    "--config.run.validation_batches=1",
    "--config.run.picture_every=3",
    "--config.optimizer.schedule.warmup_steps=0",
]
SHALLOW = {  # most of the test's time is the compiler's
    "configs/transformer.py:demo": ["--config.model.num_layers=2"],
    "configs/clip.py:demo": ["--config.model.image_layers=1", "--config.model.text_layers=1"],
}


def few(load):
    """`load_settings` for a handful of updates of models of few layers."""
    return lambda spec, words=(): load(spec, [*words, *FEW, *SHALLOW.get(spec, ())])


@pytest.mark.parametrize("best_of", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_demo_writes_report_sheets_and_workdirs(best_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_settings", few(demo.load_settings))
    monkeypatch.setattr(demo, "TOKENIZER_CAPTIONS", 500)
    monkeypatch.setattr(demo, "TEMPERATURES", (1.0, 0.5))
    monkeypatch.setattr(demo, "TUNING_CAPTIONS", 2)
    monkeypatch.setattr(demo, "TIMED_STEPS", 4)
    workdir = tmp_path / "demo"
    words = ["demo", "--workdir", str(workdir), "--captions", "6", "--json", "--best-of", str(best_of)]
    assert main.main(words) == 0
    report = json.loads((workdir / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    for key in demo.REPORT_KEYS:
        assert 0 <= report[key] <= 1
    assert report["one_object_accuracy"] < 0.5  # three updates cannot have learned it
    assert report["temperature"] in (1.0, 0.5) and report["seconds"] > 0
    assert Image.open(workdir / "samples.png").width > 500
    for part in ("dvae", "transformer"):
        assert (workdir / part / "curves.png").exists()
        assert list((workdir / part / "pictures").glob("*.png"))
    assert ("best_of" in report) == (workdir / "best.png").exists() == bool(best_of)
    if best_of:
        assert report["best_of"]["candidates"] == 4 and 0 <= report["best_of"]["two_object_unseen_accuracy"] <= 1
        by_clip = report["by_clip_features"]
        assert by_clip["clip_fid"] > 0 and 0 <= by_clip["clip_score"] <= 2.5 and "not Inception" in by_clip["note"]
        assert by_clip["pictures"] == by_clip["reference"] == 6 * len(demo.REPORT_KEYS)
        assert report["steps"] == {"dvae": 3, "clip": 3, "transformer": 3}


def test_updates_follow_the_speed_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "time_step", lambda settings: 0.25)
    monkeypatch.setattr(demo, "OVERHEAD", 1.25)

    def plan(seconds, steps=1000):
        planned = demo.planned("configs/transformer.py:demo", {"run.steps": steps}, tmp_path, seconds=seconds)
        return planned.run.steps

    assert plan(100.0) == 320
    assert plan(1e6) == 1000
    assert plan(-100.0) == 100  # a demo that cannot keep its time still trains a little
    (tmp_path / "config.json").write_text(json.dumps({"name": "transformer", "model": {}, "run": {"steps": 77}}))
    assert plan(100.0) == 77  # a training that has begun keeps its number


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TOKENIZER_CAPTIONS", 500)
    (tmp_path / "file").write_text("")
    assert main.main(["demo", "--workdir", str(tmp_path / "file" / "demo")]) == 2
    assert "error: expected a workdir to write to" in capsys.readouterr().err


def test_an_interrupted_stage_ends_the_demo(tmp_path, monkeypatch):
    """SIGTERM while the dVAE trains: exit status 143, and no transformer is begun."""
    monkeypatch.setattr(demo, "load_settings", few(demo.load_settings))
    monkeypatch.setattr(demo, "TOKENIZER_CAPTIONS", 500)
    begun = []

    def train(settings, workdir, **options):
        begun.append(settings.name)
        return type("Result", (), {"signal": 15})

    monkeypatch.setattr(demo, "train", train)
    assert main.main(["demo", "--workdir", str(tmp_path)]) == 143
    assert begun == ["dvae"]
