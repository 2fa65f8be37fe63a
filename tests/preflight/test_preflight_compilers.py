"""Preflight with the pods' own compilers: the byte model against them, and their verdicts on the 12b model.

Slow, as a TPU or GPU program of 12b's width compiles for half a minute to minutes: `pytest -m slow`. Each test needs
the compiler of its platform installed, but no accelerator.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
WIDE = ("--config.model.num_layers=5", "--config.batch_size=8")


def preflight(topology: str, *words: str, config: str = "12b") -> tuple[int, dict]:
    """Exit status and JSON of the command, in a process of its own; skips where the compiler is missing."""
    names = COMPILERS[topology.partition(":")[0]]
    if not any(importlib.util.find_spec(name) for name in names):
        pytest.skip(f"needs {' or '.join(names)} to compile for {topology}")
    clean = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    spec = config if ":" in config else f"configs/transformer.py:{config}"
    command = [sys.executable, "-m", "dalle_jax.cli", "preflight", "--config", spec, "--json"]
    done = subprocess.run(
        [*command, "--topology", topology, *words], capture_output=True, text=True, timeout=1100, env=clean
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("topology", "config", "words"),
    [
        ("tpu:v5p:2x2x1", "12b", ("--config.model.num_layers=13", "--config.batch_size=8")),
        ("tpu:v5p:2x2x1", "configs/dvae.py:paper", ("--config.batch_size=32",)),
        ("gpu:h100:1x8", "12b", WIDE),
        ("gpu:h100:8x8", "12b", ("--config.run.mesh.fsdp=64", "--config.accumulate=4")),
        ("gpu:h100:1x1", "1b3", ("--config.batch_size=16", "--config.model.remat=dots", "--config.model.scan=False")),
        (
            "gpu:v100-16:2x8",
            "12b_v100",
            ("--config.model.num_layers=5", "--config.batch_size=16", "--config.run.mesh.replica=2"),
        ),
    ],
)
def test_byte_model_and_compiler_agree_within_15_percent(topology, config, words):
    _, figures = preflight(topology, *words, config=config)
    assert figures["bytes_per_chip"]["total"] == pytest.approx(figures["compiler_bytes_per_chip"]["total"], rel=0.15)


@pytest.mark.parametrize(
    ("topology", "kernel"), [("gpu:h100:1x8", "pallas"), ("gpu:a100-80:1x8", "pallas"), ("tpu:v5p:2x2x1", "splash")]
)
def test_fused_attention_compiles_into_the_training_step(topology, kernel):
    """Five layers of 12b, every kind among them. Without scores and remat less memory is asked for."""
    words = (*WIDE, "--config.model.remat=none", "--config.run.mesh.replica=1")
    _, plain = preflight(topology, *words)
    _, fused = preflight(topology, *words, f"--config.model.attention={kernel}")
    temporaries = [figures["compiler_bytes_per_chip"]["temporaries"] for figures in (plain, fused)]
    assert temporaries[1] < temporaries[0] - 5 * 100e6  # a third of a layer's 56 units, 0.19 GB a layer and sequence


@pytest.mark.parametrize("topology", ["tpu:v5p:8x8x16", "gpu:h100:128x8"])
def test_12b_fits_1024_chips(topology):
    """One sequence a chip; the figures a person decides on are there."""
    status, figures = preflight(topology)
    assert status == 0 and figures["fits"] is True
    assert figures["parameters"] == 12_293_828_224 and figures["chips"] == 1024
    assert figures["flops_per_sequence"] == pytest.approx(9.416e13, rel=0.01)
    gathered = sum(c["bytes"] for c in figures["collectives"] if c["kind"] == "all-gather")
    assert gathered > 2 * 2 * 0.8 * figures["parameters"]  # all weights twice, in 16 bit


def test_12b_does_not_fit_eight_v100():
    """State alone is 24.6 GB of 16: no number of microbatches helps, only more chips."""
    status, figures = preflight("gpu:v100-16:1x8", "--config.accumulate=128")
    assert status == 1 and figures["fits"] is False
    assert figures["compiler_bytes_per_chip"]["total"] > figures["chip_bytes"]
    assert all("topology" in change["changed"] and change["fits"] for change in figures["changes"])


def test_the_papers_own_layout_does_not_fit_its_gpus():
    """With float32 parameters and gradients, which the paper had not, nor a layer's worth of working memory."""
    status, figures = preflight("gpu:v100-16:128x8", config="12b_v100")
    assert status == 1 and figures["fits"] is False and figures["chips"] == 1024
    assert figures["bytes_per_chip"]["total"] == pytest.approx(figures["compiler_bytes_per_chip"]["total"], rel=0.15)
    assert figures["mesh"] == {"replica": 128, "fsdp": 8, "tensor": 1}
    assert 0.8 < figures["compression_saved"] < 0.86
