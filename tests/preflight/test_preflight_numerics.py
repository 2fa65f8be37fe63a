"""Preflight of what the paper did to fit: compressed gradients, 16-bit moments, an average in host memory."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from dalle_jax import sharding
from dalle_jax.cli import preflight
from dalle_jax.preflight import memory, report, roofline, search, topology
from dalle_jax.preflight.job import Job, shard_bytes
from dalle_jax.train.settings import load_settings
from tests.support import ROOT
from tests.support.pods import emulated


def test_the_average_that_a_gpus_host_holds_is_taken_off(result):
    """A compiler for GPUs that are not here knows no host memory: it sees the average on the device."""
    job = result.job.changed({"run.offload_ema": True})
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(job.state)} == {"device"}
    found = search.examine(job)
    assert found.bytes == {**result.bytes, "ema": 0}
    assert result.verdict.total_bytes - found.verdict.total_bytes == result.bytes["ema"] > 0
    on_tpu = emulated("v5e", (2, 4), "tpu").changed({"run.offload_ema": True})
    assert memory.by_kind(on_tpu)["ema"] == 0 == on_tpu.average_bytes_taken_off


def test_samples_of_a_training_are_counted(result):
    """On the devices of the first process: one GPU, as the launchers start them, or those of a TPU host, which share
    the weights as far as the heads divide."""
    job = result.job.changed({"run.picture_every": 5})
    alone = memory.sampling(job)
    host = memory.sampling(emulated("v5e", (2, 4), "tpu").changed({"run.picture_every": 5}))
    assert (alone.devices, host.devices) == (1, 4) and alone.fits and host.fits
    drawing = job.task.model.num_params - job.task.model.abstract["text_head"].size
    assert alone.weights == pytest.approx(4 * drawing, rel=0.01)  # float32, with the norms folded in
    assert alone.weights / 4 < host.weights < 0.4 * alone.weights  # tables and vectors lie whole
    state = shard_bytes([job.state[part] for part in ("params", "opt_state", "ema")])
    assert alone.held == state + shard_bytes(job.frozen)
    chip = dataclasses.replace(job.topology.chip, memory_bytes=alone.held + alone.weights, usable_share=0.99)
    small = memory.sampling(dataclasses.replace(job, topology=dataclasses.replace(job.topology, chip=chip)))
    assert small == dataclasses.replace(alone, fits=False)
    assert memory.sampling(job.changed({"run.picture_every": None})) is None
    for found, words in ((alone, "of weights on a device of the first"), (small, "DOES NOT FIT, so the training")):
        drawn = dataclasses.replace(result, sampling=found)
        assert words in report.table(drawn, None) and preflight._json(drawn)["sampling"] == dataclasses.asdict(found)


def test_the_papers_own_layout_holds_more_than_its_gpus_have():
    """12b_v100 on 1,024 V100 of 16 GB: by shapes alone, and as docs/numerics.md says."""
    pod = topology.parse("gpu:v100-16:128x8")
    job = Job(load_settings("configs/transformer.py:12b_v100"), pod, ())
    vars(job)["mesh"] = AbstractMesh((128, 8, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    found, hidden = memory.by_kind(job), 64 * 12 * 3968**2 // 8
    rest = job.task.model.num_params / 8 - hidden
    assert found["compression"] == 2 * hidden and found["ema"] == 0  # 1-6-9; in host memory
    assert found["optimizer"] == pytest.approx(2 * 2 * hidden + 2 * 4 * rest, rel=3e-3)  # some biases lie uncut
    held = sum(found[kind] for kind in ("parameters", "optimizer", "compression"))
    assert held < pod.usable_bytes < sum(found.values())
    assert job.step._scaler.start == 8 * 2.0**13  # a replica's loss, 8 pieces
    sent, instead = job.across_replicas
    assert sent == pytest.approx((1 - 0.859) * 2 * hidden + 4 * rest, rel=0.01) and instead > 5 * sent
    text = (ROOT / "docs" / "numerics.md").read_text()
    for kind, size in found.items():
        assert f"  {report.NAMES.get(kind, kind):<16}{size / 1e9:>9.3f}\n" in text, kind
    assert f"{sent / 1e9:.3f} GB instead of {instead / 1e9:.3f}" in text and "DOES NOT FIT" in text


def test_the_dvaes_stream_in_float32_is_counted():
    """The compiler asks for 12.6 GB (tests/preflight/test_preflight_compilers.py); its branches alone are bfloat16."""
    job = Job(load_settings("configs/dvae.py:paper", ["--config.batch_size=32"]), topology.parse("tpu:v5p:2x2x1"), ())
    whole = job.changed({"model.precision": "fp32"})
    for each in (job, whole):
        vars(each)["mesh"] = AbstractMesh((1, 4, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    assert memory.total(job) == pytest.approx(12.604e9, rel=0.15)
    stream = 2 * 4 * 2 * 256**3 * (1 + 1 / 2 + 1 / 4 + 1 / 8)  # bytes: of both towers after each of two blocks a group
    halves = sum(whole.work.result_bytes) / 2
    assert halves + stream / 2 < sum(job.work.result_bytes) < 2 * halves


def test_compression_is_in_the_report_and_the_json(result):
    job = result.job.changed({"compression.rank": 16, "optimizer.name": "adamw"})
    compressed = dataclasses.replace(result, job=job, bytes=memory.by_kind(job))
    figures, text = preflight._json(compressed), report.table(compressed, None)
    assert figures["bytes_per_chip"]["compression"] == shard_bytes(job.state["error"]) > 0
    sent, instead = figures["bytes_across_replicas"].values()
    assert figures["compression_saved"] == 1 - sent / instead > 0.5
    assert "left out" in text and f"which saves {figures['compression_saved']:.0%}" in text
    assert preflight._json(result)["compression_saved"] == 0 and "saves" not in report.table(result, None)


def test_compressed_gradients_cross_once_an_update_whatever_the_microbatches(result):
    job = result.job.changed({"compression.rank": 16, "optimizer.name": "adamw"})
    once, twice = (roofline.expected(j) for j in (job, job.changed({"accumulate": 2})))
    for one, two in zip(once, twice, strict=True):
        times = 1 if one.axis == "replica" else 2
        assert (two.kind, two.axis, two.count, two.bytes) == (one.kind, one.axis, times, times * one.bytes)
    assert next(c.bytes for c in once if c.axis == "replica") == 2 * job.across_replicas[0] // 2 > 0


def test_what_has_16_bits_already_is_no_change_that_is_tried():
    job = emulated().changed({"optimizer.name": "adamw"})

    def offered(job):
        return {key for group in search._options(job) for change in group for key in change}

    assert {"optimizer.moments", "storage.params"} <= offered(job)
    assert "optimizer.moments" not in offered(job.changed({"optimizer.moments": "paper"}))
    assert "storage.params" not in offered(job.changed({"storage.params": "bf16"}))
