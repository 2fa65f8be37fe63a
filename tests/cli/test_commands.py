"""The whole chain through its commands, as the README's "train on your own folder" gives it, over broken shards."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from dalle_jax.cli import hooks
from dalle_jax.cli.main import main as command
from dalle_jax.pictures.sheet import contact_sheet
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.train import compilation_cache
from tests.support.broken_shards import CASES, expected_total, pack, sample

GOOD, DROPPED = expected_total()
SOUND, BATCH = 12, 8
STEPS = -(-(GOOD + SOUND) // BATCH) + 1  # more than an epoch, so that every record comes by
WORDS = "red green blue round small large old new apple house river stone over under beside behind".split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Every kind of broken shard, and a sound one with captions enough for a tokenizer."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for number, (data, _, _) in enumerate(CASES.values()):
        (folder / f"{number:02d}.tar").write_bytes(data)
    captions = [" ".join(rng.choice(WORDS, 4)) for _ in range(SOUND)]
    members = [member for i, text in enumerate(captions) for member in sample(f"sound{i}", txt=text.encode())]
    (folder / "sound.tar").write_bytes(pack(members))
    return f"wds:{folder}/*.tar"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALLE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(line: str, **overrides) -> int:
    return command([*shlex.split(line), *(f"--config.{key}={value}" for key, value in overrides.items())])


def position(workdir, capsys) -> dict:
    """The data's state in the newest checkpoint: what was used and what was dropped."""
    capsys.readouterr()
    assert run(f"inspect {workdir} --json") == 0
    (lane,) = json.loads(capsys.readouterr().out)["data"]["lanes"]
    return lane


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_from_broken_shards_to_pictures(shards, tmp_path, capsys):
    """Tokenizer, dVAE, transformer and samples; no bad record stops anything, every reason is counted. The training's
    own last sheet shows what the loaded model draws."""
    tokenizer, dvae, transformer = tmp_path / "tokenizer", tmp_path / "dvae", tmp_path / "transformer"
    assert run(f"tokenizer {shards} --vocab-size 300 --out {tokenizer}") == 0
    capsys.readouterr()

    assert run(f"data {shards} --tokenizer {tokenizer} --max-pixels 10000000 --json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["good"], report["dropped"]) == (GOOD + SOUND, DROPPED)
    assert report["caption_length_unit"] == "tokens"

    common = {
        "run.data.train": shards, "run.data.validation": None, "run.steps": STEPS, "run.validate_every": None,
        "run.picture_every": STEPS, "run.log_every": 4, "run.mesh.fsdp": 1, "run.mesh.replica": None,
        "batch_size": BATCH, "run.data.max_bad_share": 0.9, "data.image_size": 16, "data.max_pixels": 10_000_000,
        "run.data.threads": 2, "optimizer.schedule.warmup_steps": 0,
    }  # fmt: skip
    sizes = {"model.image_size": 16, "model.width": 8, "model.stem": 4, "model.vocab": 8, "model.patch": 4}
    assert run(f"train --config configs/dvae.py:demo --workdir {dvae}", **common, **sizes) == 0
    sizes = {
        "model.num_layers": 2, "model.width": 16, "model.heads": 2, "model.head_size": 8, "model.text_len": 8,
        "model.grid": 4, "model.image_vocab": 8, "model.text_vocab": None, "frozen.image_tokenizer": dvae,
        "tokenizer": tokenizer,
    }  # fmt: skip
    assert run(f"train --config configs/transformer.py:demo --workdir {transformer}", **common, **sizes) == 0
    told = capsys.readouterr().err
    seen = position(transformer, capsys)
    assert seen["cut"] and f"{seen['cut']} of {STEPS * BATCH} captions were longer than the 7 tokens" in told
    assert seen["good"] == STEPS * BATCH
    assert set(seen["dropped"]) == set(DROPPED)
    assert list((transformer / compilation_cache.FOLDER).rglob("jit_update-*"))

    out = tmp_path / "samples"
    assert run(f"sample {transformer} 'a round stone' -n 2 --out {out}") == 0
    pictures = [Image.open(path) for path in out.glob("*.png")]
    assert sum(picture.size == (16, 16) for picture in pictures) == 2 and len(pictures) == 3  # and the sheet

    captions = hooks.first_captions(shards, hooks.CAPTIONS)
    pipe = Pipeline.load(transformer)
    rows = pipe(captions, seed=list(range(len(captions))))
    sheet = contact_sheet([np.asarray(row[0]) for row in rows], captions, columns=8)
    drawn = Image.open(transformer / "pictures" / f"{STEPS:07d}.png")
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(sheet))
