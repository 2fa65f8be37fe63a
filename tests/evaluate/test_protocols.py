"""A whole protocol on a miniature MS-COCO: captions chosen, pictures drawn, killed, resumed, scored and repeated."""

import io
import json
import os
import shutil
import threading
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax import config, files, model_dir
from dalle_jax.cli.evaluate import OTHER_KEYS, evaluate
from dalle_jax.data.share import Share
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import drawing, feature_cache
from dalle_jax.evaluate.drawing import Drawing, Plan
from dalle_jax.evaluate.protocol import Draw, Evaluation
from dalle_jax.evaluate.report import PUBLISHED_WARNING, table
from dalle_jax.evaluate.run import _warnings
from dalle_jax.evaluate.workers import Worker
from dalle_jax.sample.pipeline import Pipeline
from tests.support import processes
from tests.support.evaluation import IMAGES, make_coco, run
from tests.support.stand_in_server import NoisePipeline

DRAWN, SHARD, BEST_OF = 10, 4, 2


@pytest.fixture(scope="module")
def words(model, coco, weights):
    """The command line of a small `coco`, without --out."""
    values = {
        "source": f"coco:{coco}", "weights": weights, "clip": model / "clip", "draw.count": DRAWN,
        "draw.best_of": BEST_OF, "draw.shard_size": SHARD, "reference_exactly": IMAGES, "measure.pools": "fid",
        "measure.side": 32, "measure.blur": "(0.0,2.0)", "measure.splits": 2, "measure.candidates": 3,
    }  # fmt: skip
    return ["--config", "configs/evaluate.py:coco", *(f"--config.{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module", autouse=True)
def small_parts(tmp_path_factory):
    """Parts of five rows and calls of three captions, so that a dozen pictures have several of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "PART", 5)
        patch.setattr(Pipeline, "captions_per_batch", lambda pipe, request: 3)
        patch.setenv("DALLE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def straight(model, words, tmp_path_factory):
    """OUT of the job that nobody stopped, and its report."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert run(model, *words, "--out", out, "--json") == 0
    return out, json.loads((out / "report.json").read_text())


def shards(out):
    return {path.name: path.read_bytes() for path in sorted((out / "pictures").iterdir()) if path.is_file()}


def test_captions_that_are_cut_are_counted():
    plan = Plan(["a", "b"], ["a star", "a red star " * 5], {}, {}, 2)  # the stand-in reads twelve words
    metrics = types.SimpleNamespace(crops=("none", "none"), features="inception")
    inputs = types.SimpleNamespace(
        images=Drawing(NoisePipeline(), Draw(), "coco"), clip=None, evaluation=types.SimpleNamespace(measure=metrics)
    )
    found = types.SimpleNamespace(dropped={}, rows=[])
    assert _warnings(inputs, plan, found, None) == ["1 of 2 captions are longer than the model reads, and cut there"]


def test_the_job_leaves_shards_a_report_a_table_and_a_curve(straight, model, coco):
    out, report = straight
    kept = {"blur.png", "pictures", "plan.json", "report.json", "report.md"}
    assert {path.name for path in out.iterdir()} == kept
    assert list(shards(out)) == ["00000.tar", "00001.tar", "00002.tar"]
    assert report["protocol"] == "dalle-coco-30k" and report["resize"] == "dm-gan"
    assert report["pictures"]["count"] == DRAWN and report["reference"]["count"] == IMAGES
    assert report["reference"]["sizes"] == {"40x40": 6, "48x40": 6} and report["pictures"]["sizes"] == {"16x16": DRAWN}
    assert [row["radius"] for row in report["blur"]] == [0.0, 2.0]
    for row in report["blur"]:
        assert {"fid", "inception_score", "kid", "precision", "recall"} <= row.keys() and row["fid"] > 0
    assert 0 <= report["scores"]["clip_score"] <= 2.5 and report["scores"]["r_precision_candidates"] == 3
    assert "clip_score" not in report["blur"][1]
    assert any("has also chosen the pictures" in note for note in report["notes"])

    page = (out / "report.md").read_text()
    assert PUBLISHED_WARNING in page and "| DALL-E | 27.5 | 28 | 45.5 | 83.5 | 85 | 17.9 |" in page
    assert f"| 2 | {report['blur'][1]['fid']:.4f} |" in page
    assert f"the best of 2 each by CLIP {report['drawn']['ranked_by'][:12]}, seed 0." in page
    assert "not dalle-coco-30k as it is: draw.best_of 2 instead of 512; draw.count 10 instead of 30000; " in page
    alone = {**report, "drawn": {**report["drawn"], "ranked_by": None}}
    assert f"Drawn by checkpoint {report['drawn']['checkpoint'][:12]}, seed 0." in table(alone)
    free = ("source", "weights", "clip", "shard_size")
    assert not any(name in " ".join(report["evaluation"]["departures"]) for name in free)
    assert Image.open(out / "blur.png").width > 500


def test_pictures_say_how_they_were_made(straight, model, coco):
    out, report = straight
    plan = drawing.load(out / "plan.json")
    known = {
        f"{record.key}#{number}": text
        for record in map(open_source(f"coco:{coco}").__getitem__, range(IMAGES))
        for number, text in enumerate(record.captions)
    }
    assert len(set(plan.ids)) == DRAWN and [known[i] for i in plan.ids] == plan.captions
    assert report["drawn"]["seeds"] == {caption_id: BEST_OF * i for i, caption_id in enumerate(plan.ids)}
    source = open_source(f"wds:{out}/pictures/*.tar")
    pipe = Pipeline.load(model)
    for index in range(len(source)):
        record = source[index]
        assert record.captions == (plan.captions[index],)
        picture = Image.open(io.BytesIO(record.image))
        assert picture.info["caption"] == plan.captions[index]
        seed = int(picture.info["seed"])
        assert seed in (BEST_OF * index, BEST_OF * index + 1) and -1 <= float(picture.info["score"]) <= 1
        settings = json.loads(picture.info["settings"])
        assert settings["best_of"] == BEST_OF and settings["checkpoint"] == report["drawn"]["checkpoint"] == pipe.digest
        if index == 5:  # any of them can be drawn again by itself
            again = pipe(plan.captions[index], best_of=BEST_OF, seed=BEST_OF * index)[0]
            np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))


def test_a_model_that_devices_share_draws_the_same_pictures(straight, model, words, tmp_path, capsys):
    assert run(model, *words, "--tensor", 3, "--out", tmp_path / "out") == 2
    assert "tensor must divide the 8 device" in capsys.readouterr().err
    plan = drawing.load(straight[0] / "plan.json")
    shared = Drawing.load(str(model), Draw(**plan.settings["draw"]), "", tensor=2)
    assert dict(shared.pipe.generator.engine.mesh.shape)["tensor"] == 2
    shared.draw_all(plan, tmp_path, Worker())
    assert shards(tmp_path) == shards(straight[0])


class Killed(BaseException):
    """Leaves no chance to clean up, like SIGKILL."""


def test_a_killed_job_goes_on_and_draws_no_picture_twice(straight, model, words, tmp_path, monkeypatch):
    """Killed in the second shard with bytes of the next picture written: the same shards, bit for bit."""
    out, drawn = tmp_path / "out [v2] {a,b}", []
    draw, write, finished = Pipeline.draw, files.write, straight[0]
    parts = out / "pictures" / ".00001.tar.parts"

    def drawing_some(self, requests, **more):
        drawn.extend(request.seed for request in requests)
        return draw(self, requests, **more)

    def killed_in_the_third(path, data):
        write(path, data)
        if path == parts / "000000006.part":
            (parts / ".000000007.part.0a1b2c3d").write_bytes(data[:700])
            raise Killed

    monkeypatch.setattr(Pipeline, "draw", drawing_some)
    monkeypatch.setattr(files, "write", killed_in_the_third)
    with pytest.raises(Killed):
        run(model, *words, "--out", out, "--json")
    assert list(shards(out)) == ["00000.tar"] and parts.is_dir() and len(drawn) == SHARD + 3
    monkeypatch.setattr(files, "write", write)
    assert run(model, *words, "--out", out, "--json") == 0
    assert sorted(drawn) == [BEST_OF * i for i in range(DRAWN)]
    assert shards(out) == shards(finished) and not parts.exists()
    report = json.loads((out / "report.json").read_text())
    assert report["blur"] == straight[1]["blur"]


def test_an_interrupt_says_what_is_kept(model, words, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    assert run(model, *words, "--out", tmp_path) == 130
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0].endswith(f"is kept in {tmp_path}: the same command goes on with it") and "interrupted" in said[1]


def test_a_report_repeats_itself_and_says_what_has_changed(straight, model, words, coco, weights, tmp_path, capsys):
    out, report = straight
    again = ("--config", out / "report.json", "--out", tmp_path / "again", "--json")
    assert run(model, *again) == 0
    printed, err = capsys.readouterr()
    assert "every score is the same" in err
    repeated = json.loads(printed)
    assert repeated["blur"] == report["blur"] and repeated["repeats"]["differences"] == {}

    refused = {
        "expected only new places": ("--config.draw.count=3",),
        "expected another --out": ("--out", out),
        "expected --config.pictures=SOURCE to repeat": ("--pictures", coco),
    }
    for message, more in refused.items():
        assert run(model, *again, *more) == 2
        assert message in capsys.readouterr().err
    old = {**report, "evaluation": {**report["evaluation"], "count": 0}, "versions": {"dalle-jax": "0.1.0"}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert run(model, "--config", tmp_path / "old.json") == 2
    assert "old.json is of dalle-jax 0.1.0, which can repeat it; here expected count" in capsys.readouterr().err
    moved = tmp_path / "coco"
    shutil.copytree(coco, moved)
    name = moved / "val2014" / "COCO_val2014_000000000009.jpg"
    Image.open(name).transpose(Image.Transpose.ROTATE_90).save(name)
    elsewhere = ("--config", out / "report.json", "--out", tmp_path / "moved", f"--config.source=coco:{moved}")
    assert run(model, *elsewhere) == 2
    assert "expected the pictures of the reference of" in capsys.readouterr().err
    annotations = moved / "annotations" / "captions_val2014.json"
    annotations.write_text(annotations.read_text().replace(' 1"', ' one"'))
    assert run(model, *elsewhere, "--out", tmp_path / "words") == 2
    assert "expected the captions of the source of" in capsys.readouterr().err
    dvae = tmp_path / "transformer"
    shutil.copytree(model, dvae)
    trained = model_dir.load(dvae / "image_tokenizer")
    model_dir.save(dvae / "image_tokenizer", trained.config, jax.tree.map(lambda x: 2 * x, trained.params))
    assert run(dvae, *again, "--out", tmp_path / "other") == 2
    assert "expected the checkpoint that draws of" in capsys.readouterr().err


def test_two_processes_give_the_bits_of_one(straight, model, words, tmp_path):
    """Two workers in one folder, here in threads: what they share is the folder alone."""
    values = config.load(words[1], words[2:]).to_dict()
    evaluation = Evaluation.from_json({k: v for k, v in values.items() if k not in OTHER_KEYS}, where="here")
    made, drawn, together = {}, {0: 0, 1: 0}, threading.Barrier(2)

    def work(index):
        worker = Worker(Share(index, 2), meet=lambda: together.wait(60))
        made[index] = evaluate(evaluation, model=str(model), out=tmp_path, worker=worker)

    draw_all = Drawing.draw_all

    def counted(self, plan, out, worker):
        drawn[worker.share.index] = len(range(3)[worker.share.slice])
        return draw_all(self, plan, out, worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "draw_all", counted)
        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join(120) for thread in threads]
    assert drawn == {0: 2, 1: 1} and made[1] is None
    assert shards(tmp_path) == shards(straight[0])
    assert made[0]["blur"] == straight[1]["blur"] and not (tmp_path / "features").exists()


@pytest.mark.slow
def test_two_real_processes_give_the_bits_of_one(straight, model, words, tmp_path):
    out = tmp_path / "out"
    started = processes.start("evaluate_driver", tmp_path, 2, model, *words, "--out", out, devices=8)
    assert processes.statuses(started) == [0, 0], [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert shards(out) == shards(straight[0])
    assert json.loads((out / "report.json").read_text())["blur"] == straight[1]["blur"]
    assert "00001.tar of 3 shards" in (tmp_path / "1.log").read_text()


@pytest.mark.slow
def test_a_process_that_is_really_killed_goes_on(straight, model, words, tmp_path):
    out = tmp_path / "out"
    parts = out / "pictures" / ".00001.tar.parts"
    (started,) = processes.start("evaluate_driver", tmp_path, 1, model, *words, "--out", out, devices=8)
    until = time.monotonic() + 120
    while not list(parts.glob("*.part")) and time.monotonic() < until:
        time.sleep(0.02)
    started.kill()
    started.wait()
    assert list(shards(out)) == ["00000.tar"] and parts.is_dir()
    times = {path.name: path.stat().st_mtime_ns for path in (out / "pictures").glob("*.tar")}
    assert run(model, *words, "--out", out, "--json") == 0
    assert shards(out) == shards(straight[0])
    assert all((out / "pictures" / name).stat().st_mtime_ns == when for name, when in times.items())


def test_given_pictures_score_as_drawn_ones_and_near_duplicates_are_found_and_removed(
    straight, words, coco, tmp_path, capsys
):
    out, report = straight
    training = tmp_path / "training"
    training.mkdir()
    for i, name in ((2, b"2.jpg"), (5, b"5.jpg"), (9, b"9 caf\xe9.jpg")):  # the last is no UTF-8
        shutil.copy(coco / "val2014" / f"COCO_val2014_{i + 7:012d}.jpg", training / os.fsdecode(name))
    more = (f"--config.overlap.source=folder:{training}", "--config.overlap.min_cosine=0.99999")
    words = [word for word in words if "blur" not in word]  # a second tuple would be joined to the first
    common = ("--pictures", f"wds:{out}/pictures/*.tar", *words, *more, "--json", "--config.measure.blur=(0.0,)")
    assert run(*common, "--out", tmp_path / "found") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blur"][0] == report["blur"][0] and "drawn" not in found
    assert found["pictures"]["sha256"] == report["pictures"]["sha256"]
    closest = found["overlap"]["closest"][:3]
    assert found["overlap"]["duplicates"] == 3 and found["overlap"]["share"] == 3 / IMAGES
    assert {(pair["reference"][-6:-4], pair["training"]) for pair in closest} == {
        ("09", "2.jpg"), ("12", "5.jpg"), ("16", "9 caf\udce9.jpg"),
    }  # fmt: skip
    assert found["reference"]["count"] == IMAGES and found["scores"]["fid"] == report["scores"]["fid"]
    assert Image.open(tmp_path / "found" / "overlap.png").width > 500
    page = (tmp_path / "found" / "report.md").read_text()
    assert f"3 pictures of the reference (25.0%) have one of folder:{training} at a cosine of 0.99999" in page
    assert run(*common, "--out", tmp_path / "removed", "--config.overlap.remove=True") == 0
    removed = json.loads(capsys.readouterr().out)
    assert removed["reference"]["count"] == sum(removed["reference"]["sizes"].values()) == IMAGES - 3
    assert removed["scores"]["fid"] != report["scores"]["fid"]


def test_what_is_wrong_with_a_protocol_is_one_line(straight, model, words, coco, tmp_path, capsys):
    out, _ = straight
    empty = make_coco(tmp_path / "blank", captions_too=False)
    torn = tmp_path / "torn"
    shutil.copytree(coco, torn)
    (torn / "val2014" / "COCO_val2014_000000000010.jpg").unlink()
    (torn / "val2014" / "COCO_val2014_000000000011.jpg").write_bytes(b"x" * 300)
    parts = tmp_path / "parts"
    shutil.copytree(coco, parts)
    shutil.rmtree(parts / "val2014")
    wrong = {
        f"--config.source=coco:{empty}": "expected 10 captions in",
        f"--config.source=coco:{torn}": "got 10 (1 x no image, 1 x not an image): complete it",
        f"--config.source=coco:{parts}": f"unpacked in {parts}, got it without val2014/ (val2014.zip holds it)",
        f"--config.source=coco:{tmp_path}": "without annotations/captions_val2014.json (annotations_trainval2014.zip",
        "--config.draw.count=25": "expected 25 captions in",
        "--config.draw.seed=4294967290": "expected seed to be",
        "--config.draw.temperature=-1.0": "expected temperature to be",
        "--config.reference_exactly=40504": "expected 40504 pictures in",
    }
    for number, (word, message) in enumerate(wrong.items()):
        assert run(model, *words, word, "--out", tmp_path / str(number)) == 2, word
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert run("--pictures", f"wds:{out}/pictures/*.tar", *words, "--config.draw.count=11", "--out", tmp_path) == 2
    assert "got a count of 11: give more pictures" in capsys.readouterr().err
    assert run("--pictures", f"wds:{out}/pictures/*.tar", *words, "--out", out) == 2
    assert "holds an evaluation that draws its pictures" in capsys.readouterr().err
    more = tmp_path / "more"
    shutil.copytree(out, more)
    shutil.copy(more / "pictures" / "00000.tar", more / "pictures" / "00009.tar")
    assert run(model, *words, "--out", more) == 2
    assert f"expected the {DRAWN} drawn pictures in" in capsys.readouterr().err.splitlines()[-1]
    for word in ("--config.draw.temperature=0.5", "--config.draw.count=9"):
        assert run(model, *words, word, "--out", out) == 2
        assert "holds the pictures of another evaluation (draw." in capsys.readouterr().err


def test_broken_weights_are_found_before_a_picture_is_drawn(model, words, weights, tmp_path, monkeypatch, capsys):
    found = model_dir.load(weights)
    config, params = found.config, found.params
    model_dir.save(tmp_path / "nan", config, jax.tree.map(lambda x: x * np.nan, params))
    monkeypatch.setattr(Pipeline, "draw", lambda *_: pytest.fail("drew"))
    assert run(model, *words, f"--config.weights={tmp_path / 'nan'}", "--out", tmp_path / "out") == 2
    assert "expected finite features" in capsys.readouterr().err
