"""All of the paper's numerics together, in the ordinary loop, through the ordinary command."""

import math

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax.checkpoint import reader
from dalle_jax.cli import main
from dalle_jax.train.monitor import metrics
from tests.support import tiny_model


def test_train_takes_them_all(tmp_path, monkeypatch):
    """Two replicas of one device, as programs for eight take long to compile."""
    pair = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: pair)
    pictures, workdir, model = tmp_path / "pictures", tmp_path / "run", tiny_model.write(tmp_path / "model")
    pictures.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(tiny_model.CAPTION)
    values = {f"model.{name}": value for name, value in tiny_model.TRANSFORMER.items()} | {
        "model.precision": "fp16-paper", "optimizer.moments": "paper", "compression.rank": 4,
        "compression.format": "paper", "run.offload_ema": True, "ema.every": 2, "optimizer.schedule.name": "plateau",
        "model.remat": "full", "model.num_layers": 1, "model.text_vocab": None, "run.mesh.replica": 2,
        "run.data.train": f"folder:{pictures}", "run.data.validation": None,
        "frozen.image_tokenizer": model / "image_tokenizer",
        "tokenizer": model, "run.steps": 3, "run.log_every": 1, "run.checkpoint_every": None, "batch_size": 8,
        "data.image_size": 16, "run.data.threads": 0, "optimizer.name": "adamw", "optimizer.schedule.warmup_steps": 0,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in values.items()]
    assert main.main(["train", "--config", "configs/transformer.py:demo", "--workdir", str(workdir), *words]) == 0
    lines = [line for line in metrics.read(workdir / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert math.isfinite(line["train/loss"]) and math.isfinite(line["train/grad_norm"])
        assert line["train/skipped"] == 0 and {"train/log2_scale/000", "train/log2_scale/001"} <= set(line)
    # Scales start at 2^13 for each of the devices that share a replica's batch, here one, and grow.
    assert lines[-1]["train/log2_scale/000"] == pytest.approx(13 + 2 / 1000, abs=1e-5)
    assert reader.complete_steps(workdir) == [3]
