"""`benchmarks/speed/train_step.py`: its suites are configs that exist, its table says what was measured."""

import json
import os
import re
import subprocess
import sys
import time
import types

import pytest

from benchmarks.speed import chips, train_step, train_step_measure
from dalle_jax.preflight import flops
from dalle_jax.preflight.hardware import Chip
from dalle_jax.train.settings import load_settings
from tests.support import ROOT

TINY = {
    "batch_size": 8, "model.precision": "fp32", "model.num_layers": 5, "model.width": 16, "model.heads": 2,
    "model.head_size": 8, "model.text_len": 8,
}  # fmt: skip


def test_every_variant_of_a_suite_is_a_possible_model():
    for suite in train_step.SUITES.values():
        found = []
        for variant in suite.variants:
            changes, flags = train_step.parse(variant)
            values = {**suite.common, **changes}
            settings = load_settings(suite.config, [f"--config.{key}={value}" for key, value in values.items()])
            assert settings.model.layout.length == 1280
            assert settings.batch_size % settings.accumulate == 0
            found.append((str(settings), *flags))
        assert len(set(found)) == len(found)


def test_the_suite_of_flags_turns_off_every_flag_of_the_launchers():
    """One by one, and XLA knows the words: a process with an unknown flag or value ends at its start."""
    off = [flag for variant in train_step.SUITES["flags"].variants for flag in train_step.parse(variant)[1]]
    launched = (ROOT / "launch" / "xla_flags.sh").read_text()
    names = re.findall(r"^ +--(xla_gpu\w+)=", launched, re.MULTILINE)
    assert sorted(flag.removeprefix("--").partition("=")[0] for flag in off) == sorted(names)
    assert not any(f"    {flag}\n" in launched for flag in off)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(off)}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True, env=environment)


def test_flags_of_a_variant_reach_its_process_after_those_of_the_environment(tmp_path, monkeypatch):
    script = tmp_path / "measure.py"
    script.write_text("import os, json; print(json.dumps({'flags': os.environ['XLA_FLAGS']}))")
    monkeypatch.setattr(train_step, "MEASURE", (script,))
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    suite = train_step.Suite("any", {}, ("", "--xla_two=a,b --xla_three=3"))
    rows = train_step.measured(suite, tmp_path, until=time.monotonic() + 60)
    assert [row["flags"] for row in rows.values()] == ["--xla_one=1", "--xla_one=1 --xla_two=a,b --xla_three=3"]


def test_a_variant_that_was_cut_off_is_measured_by_the_next_call(tmp_path, monkeypatch):
    """Unless it had the whole call and was too slow even then, which is a failure."""
    script = tmp_path / "measure.py"
    script.write_text(
        "import json, sys, time\n"
        "if json.loads(sys.argv[1])['values']['way'] == 'slow':\n"
        "    time.sleep(60)\n"
        "print('ready', '{\"whole\": 1}', sep='\\n')\n"
    )
    monkeypatch.setattr(train_step, "MEASURE", (script,))
    suite = train_step.Suite("any", {}, ("way=quick", "way=slow"))
    clock = iter([0.0, 0.0, 4.9]).__next__  # began, ended; began
    monkeypatch.setattr(train_step, "time", types.SimpleNamespace(monotonic=lambda: clock()))
    rows = train_step.measured(suite, tmp_path, until=5.0)
    assert rows.keys() == {"way=quick"} and rows["way=quick"]["whole"] == 1
    clock = iter([0.0] * 3).__next__
    rows = train_step.measured(suite, tmp_path, until=0.1)
    assert rows["way=slow"]["failed"] == "took more than 0 s" and rows["way=quick"]["whole"] == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_a_machine_without_the_device_ends_the_call_and_nothing_is_noted(tmp_path):
    suite = train_step.Suite("configs/transformer.py:demo", {}, ("", "batch_size=8"), platform="tpu")
    with pytest.raises(SystemExit, match="as it is: expected JAX to find a tpu, got cpu"):
        train_step.measured(suite, tmp_path, until=time.monotonic() + 60)
    assert not (tmp_path / "rows.json").exists()


def test_a_suites_dvae_is_the_one_that_encodes():
    chip, sizes = Chip("any", "gpu", 0, {}, 0.0, 0.0), train_step.SUITES["sparse-dense"].dvae
    job = train_step_measure.job_of(load_settings("configs/transformer.py:1b3"), chip, sizes)
    assert {name: getattr(job.image_tokenizer.config, name) for name in sizes} == sizes
    assert job.task.frozen == {"image_tokenizer": job.image_tokenizer.abstract}


def test_names_of_devices_are_found():
    for kind, name in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-40GB": "a100-40", "TPU v4": "v4",
        "NVIDIA A100-SXM4-80GB": "a100-80", "Tesla V100-SXM2-16GB": "v100-16", "TPU v5 lite": "v5e", "TPU v5": "v5p",
        "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    }.items():  # fmt: skip
        assert chips.of_device(types.SimpleNamespace(device_kind=kind)).name == name
    assert chips.of_device(types.SimpleNamespace(device_kind="cpu")) is None


def test_the_table_says_what_was_measured_and_what_failed():
    suite = train_step.Suite("configs/transformer.py:demo", {"batch_size": 4}, ("", "model.remat=none"))
    row = {
        "device": "1 x cpu", "host": "2 CPU cores", "chip": None, "peak_flops": 1e12, "matmul_flops": 1e12,
        "copy_bytes_per_second": 5e9, "batch_size": 4, "compile_seconds": 3.0, "step_seconds": 0.5,
        "tokens_per_second": 640.0, "model_flops_per_device": 1e11, "executed_flops_per_device": 1.5e11,
        "memory_bytes": 2e9, "peak_bytes": 3e9, "roofline_seconds": {"compute": 0.15, "memory": 0.2},
        "date": "2026-01-02", "load_before": 0.5,
    }  # fmt: skip
    lines = train_step.table(
        suite, {"": row, "model.remat=none": {"failed": "RESOURCE_EXHAUSTED"}}, ["    the command"]
    )
    text = "\n".join(lines)
    assert "| as it is | 4 | 0.5 | 640 | 20.0% | 30.0% | 40% | 2.00 | 3.00 | 3.0 |" in text
    assert "| remat=none |  | failed: RESOURCE_EXHAUSTED" in text and "    the command\n" in text
    assert "batch_size=4" in text


@pytest.mark.slow
def test_a_whole_call(tmp_path, monkeypatch):
    """Two variants on eight emulated devices, in processes of their own; one that is impossible is a row."""
    words = ["--config", "configs/transformer.py:demo", "--out", str(tmp_path), "--seconds", "0.2"]
    words += ["--variants", "", "model.remat=full accumulate=2 batch_size=16", "model.heads=0"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words, *(f"--config.{k}={v}" for k, v in TINY.items())])
    assert train_step.main() == 0
    whole, again, impossible = json.loads((tmp_path / "rows.json").read_text()).values()
    assert "heads must be at least 1" in impossible["failed"]
    config = load_settings("configs/transformer.py:demo", _words()).model
    assert whole["model_flops_per_device"] == flops.transformer(config)  # eight sequences on eight devices
    for row in (whole, again):
        assert row["memory_bytes"] > 0 and row["executed_flops_per_device"] > row["model_flops_per_device"]


def _words():
    return [f"--config.{key}={value}" for key, value in TINY.items()]
