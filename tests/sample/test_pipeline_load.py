"""`Pipeline.load`: parts that are missing, foreign or impossible, and what a model cannot do."""

import argparse
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import dalle_jax
from dalle_jax import model_dir
from dalle_jax.cli import main, sample
from dalle_jax.errors import UserError
from dalle_jax.models import build
from tests.support.parameters import random_parameters
from tests.support.tiny_model import CAPTION, DVAE


@pytest.mark.parametrize("part", ["transformer", "dvae"])
@pytest.mark.parametrize("sizes", [{"width": 0}, {"widht": 16}])
def test_impossible_sizes_of_a_folder_are_named(model_folder, tmp_path, part, sizes):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    place = other / "image_tokenizer" if part == "dvae" else other
    config = json.loads((place / "config.json").read_text())
    config["model"] |= sizes
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"expected a possible {part} in {place}, got one where .*{[*sizes][0]}"):
        dalle_jax.Pipeline.load(other)


def test_a_folder_of_version_0_1_is_read(model_folder, tmp_path):
    """There the image tokenizer lay in `dvae`, its digest in `dvae.sha256`."""
    old = tmp_path / "old"
    shutil.copytree(model_folder, old)
    (old / "image_tokenizer").rename(old / "dvae")
    (old / "dvae.sha256").write_text(model_dir.load(old / "dvae").digest)
    one = jax.devices()[:1]
    assert dalle_jax.Pipeline.load(old, devices=one).digest == dalle_jax.Pipeline.load(model_folder, devices=one).digest
    (old / "dvae.sha256").write_text("0" * 64)
    with pytest.raises(UserError, match="expected the image_tokenizer that the model in .* was trained with"):
        dalle_jax.Pipeline.load(old)


def test_a_run_draws_with_its_average_or_with_its_parameters(model_folder, monkeypatch):
    """What is asked for reaches the reading of a run, whose two sets `tests/train/test_survival.py` tells apart."""
    asked, read = {}, model_dir.read_params
    parser = argparse.ArgumentParser()
    sample.add_loading_arguments(parser)

    def note(folder, *, step=None, average):
        asked[Path(folder).name] = average
        return read(folder)

    monkeypatch.setattr(model_dir, "read_params", note)
    for words, average in (([], True), (["--raw"], False)):
        sample.load(parser.parse_args([str(model_folder), *words]))
        assert asked == {model_folder.name: average, "image_tokenizer": True}


def test_what_a_model_cannot_do_is_refused(model_folder):
    for arguments, message in (
        ({"weights": "int4"}, r"weights must be one of \('model', 'int8'\)"),
        ({"devices": []}, "devices must be at least one of"),
        ({"devices": ["cpu"]}, r"devices must be at least one of .* got \['cpu'\]"),
        ({"tensor": np.int64(8)}, "tensor must divide the model's 2 heads, got 8"),
    ):
        with pytest.raises(UserError, match=message):
            dalle_jax.Pipeline.load(model_folder, **arguments)
    plain = dalle_jax.Pipeline.load(model_folder, devices=jax.devices()[:1])
    for arguments, message in (({"best_of": 4}, "needs a CLIP"), ({"guidance": 3.0}, "without dropping captions")):
        with pytest.raises(UserError, match=message):
            plain(CAPTION, **arguments)


def test_missing_and_foreign_parts_are_named(model_folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    coarse = {**DVAE, "groups": 1}
    model_dir.save(
        other / "image_tokenizer", {"name": "dvae", "model": coarse}, random_parameters(build("dvae", coarse))
    )
    for (folder, *words), told in (
        ([other], "expected an image tokenizer of 12 tokens on a grid of 4"),
        *((["nowhere", "--tensor", n], "tensor to be a whole number of at least 1 and of at most 8") for n in "09"),
        (["nowhere", "--tensor", 3], "tensor must divide the 8 devices, got 3"),
        ([tmp_path / "nothing"], "config.json"),
        ([model_folder / "image_tokenizer"], "expected a transformer"),
        ([model_folder, "--image", tmp_path / "no.png"], "expected an image to complete"),
    ):
        assert main.main(["sample", str(folder), "a star", *map(str, words)]) == 2
        error = capsys.readouterr().err.strip()
        assert told in error and "\n" not in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a star", " "], "expected words in each CAPTION, got ' '"),
        (["\u200b"], "expected words in each CAPTION"),
        (["\udcff"], "caption must be Unicode text"),
        (["a star", "-n", "0"], "n to be a whole number"),
        (["a star", "-n", "2", "--best-of", "1"], "best_of must be at least n = 2"),
        (["a star", "--temperature", "nan"], "temperature to be a number"),
        (["a star", "--top-p", "2"], "top_p to be a number"),
        (["a star", "--keep-rows", "1"], "keep_rows needs an image"),
    ],
)
def test_a_command_is_checked_before_the_model_is_loaded(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda args: pytest.fail("loaded"))
    assert main.main(["sample", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
