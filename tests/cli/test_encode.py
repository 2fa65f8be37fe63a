"""Codes made once: the same training as on pictures, whatever kills the encoding, and no other dVAE by mistake."""

import collections
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from concurrent import futures

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax import files, model_dir
from dalle_jax.checkpoint import reader
from dalle_jax.cli import main
from dalle_jax.data import transforms
from dalle_jax.data.decode import decode_image
from dalle_jax.data.pipeline import Batches, DataConfig, Prepare, Reading
from dalle_jax.data.record import Dropped, Encoded
from dalle_jax.data.sources import features, open_source
from dalle_jax.errors import UserError
from dalle_jax.layout import Layout
from dalle_jax.models import build
from dalle_jax.models.dvae import encode_images
from dalle_jax.preflight import flops, hardware
from dalle_jax.preflight.job import Job
from dalle_jax.preflight.topology import Topology
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.text.bpe import BPETokenizer
from dalle_jax.train import run
from dalle_jax.train.monitor import metrics
from tests.support import ROOT, processes
from tests.support.demo_settings import demo_settings

PICTURES, SIDE, VOCAB, GRID = 21, 16, 12, 4
DVAE = {"image_size": SIDE, "vocab": VOCAB, "width": 8, "groups": 2, "blocks_per_group": 1, "stem": 8, "patch": 2}
TRANSFORMER = {
    "run.steps": 4, "batch_size": 8, "run.log_every": 2, "run.validate_every": 4, "run.picture_every": None,
    "run.checkpoint_every": 2,
    "model.num_layers": 2, "model.width": 16, "model.heads": 2, "model.head_size": 8, "model.text_len": 24,
    "model.grid": GRID, "model.image_vocab": VOCAB, "model.text_vocab": 320, "data.image_size": SIDE,
    "run.data.threads": 0,
    "data.bpe_dropout": 0.3, "data.caption_dropout": 0.2, "run.data.max_bad_share": 0.5,
    "run.mesh.replica": None, "run.mesh.fsdp": 1, "optimizer.name": "adamw",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of one colour and some noise with two captions each, one small, three that are broken.

    The names of the fifth are no UTF-8.
    """
    path, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(PICTURES):
        size = (10, 30, 3) if index == 2 else (24, 40, 3)
        pixels = rng.integers(0, 256, 3) + rng.normal(0, 60, size)
        name = os.fsdecode(b"04 caf\xe9" if index == 4 else b"%02d" % index)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"picture number {index} of many\nanother text for {index}\n")
    (path / "07.png").write_bytes(b"no picture")
    (path / "08.png").write_bytes((path / "09.png").read_bytes()[:300])
    (path / "10.txt").write_text(" \n")
    return path


def save_dvae(path, seed=1):
    model = build("dvae", DVAE)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    noise = np.random.default_rng(seed).normal(0, 0.5, max(x.size for x in jax.tree.leaves(params))).astype(np.float32)
    params = jax.tree.map(lambda x: x + noise[: x.size].reshape(x.shape), params)
    model_dir.save(path, {"name": "dvae", "model": DVAE}, params)
    return path


@pytest.fixture(scope="module")
def dvae(tmp_path_factory):
    return save_dvae(tmp_path_factory.mktemp("dvae"))


@pytest.fixture(scope="module")
def tokenizer(folder, tmp_path_factory):
    captions = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    return BPETokenizer.train(captions, vocab_size=320).save(tmp_path_factory.mktemp("tokenizer"))


def encoded(folder, dvae, out, **options) -> int:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not True]
    words += [f"--{name}" for name, value in options.items() if value is True]
    return main.main(["encode", f"folder:{folder}", f"--dvae={dvae}", f"--out={out}", "--threads=2", *words])


@pytest.fixture(scope="module")
def center(folder, dvae, tmp_path_factory):
    """One center crop each, in shards of 5."""
    out = tmp_path_factory.mktemp("tokens") / "center"
    assert encoded(folder, dvae, out, augment="center", shard_records=5, batch_size=4) == 0
    return out


@pytest.fixture(scope="module")
def crops(folder, dvae, tmp_path_factory):
    """Four of the paper's crops each."""
    out = tmp_path_factory.mktemp("tokens") / "crops"
    assert encoded(folder, dvae, out, augmentations=4, shard_records=8, batch_size=12, seed=5) == 0
    return out


def encode_here(dvae, pictures):
    found = model_dir.load(dvae)
    config, params = found.config, found.params
    tokens_BRC = encode_images(build("dvae", config["model"]), params, np.stack(pictures))
    return np.asarray(tokens_BRC).reshape(len(pictures), -1)


def test_every_slot_is_the_sources_own(folder, dvae, center):
    source, codes = open_source(f"folder:{folder}"), open_source(f"tokens:{center}", pictures_required=False)
    codes = pickle.loads(pickle.dumps(codes))
    assert len(codes) == len(source) == PICTURES and len(list(center.glob("*.safetensors"))) == 5
    dropped, pictures, found = collections.Counter(), [], []
    for record, slot in zip(source, codes, strict=True):
        assert slot.key == record.key
        if isinstance(slot, Dropped):
            dropped[slot.reason] += 1
            continue
        image = decode_image(record.image)
        assert (slot.height, slot.width, slot.captions) == (*image.shape[:2], record.captions)
        assert slot.tokens_AI.shape == (1, GRID**2) and slot.tokens_AI.dtype == np.uint16
        pictures.append(transforms.center_crop(image, SIDE))
        found.append(slot.tokens_AI[0])
    assert dropped == {"not an image": 1, "truncated image": 1, "empty caption": 1}
    # Were all codes the same, their equality would say nothing.
    assert len(np.unique(found)) >= 4 and len({codes.tobytes() for codes in found}) == len(found)
    np.testing.assert_array_equal(found, encode_here(dvae, pictures))
    with pytest.raises(IndexError):
        codes[PICTURES]


def settings_of(dvae, tokenizer, source, **values):
    sources = {"run.data.train": source, "run.data.validation": source}
    return TRANSFORMER | sources | {"frozen.image_tokenizer": dvae, "tokenizer": tokenizer} | values


def train(workdir, dvae, tokenizer, source, **values):
    values = settings_of(dvae, tokenizer, source, **values)
    return run.train(demo_settings("transformer", values), workdir, progress=False)


@pytest.fixture(scope="module")
def trained(folder, dvae, tokenizer, center, tmp_path_factory):
    """Workdirs of the same training on pictures and on their codes. These are two programs, and of the emitters of XLA
    those that users get give both the same bits, the quick ones for tests do not."""
    sources = {"pictures": f"folder:{folder}", "codes": f"tokens:{center}"}
    places = {kind: tmp_path_factory.mktemp("runs") / kind for kind in sources}
    started = []
    for kind, source in sources.items():
        words = [f"--config.{key}={value}" for key, value in settings_of(dvae, tokenizer, source).items()]
        command = [sys.executable, "-m", "dalle_jax.cli", "train", "--config", "configs/transformer.py:demo"]
        command += [*words, "--config.optimizer.schedule.warmup_steps=4", "--workdir", str(places[kind])]
        started.append(
            subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}, cwd=ROOT)
        )
    assert processes.statuses(started) == [0, 0]
    return places


def test_training_on_codes_is_training_on_pictures_bit_for_bit(trained, capsys):
    places = trained
    digests = [reader.state_digests(reader.checkpoint_path(place, step=4)[1]) for place in places.values()]
    assert digests[0] == digests[1] and {"params", "state"} <= digests[0].keys()
    losses = [metrics.read(place / "metrics.jsonl")[-1]["validation/loss"] for place in places.values()]
    assert losses[0] == losses[1] > 0
    capsys.readouterr()
    assert main.main(["inspect", str(places["codes"]), "--json"]) == 0
    assert "04 caf\udce9.png" in json.loads(capsys.readouterr().out)["data"]["keys"]
    positions = [reader.data_position(reader.checkpoint_path(place, step=4)[1]) for place in places.values()]
    assert positions[0] == positions[1] and positions[0]["lanes"][0]["dropped"]
    pictures = [Pipeline.load(place)("picture number 3 of many", seed=1)[0].tobytes() for place in places.values()]
    assert pictures[0] == pictures[1]


def batches(source, *, shuffle, **values):
    config = DataConfig(image_size=SIDE, augment="transformer", **values)
    layout, tokenizer = Layout(8, 320, GRID, VOCAB), BPETokenizer.train(["one two three"], vocab_size=290)
    prepare = Prepare(config, layout, tokenizer)
    reading = Reading(threads=0, max_bad_share=0.5)
    epochs = None if shuffle else 1
    return Batches(source, prepare, batch_size=4, seed=3, shuffle=shuffle, epochs=epochs, reading=reading)


def test_crops_are_the_augmentations_of_the_seed_and_all_are_used(folder, dvae, crops, tmp_path):
    pictures, source = open_source(f"folder:{folder}"), open_source(f"tokens:{crops}", pictures_required=False)
    image = decode_image(pictures[3].image)
    wanted = [transforms.augment_transformer(image, SIDE, np.random.default_rng((5, 3, crop))) for crop in range(4)]
    np.testing.assert_array_equal(source[3].tokens_AI, encode_here(dvae, wanted))
    assert len({codes.tobytes() for codes in source[3].tokens_AI}) > 1
    good = [slot for slot in source if isinstance(slot, Encoded)]
    rows = {slot.tokens_AI[crop].tobytes(): (slot.key, crop) for crop in range(3, -1, -1) for slot in reversed(good)}
    endless, first = batches(source, shuffle=True), batches(source, shuffle=False)
    seen = [rows[codes.astype(np.uint16).tobytes()] for _ in range(60) for codes in next(endless)["image_tokens"]]
    assert {crop for _, crop in seen} == {0, 1, 2, 3} and len({key for key, _ in seen}) == len(good)
    assert {rows[codes.astype(np.uint16).tobytes()][1] for batch in first for codes in batch["image_tokens"]} == {0}
    assert endless.dropped["not an image"] > 0
    assert encoded(folder, dvae, tmp_path / "other", augmentations=4, shard_records=8, batch_size=12, seed=6) == 0
    other = open_source(f"tokens:{tmp_path / 'other'}", pictures_required=False)
    assert any(
        (a.tokens_AI != b.tokens_AI).any()
        for a, b in zip(good, (s for s in other if isinstance(s, Encoded)), strict=True)
    )


def test_filters_read_the_size_of_the_picture_and_the_captions(crops):
    filtered = batches(open_source(f"tokens:{crops}", pictures_required=False), shuffle=False, min_image_side=12)
    assert all(batch["image_tokens"].dtype == np.int32 and batch["text"].shape[1] == 8 for batch in filtered)
    assert filtered.dropped["image too small"] == 1 and filtered.good == PICTURES - 4


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_given_again_it_does_what_is_left(folder, dvae, center, tmp_path, monkeypatch, capsys):
    out, options = tmp_path / "tokens", dict(augment="center", shard_records=5, batch_size=4)
    write, written = files.write, []

    def die_in_the_third(path, data):
        if len(written) == 3:
            path.with_name(f".{path.name}.4711").write_bytes(data[:100])
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(files, "write", die_in_the_third)
    assert encoded(folder, dvae, out, **options) == 130
    with pytest.raises(UserError, match="expected 5 shards in .*, 3 of them are not there"):
        open_source(f"tokens:{out}", pictures_required=False)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("tokens-*")}
    monkeypatch.setattr(files, "write", write)
    capsys.readouterr()
    assert encoded(folder, dvae, out, **options, json=True) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["records"], summary["good"], summary["now"]["records"]) == (PICTURES, PICTURES - 3, PICTURES - 10)
    assert summary["dropped"] == {"not an image": 1, "truncated image": 1, "empty caption": 1}
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before and len(before) == 2
    assert contents(out) == contents(center)


def test_parts_make_the_same_folder(folder, dvae, center, tmp_path, capsys):
    options = dict(augment="center", shard_records=5, batch_size=4)
    assert encoded(folder, dvae, tmp_path / "t", **options, part="1/2") == 0
    assert "3 shards are left to other parts" in capsys.readouterr().out
    assert encoded(folder, dvae, tmp_path / "t", **options, part="0/2") == 0
    line = capsys.readouterr().out
    assert (
        f"--config.run.data.train=tokens:{tmp_path / 't'} --config.data.augment=center" in line
        and line.count("\n") == 1
    )
    assert contents(tmp_path / "t") == contents(center)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "holds other tokens .seed was 0 and is 1.: use these values again or another --out"),
        ({"augment": "transformer"}, "augment was 'center' and is 'transformer'"),
        ({"augmentations": 2}, "expected --augmentations 1 with --augment center, got 2"),
        ({"augment": "clip", "augmentations": 0}, "--augmentations to be a whole number of at least 1"),
        ({"shard_records": 0}, "--shard-records to be"),
        ({"batch_size": 0}, "--batch-size to be a whole number of at least 1 .*, got 0"),
        ({"part": "2/2"}, "--part I/N"),
        ({"part": "all"}, "--part I/N"),
    ],
)
def test_wrong_options_are_one_sentence(folder, dvae, center, capsys, options, message):
    before = contents(center)
    assert encoded(folder, dvae, center, **{"augment": "center", "shard_records": 5, **options}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert contents(center) == before


def test_another_dvae_is_refused_by_encoding_training_and_sampling(
    folder, dvae, tokenizer, center, trained, tmp_path, capsys
):
    other = save_dvae(tmp_path / "other", seed=2)
    assert encoded(folder, other, center, augment="center", shard_records=5) == 2
    assert "holds other tokens (dvae_sha256 was" in capsys.readouterr().err
    with pytest.raises(
        UserError,
        match="expected the image tokenizer that made the tokens in .*, got another .* --config.frozen",
    ):
        train(tmp_path / "run", other, tokenizer, f"tokens:{center}")
    with pytest.raises(UserError, match="crops of kind 'transformer' in .*, as config.data.augment asks, got 'center'"):
        train(tmp_path / "run", dvae, tokenizer, f"tokens:{center}", **{"data.augment": "transformer"})
    assert not (tmp_path / "run").exists()
    workdir = tmp_path / "exported"
    assert main.main(["export", str(trained["codes"]), str(workdir)]) == 0
    Pipeline.load(workdir)
    for place in (workdir, shutil.copytree(trained["codes"], tmp_path / "copy")):
        shutil.rmtree(place / "image_tokenizer")
        shutil.copytree(other, place / "image_tokenizer")
        with pytest.raises(UserError, match="expected the image_tokenizer that the model in .* was trained with"):
            Pipeline.load(place)
    with pytest.raises(UserError, match="was trained with .* put that one back"):
        train(tmp_path / "copy", dvae, tokenizer, f"tokens:{center}", **{"optimizer.schedule.warmup_steps": 4})


def test_codes_are_no_pictures(crops, dvae, tokenizer, center, tmp_path, capsys):
    assert main.main(["data", f"tokens:{center}"]) == 2
    assert "expected a source of pictures, got tokens:" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected crops of kind 'center' in .* as validation asks, got 'transformer'"):
        train(tmp_path, dvae, tokenizer, f"tokens:{center}", **{"run.data.validation": f"tokens:{crops}"})
    with pytest.raises(UserError, match="expected a folder that `dalle-jax encode` made, got /nowhere"):
        open_source("tokens:/nowhere", pictures_required=False)


def test_the_dvae_stays_where_pictures_are_read():
    def reads(train, validation):
        values = {"run.data.train": train, "run.data.validation": validation}
        return run.reads_images(demo_settings("transformer", values))

    assert reads("folder:a", None) and reads("folder:a", "tokens:b") and reads("tokens:a", "folder:b")
    assert reads(None, None) and not reads("tokens:a", None) and not reads("tokens:a", "tokens:b")


def test_damaged_shards_cost_their_records_only(center, tmp_path):
    copy = shutil.copytree(center, tmp_path / "copy")
    cut, odd = copy / features.shard_name(1), copy / features.shard_name(2)
    cut.write_bytes(cut.read_bytes()[:-50])
    settings = dataclasses.replace(features.read_settings(copy), vocab=1 << 16)
    wrong = np.full((1, GRID**2), VOCAB, np.uint16)
    odd.write_bytes(features.pack([Encoded("a", wrong, 1, 1, ("b",))] * 5, settings))
    slots = list(open_source(f"tokens:{copy}", pictures_required=False))
    assert [slot.reason for slot in slots[5:15]] == ["unreadable file"] * 5 + ["broken tokens"] * 5
    assert all(isinstance(slot, Encoded) for slot in slots[15:])
    with pytest.raises(UserError, match="delete it and give the command again"):
        features.count(cut)
    with pytest.raises(UserError, match="vocab to be .* at most 65,536, got 65537"):
        dataclasses.replace(settings, vocab=1 + (1 << 16))


def test_shards_are_opened_by_many_threads_at_once(center, monkeypatch):
    """Two threads that wait for each other inside `safe_open` would never return, if one held a lock."""
    source, together = open_source(f"tokens:{center}", pictures_required=False), threading.Barrier(2)
    opened = features.safetensors.safe_open

    def open_together(*args, **kwargs):
        together.wait(10)
        return opened(*args, **kwargs)

    monkeypatch.setattr(features.safetensors, "safe_open", open_together)
    with futures.ThreadPoolExecutor(2) as pool:
        assert all(isinstance(slot, Encoded) for slot in pool.map(source.__getitem__, (0, PICTURES - 1)))


def test_preflight_leaves_the_dvae_out_of_an_update_on_codes():
    pod = Topology(hardware.find_chip("gpu", "h100"), (1, 8))
    jobs = [
        Job(
            demo_settings("transformer", {"run.data.train": train, "run.data.validation": None}),
            pod,
            jax.devices(),
            image_tokenizers=(demo_settings("dvae", {}).model,),
        )
        for train in ("scenes:train@64", "tokens:x")
    ]
    pictures, codes = jobs
    assert set(codes.batch) == {"image_tokens", "text"} and not codes.frozen and pictures.frozen
    extra = [job.work.executed_flops - flops.transformer(job.task.model.config) for job in jobs]
    assert extra[0] > 0 == extra[1]
