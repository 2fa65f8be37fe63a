"""What `benchmarks.speed.sampling` counts is the formula, and its part for accelerators runs, here on a tiny model."""

import argparse

import jax
import pytest

from benchmarks.speed import sampling, sampling_bounds
from dalle_jax.mesh import make_mesh
from tests.support.abstract_engine import AbstractEngine


@pytest.mark.parametrize(
    ("name", "stored_mb", "read_mb", "text_mb"),
    [("0.4B", 31.7, 4.23, 28.3), ("1.3B", 56.3, 7.53, 50.3), ("12B", 287, 35.4, 260)],
)
def test_bytes_of_a_candidate_and_a_step_are_those_of_the_windows(name, stored_mb, read_mb, text_mb):
    """Keys and values of 2 bytes: 33 positions of a row layer, all 1024 stored and 32 read of a column layer, 166 of
    the convolution for each candidate; 256 of every layer for a caption, whatever the number of its candidates."""
    mesh = make_mesh({}, devices=jax.devices()[:1])
    engine = AbstractEngine(sampling_bounds.model(name), mesh=mesh)
    config, step = engine.config, sampling_bounds.step(engine, 1, 64)
    position = 4 * config.heads * config.head_size
    rows, columns = (config.kinds.count(kind) for kind in ("row", "column"))
    stored = position * (33 * rows + 1024 * columns + 166)
    assert sampling_bounds.cache_bytes(config) == stored == pytest.approx(stored_mb * 1e6, rel=5e-3)
    assert step.windows == 64 * position * (33 * rows + 32 * columns + 166) == pytest.approx(64e6 * read_mb, rel=5e-3)
    assert step.text == position * 256 * config.num_layers == pytest.approx(text_mb * 1e6, rel=5e-3)
    ahead = engine.batch_bytes(1, 65, guided=False) - engine.batch_bytes(1, 64, guided=False)
    assert ahead == stored + 4 * config.image_vocab * (config.grid + 4)  # and its noise of a row, and logits


@pytest.mark.slow
def test_the_part_for_accelerators_runs(tmp_path, monkeypatch):
    """All of it in one call, but for the size of the model and the name of the chip."""
    sizes = {"num_layers": 3, "width": 16, "heads": 2, "head_size": 8, "text_len": 70, "grid": 4, "image_vocab": 32}
    monkeypatch.setattr(sampling_bounds, "MODELS", {"1.3B": sizes})
    args = argparse.Namespace(
        models=["1.3B"], candidates=[1, 64, 512], rounds=2, enough=1.0, chip="gpu:h200", weights="model", out=tmp_path
    )
    rows = [line.split(" | ") for line in sampling.on_accelerator(args)[4:]]
    assert [row[:3] for row in rows][0] == ["| 1.3B", "1", "1 x 1"] and len(rows) == 3
    for row, count in zip(rows, (1, 64, 512), strict=True):
        waves, images = map(int, row[2].split(" x "))
        assert waves * images == count and float(row[3]) > 0 and row[6] == "0%"
    assert "60% of the bound: not met" in rows[0][8] and rows[2][8].startswith("150 images/s: ")
