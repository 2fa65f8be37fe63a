"""`dalle-jax demo`: all of DALL-E on built-in scenes, from nothing to images of captions it never saw.

Trains a tokenizer, an image tokenizer (a dVAE) and a transformer with the ordinary loop and the `demo` configs, chooses
a sampling temperature on tuning captions, draws each caption of the report once, and lets the scene checker judge the
pixels. Then it trains a CLIP, which chooses among 32 candidates for each caption. The report's captions are not used
before that.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax import model_dir, sharding
from dalle_jax.cli.export import export
from dalle_jax.cli.hooks import first_captions, sample_hook
from dalle_jax.data.sources import scenes
from dalle_jax.data.sources.scene_checker import accuracy, fault
from dalle_jax.errors import check_number, say, writing_to
from dalle_jax.evaluate.probe import by_clip
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.pictures.picture import Picture
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.autoregressive import Autoregressive
from dalle_jax.sample.image_tokenizer import ImageTokenizer
from dalle_jax.sample.pipeline import CLIP, Pipeline
from dalle_jax.sample.request import MAX_CANDIDATES, Request
from dalle_jax.sample.rerank import Reranker
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.train import compilation_cache
from dalle_jax.train.monitor import metrics
from dalle_jax.train.objectives import build_task
from dalle_jax.train.run import load_frozen, mesh_for, open_data, step_for, train
from dalle_jax.train.settings import TrainSettings, load_settings

REPORT_KEYS = {
    "one_object_accuracy": "one_seen",
    "one_object_unseen_accuracy": "one_unseen",
    "two_object_unseen_accuracy": "two_unseen_combination",
    "two_object_unseen_pair_accuracy": "two_unseen_pair",
    "two_object_unseen_relation_accuracy": "two_unseen_relation",
}
TUNED_ON = ("one_seen", "one_unseen", "two_unseen_combination")
TEMPERATURES = (1.1, 1.0, 0.9, 0.8)
TUNING_CAPTIONS = 192  # of each set, at each temperature: with 64 the choice is often one of the others
BEST_OF_TEMPERATURE = 1.0  # candidates should differ: the paper's
RANKED_SET = "two_unseen_combination"
TOKENIZER_CAPTIONS = 5_000
COLUMNS = 8  # of the sheets
SEEDS = {"tune": 0, "report": 1_000_000}  # part of the captions -> the first image seed

REST_SECONDS = 60.0  # for timing a step and drawing everything after the transformer, on a CPU half as fast as usual
CLIP_SECONDS = 65.0  # for training it
TIMED_STEPS = 12  # of which the first two compile
OVERHEAD = 1.08  # time of a training by that of its steps alone: validation, pictures, logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        default=pathlib.Path("demo"),
        metavar="DIR",
        help="folder for everything that is made; the same one goes on where it was stopped (default: demo)",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.75, metavar="M", help="time up to the first samples (default: 8.75)"
    )
    parser.add_argument("--captions", type=int, default=200, metavar="N", help="captions judged per set (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all trainings (default: 0)")
    parser.add_argument(
        "--best-of",
        type=int,
        default=32,
        metavar="N",
        help="train a CLIP that chooses among N candidates; 0 for none, two and a half minutes less (default: 32)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object (default: a summary)")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, the argument, ended a stage, which saved itself."""


def main(args: argparse.Namespace) -> int:
    """Write DIR/report.json, DIR/samples.png and the workdirs DIR/dvae and DIR/transformer; unless `--best-of` is 0
    also DIR/best.png and DIR/clip.

    Returns 0, or 128 + the signal that interrupted it; the same command then goes on.

    Raises:
      UserError: a number out of its range, or a workdir that cannot be written.
    """
    check_number("--minutes", args.minutes, above=0, max=10_000)
    check_number("--captions", args.captions, min=2, max=100_000)
    check_number("--seed", args.seed, min=0, max=2**32 - 1)
    check_number("--best-of", args.best_of, min=0, max=MAX_CANDIDATES)
    try:
        report = run(args)
    except Interrupted as interrupted:
        return 128 + interrupted.args[0]
    if args.json:
        print(json.dumps(report))
        return 0
    best = f", best of {args.best_of} {report['best_of']['two_object_unseen_accuracy']:.0%}" if args.best_of else ""
    print(
        f"right at first sample: one object {report['one_object_accuracy']:.0%}, "
        f"of a color and shape never seen together {report['one_object_unseen_accuracy']:.0%}, "
        f"two objects in an unseen combination {report['two_object_unseen_accuracy']:.0%}{best}; "
        f"{report['seconds']:.0f} s: {args.workdir / 'samples.png'}"
    )
    return 0


def run(args: argparse.Namespace) -> dict:
    """The whole demo; returns what it writes to report.json. A workdir of an earlier demo goes on where it was."""
    began, workdir, best_of = time.monotonic(), args.workdir, args.best_of
    stages = 6 if best_of else 4
    say(f"1/{stages} tokenizer from {TOKENIZER_CAPTIONS} captions")
    overrides = {"seed": args.seed, "tokenizer": make_tokenizer(workdir)}

    say(f"2/{stages} image tokenizer: pictures to image tokens and back")
    dvae_settings = load_settings("configs/dvae.py:demo", [f"--config.seed={args.seed}"])
    train_stage(dvae_settings, workdir / "dvae")

    folder, left = workdir / "transformer", 60 * args.minutes - (time.monotonic() - began) - REST_SECONDS
    more = overrides | {"frozen.image_tokenizer": workdir / "dvae"}
    settings = planned("configs/transformer.py:demo", more, folder, seconds=left)
    say(f"3/{stages} transformer: captions and image tokens")
    train_stage(settings, folder, hooks=[sample_hook(settings, folder)])

    say(f"4/{stages} pictures for captions it never saw")
    generator = Autoregressive.load(folder)
    report, drawn = judge(generator, args.captions)
    sheet([("", drawn[name][: 2 * COLUMNS]) for name in TUNED_ON]).save(workdir / "samples.png")
    steps = {"dvae": dvae_settings.run.steps, "transformer": settings.run.steps}
    parameters = {"dvae": generator.image_tokenizer.model.num_params, "transformer": generator.model.num_params}
    if best_of:
        say(f"5/{stages} CLIP: which caption belongs to which picture")
        clip_settings = planned("configs/clip.py:demo", overrides, workdir / "clip", seconds=CLIP_SECONDS)
        train_stage(clip_settings, workdir / "clip")
        export(workdir / "clip", folder / CLIP)  # where `Pipeline.load` looks for it
        say(f"6/{stages} the best of {best_of} candidates")
        reranker = Reranker.load(folder / CLIP)
        report["best_of"], best = judge_best(Pipeline(generator, reranker), best_of, args.captions)
        report["by_clip_features"] = judge_by_clip(reranker, drawn, args.captions)
        steps["clip"], parameters["clip"] = clip_settings.run.steps, reranker.model.num_params
        rows = (("first: ", drawn[RANKED_SET]), (f"best of {best_of}: ", best))
        parts = [(title, pictures[i : i + COLUMNS]) for i in (0, COLUMNS) for title, pictures in rows]
        sheet(parts).save(workdir / "best.png")
    report |= {
        "captions_each": args.captions,
        "seed": args.seed,
        "steps": steps,
        "bits_per_image_token": metrics.read(folder / "metrics.jsonl")[-1].get("validation/bits_per_image_token"),
        "parameters": parameters,
        "checkpoint": generator.digest,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - began,
    }
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def train_stage(settings: TrainSettings, workdir: pathlib.Path, **options) -> None:
    """Train a model; raises Interrupted if somebody stopped it."""
    result = train(settings, workdir, **options)
    if result.signal:
        raise Interrupted(result.signal)


def make_tokenizer(workdir: pathlib.Path) -> pathlib.Path:
    """Train tokenizer.model on training captions unless it is there.

    Raises:
      UserError: the workdir cannot be written.
    """
    settings = load_settings("configs/transformer.py:demo")
    assert isinstance(settings.model, TransformerConfig)
    file = workdir / "tokenizer.model"
    with writing_to(workdir, "workdir"):
        if not file.exists():
            captions = first_captions(settings.run.data.train or "", TOKENIZER_CAPTIONS)
            BPETokenizer.train(captions, vocab_size=settings.model.text_vocab).save(file)
    return file


def planned(file: str, overrides: dict, workdir: pathlib.Path, *, seconds: float) -> TrainSettings:
    """The settings with as many steps as fit into this time, at most their number; a training that has begun keeps its
    number."""
    settings = load_settings(file, [f"--config.{key}={value}" for key, value in overrides.items()])
    max_steps = settings.run.steps
    if (workdir / model_dir.CONFIG).exists():
        steps = model_dir.read_config(workdir)["run"]["steps"]
    else:
        with compilation_cache.kept(workdir):  # the training reads the program of its step back
            each = time_step(settings)
        steps = int(np.clip(seconds / (each * OVERHEAD), max_steps // 10, max_steps))
    if steps < max_steps:
        say(f"    this machine makes {steps} of {max_steps} steps in the time that is left")
    return settings.changed({"run.steps": steps})


def time_step(settings: TrainSettings) -> float:
    """Seconds from one step to the next on this machine, the median of a few after compiling.

    As in training, each batch is made while the step before it runs.
    """
    frozen = load_frozen(settings, pathlib.Path())
    task = build_task(settings, frozen)
    mesh = mesh_for(settings, task)
    step = step_for(settings, task, mesh)
    state, on_devices = step.init(jax.random.key(0)), jax.device_put(task.frozen, sharding.replicated(mesh))
    batches, _ = open_data(settings, mesh, tokenizer=BPETokenizer.load(str(settings.tokenizer)), frozen=frozen)
    seconds, running = [], None
    for _ in range(TIMED_STEPS):
        began = time.perf_counter()
        batch = sharding.shard_batch(next(batches), mesh)
        jax.block_until_ready(running)
        state, running = step.update(state, on_devices, batch, jax.random.key(1))
        seconds.append(time.perf_counter() - began)
    batches.close()
    return float(np.median(seconds[2:]))


def draw(pipe: Pipeline, name: str, *, part: str, count: int, spacing: int = 1, **settings) -> list[Picture]:
    """The first of the images for each caption of a set. spacing: of the captions' seeds. settings: of `Request`."""
    requests = [
        Request(caption, seed=SEEDS[part] + spacing * i, **settings)
        for i, (caption, _) in enumerate(scenes.captions(name, part, count))
    ]
    return [pictures[0] for pictures in pipe.draw(requests)]


def is_right(picture: Picture) -> bool:
    """Whether a picture shows the scene that its caption describes."""
    scene = scenes.parse(picture.caption)
    return scene is not None and not fault(np.asarray(picture), scene)


def share_right(pictures: Sequence[Picture]) -> float:
    return float(np.mean([is_right(picture) for picture in pictures]))


def choose_temperature(pipe: Pipeline) -> float:
    """The temperature with the best mean accuracy on the tuning captions."""
    scores = {}
    for temperature in TEMPERATURES:
        options = {"temperature": temperature}
        sets = [draw(pipe, n, part="tune", count=TUNING_CAPTIONS, options=options) for n in TUNED_ON]
        scores[temperature] = float(np.mean([share_right(pictures) for pictures in sets]))
    say("    temperature: right on tuning captions " + ", ".join(f"{t}: {s:.0%}" for t, s in scores.items()))
    return max(scores, key=lambda temperature: scores[temperature])


def judge(generator: Autoregressive, count: int) -> tuple[dict[str, Any], dict[str, list[Picture]]]:
    """Accuracies of the report's sets at the chosen temperature and of the image tokenizer; and the sets as drawn."""
    pipe = Pipeline(generator)
    temperature = choose_temperature(pipe)
    options = {"temperature": temperature}
    drawn = {n: draw(pipe, n, part="report", count=count, options=options) for n in REPORT_KEYS.values()}
    accuracies = {key: share_right(drawn[name]) for key, name in REPORT_KEYS.items()}
    return {
        "temperature": temperature,
        **accuracies,
        "dvae": judge_image_tokenizer(generator.image_tokenizer, count),
    }, drawn


def judge_best(pipe: Pipeline, best_of: int, count: int) -> tuple[dict[str, Any], list[Picture]]:
    """Accuracies of the first candidate and of CLIP's choice of `best_of` on two-object captions, and that choice."""
    of_all: dict[str, Any] = dict(part="report", count=count, options={"temperature": BEST_OF_TEMPERATURE})
    first, best = (draw(pipe, RANKED_SET, best_of=n, spacing=best_of, **of_all) for n in (None, best_of))
    return {
        "candidates": best_of,
        "temperature": BEST_OF_TEMPERATURE,
        "first_candidate_accuracy": share_right(first),
        "two_object_unseen_accuracy": share_right(best),
    }, best


def judge_by_clip(reranker: Reranker, drawn: Mapping[str, list[Picture]], count: int) -> dict[str, Any]:
    """FID and CLIP score of the first samples against true images of the same captions, which training never has."""
    pictures = list(itertools.chain.from_iterable(drawn.values()))
    real = [scenes.true_pictures(name, "report", count, image_size=pictures[0].width) for name in drawn]
    images, captions = [np.asarray(picture) for picture in pictures], [picture.caption for picture in pictures]
    return by_clip(reranker, images, captions, list(np.concatenate(real)))


def judge_image_tokenizer(image_tokenizer: ImageTokenizer, count: int) -> dict[str, float]:
    """Share of true images that still show their caption after encoding and decoding, and of the codebook in use."""
    sets = {"seen": "one_seen", "unseen": "one_unseen", "two_object_unseen": RANKED_SET}
    scores, used = {}, set()
    for key, name in sets.items():
        images = scenes.true_pictures(name, "report", count, image_size=image_tokenizer.image_size)
        described = [scene for _, scene in scenes.captions(name, "report", count)]
        tokens_BRC = image_tokenizer.encode(images)
        used.update(map(int, tokens_BRC.flat))
        scores[f"{key}_accuracy"] = accuracy(image_tokenizer.decode(tokens_BRC), described)
    return {**scores, "codes_used_share": len(used) / image_tokenizer.vocab_size}


def sheet(rows: Sequence[tuple[str, Sequence[Picture]]]) -> Image.Image:
    """Rows of pictures, with a title before their captions, framed green or red as the checker judges them."""
    pictures = [picture for _, row in rows for picture in row]
    captions = [title + picture.caption for title, row in rows for picture in row]
    images = [np.asarray(picture) for picture in pictures]
    return contact_sheet(images, captions, columns=COLUMNS, marks=[is_right(picture) for picture in pictures])
