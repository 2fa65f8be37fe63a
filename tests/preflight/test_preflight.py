"""Preflight without the pod's compiler: topology, FLOPs, bytes, collectives and what the command prints."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import attention_pattern, sharding
from dalle_jax.cli import main, preflight
from dalle_jax.errors import UserError
from dalle_jax.models import build
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.preflight import collectives, compiled, flops, hardware, memory, report, roofline, search, topology
from dalle_jax.preflight.job import Job, shard_bytes
from dalle_jax.train.settings import load_settings
from tests.support import ROOT
from tests.support.pods import emulated


@pytest.mark.parametrize(
    ("text", "count", "slice_size"),
    [
        ("tpu:v5p:8x8x16", 1024, 1024),
        ("tpu:v6e:16x16", 256, 256),
        ("tpu:v4:8x8x8", 512, 512),
        ("gpu:h100:128x8", 1024, 8),
        ("gpu:h200:1x8", 8, 8),
        ("gpu:a100-40:4x16", 64, 16),
        ("gpu:v100-16:1x8", 8, 8),
    ],
)
def test_topologies(text, count, slice_size):
    pod = topology.parse(text)
    assert (pod.count, pod.slice_size, str(pod)) == (count, slice_size, text)
    assert 0 < pod.usable_bytes <= pod.chip.memory_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100:8", "gpu:CHIP:HOSTSxGPUS"),
        ("gpu:h100", "such as"),
        ("xpu:h100:1x8", "tpu: or gpu:"),
        ("gpu:h900:1x8", "a100-40"),
        ("tpu:v5p:8x8", "3 positive sizes"),
        ("tpu:v6e:4x4x4", "2 positive sizes"),
        ("gpu:h100:8", "HOSTSxGPUS"),
        ("gpu:h100:0x8", "HOSTSxGPUS"),
        ("gpu:h100:99999999x8", "at most 65,536 chips"),
    ],
)
def test_wrong_topologies_are_one_sentence(text, says):
    with pytest.raises(UserError, match=says) as error:
        topology.parse(text)
    assert "expected" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "extra"), [("tpu:v5p:2x2x1", "[tpu]"), ("gpu:h100:1x8", "[preflight-gpu]")])
def test_a_missing_compiler_names_the_extra(text, extra, monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert main.main(["preflight", "--config", "configs/transformer.py:12b", "--topology", text]) == 2
    err = capsys.readouterr().err
    assert extra in err and "pip install" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "variable", "flag"),
    [
        ("gpu:h100:1x8", "XLA_FLAGS", "--xla_gpu_enable_pipelined_all_gather=true"),
        ("tpu:v5p:2x2x1", "LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=true"),
    ],
)
def test_programs_are_compiled_with_the_flags_of_the_launchers(text, variable, flag, monkeypatch, tmp_path):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setenv(variable, "--mine=1")
    flags = topology.environment(topology.parse(text))[variable].split()
    assert flag in flags and flags[-1] == "--mine=1"
    monkeypatch.setattr(topology, "LAUNCH_FLAGS", tmp_path / "xla_flags.sh")  # an installed wheel has none
    assert variable not in topology.environment(topology.parse(text))


def test_every_gpu_has_a_target_description():
    for chip in hardware.CHIPS["gpu"].values():
        text = hardware.gpu_target(chip)
        assert f"device_memory_size: {chip.memory_bytes}" in text and text.count("{") == text.count("}")


def test_layouts_are_those_that_the_training_accepts():
    """The search for changes and the sweep try these; the one that is taken unasked is the best of them."""
    job = emulated()
    layouts = job.layouts
    assert job.changed({"run.mesh.replica": None, "run.mesh.fsdp": None}).mesh.devices.shape == layouts[0] == (1, 8, 1)
    divisors = (1, 2, 4, 8)
    for shape in [(r, f, 8 // r // f) for r in divisors for f in divisors if 8 % (r * f) == 0]:
        changed = job.changed({f"run.mesh.{axis}": n for axis, n in zip(sharding.MESH_AXES, shape, strict=True)})
        if shape in layouts:
            assert changed.mesh.devices.shape == shape
        else:
            assert shape[2] > 2  # 398 text ids, and four heads
            with pytest.raises(UserError, match=f"tensor {shape[2]} does not divide .* nearest possible"):
                _ = changed.mesh


def test_float16_is_for_gpus_and_its_stream_takes_four_bytes():
    job = emulated("v100-16")
    half, paper = (job.changed({"model.precision": p}) for p in ("fp16-global", "fp16-paper"))
    stream = 2 * 2 * half.task.model.config.num_layers * 78 * 128 * half.sequences  # two bytes more, twice a layer
    assert memory.by_kind(paper)["activations"] - memory.by_kind(half)["activations"] == stream
    seconds = [roofline.estimate(j, []).seconds["compute"] for j in (job, paper)]
    assert seconds[0] == pytest.approx(seconds[1] * 125 / 15.7)
    pod = topology.Topology(hardware.find_chip("tpu", "v5e"), (2, 4))
    with pytest.raises(UserError, match="a TPU, which has no float16 arithmetic"):
        _ = dataclasses.replace(paper, topology=pod).task


def test_fused_attention_holds_no_scores_and_runs_on_some_chips_only():
    """Without remat every layer keeps its scores, and with it there are those of one: of a kernel there are none."""
    shape = {"model.text_len": 64, "model.remat": "none", "model.head_size": 32}
    blockwise = emulated().changed(shape)
    fused = blockwise.changed({"model.attention": "pallas"})
    kinds = [memory.by_kind(job) for job in (blockwise, fused)]
    assert kinds[0]["activations"] > kinds[1]["activations"] and kinds[0]["temporaries"] >= kinds[1]["temporaries"]
    assert sum(kinds[1].values()) < sum(kinds[0].values())
    model = fused.task.model.config
    assert flops.recomputed(model) == 3 * flops.attention(model) // 2  # 7 products backward instead of 4, 2 forward
    seconds = [roofline.estimate(job, []).seconds for job in (blockwise, fused)]
    assert seconds[0]["memory"] > seconds[1]["memory"] and seconds[0]["compute"] < seconds[1]["compute"]
    old = topology.Topology(hardware.find_chip("gpu", "v100-16"), (1, 8))
    with pytest.raises(UserError, match="compute capability 8.0 or later .* got gpu:v100-16:1x8"):
        _ = dataclasses.replace(fused, topology=old).task
    with pytest.raises(UserError, match="expected a TPU .* got gpu:h100:1x8: set --config.model.attention=xla"):
        _ = fused.changed({"model.attention": "splash"}).task


def test_what_a_mesh_must_exchange():
    """Weights of 4 bytes twice, gradients once, their quarters between the two copies; nothing along tensor."""
    job = emulated()
    weights = 4 * job.task.model.num_params
    found = {(c.kind, c.axis): c.bytes for c in roofline.expected(job)}
    assert found == {
        ("all-gather", "fsdp"): 2 * weights * 3 // 4,
        ("reduce-scatter", "fsdp"): weights * 3 // 4,
        ("all-reduce", "replica"): 2 * weights // 4 // 2,
        ("all-reduce", "tensor"): 0,
    }
    assert all(c.inside for c in roofline.expected(job))
    twice = roofline.expected(job.changed({"accumulate": 2}))
    assert {(c.kind, c.axis): c.bytes for c in twice} == {key: 2 * size for key, size in found.items()}


def brute_force(config: TransformerConfig) -> int:
    """Forward FLOPs by going over every layer, position, matrix and allowed pair, nothing factored out."""
    model, length, total = build("transformer", dataclasses.asdict(config)), config.layout.length, 0
    for name, weight in model.abstract["blocks"].items():
        if name in ("qkv", "out", "up", "down"):
            for _ in range(length):
                total += 2 * weight.size
    for kind in config.kinds:
        mask = attention_pattern.allowed(kind, text_len=config.text_len, grid=config.grid)
        for query in range(length):
            for key in range(length):
                total += 2 * 2 * config.heads * config.head_size * bool(mask[query, key])
    for positions, head in ((config.text_len, "text_head"), (config.grid**2, "image_head")):
        total += sum(2 * model.abstract[head].size for _ in range(positions))
    return total


@pytest.mark.parametrize("pattern", ["paper", "full"])
def test_flops_equal_a_brute_force_count(pattern):
    config = TransformerConfig(
        num_layers=5, width=24, heads=3, head_size=8, text_len=6, text_vocab=11, grid=4, image_vocab=13, pattern=pattern
    )
    assert flops.transformer(config) == 3 * brute_force(config)
    attention = flops.attention(config)
    assert flops.transformer_layers(config) - attention == 2 * config.layout.length * 5 * 12 * 24**2


def test_the_program_of_12b_has_one_period_of_layers():
    """Seconds to trace and lower instead of minutes: all 64 unrolled would have five times as many lines."""
    job = Job(load_settings("configs/transformer.py:12b"), topology.parse("gpu:h100:1x8"), tuple(jax.devices()))
    assert job.lower().as_text().count("\n") < 15_000


def test_flops_of_12b():
    """94.16 TFLOP a sequence, computed by hand from the paper's sizes; 6 x parameters x tokens gives 94.42."""
    config = TransformerConfig()
    assert flops.transformer(config) == pytest.approx(9.416e13, rel=0.001)
    assert flops.recomputed(config) == flops.transformer_layers(config)
    attention, total = flops.TRAINING_PASSES * flops.attention(config), flops.transformer(config)
    all_pairs = 3 * 4 * config.num_layers * config.heads * config.head_size * config.layout.length**2
    assert attention / total == pytest.approx(0.011, abs=5e-4)  # as docs/performance.md says
    assert (all_pairs - attention) / total == pytest.approx(0.043, abs=5e-4)


def test_traced_flops_see_loops_products_and_convolutions():
    x, w = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops.traced(convolve, x, w) == 2 * 4 * 8 * 8 * 5 * 27
    a = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    loop = jax.jit(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=7)[0])
    assert flops.traced(loop, a) == 7 * 2 * 6**3
    model = types.SimpleNamespace(abstract=w, config=types.SimpleNamespace(grid=8))
    work = flops.traced_work(lambda w, x: convolve(x, w).sum(), model, x)
    assert work == flops.Work(64, 3 * flops.traced(convolve, x, w), work.model_flops, result_bytes=(4 * 8 * 8 * 5 * 4,))


def test_state_bytes_are_those_of_real_arrays():
    job = emulated()
    state = job.step.init(jax.random.key(0))
    for kind, part in (("parameters", "params"), ("optimizer", "opt_state"), ("ema", "ema")):
        first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state[part])]
        assert memory.by_kind(job)[kind] == sum(first) == shard_bytes(job.state[part])
    assert memory.by_kind(job)["parameters"] < 0.5 * 4 * job.task.model.num_params  # really cut


def test_more_memory_is_asked_for_where_more_is_kept():
    job = emulated()

    def total(changes):
        return memory.total(job.changed(changes))

    assert total({"batch_size": 64}) > total({"batch_size": 32}) > total({})
    assert total({"model.remat": "none"}) > total({"model.remat": "dots"}) > total({"model.remat": "full"})
    assert total({"run.mesh.fsdp": 2, "run.mesh.replica": 4}) > total({})


def test_what_the_compiler_refuses_is_no_fit():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 130.50G of 95.74G hbm."
    assert compiled._wanted(message) == int(130.5 * 2**30)
    assert compiled._wanted("RESOURCE_EXHAUSTED: no number") == 0


def test_json_has_the_promised_keys(result):
    figures = json.loads(json.dumps(preflight._json(result)))
    assert figures["parameters"] == build("transformer", result.job.settings.model).num_params
    assert figures["fits"] is True and figures["chip_bytes"] == 84_942_979_072
    kinds = dict(figures["bytes_per_chip"])
    assert kinds.pop("total") == sum(kinds.values())
    held = {"parameters", "optimizer", "ema", "frozen", "compression"}
    assert kinds.keys() == held | {"gradients", "activations", "temporaries"} and kinds["compression"] == 0
    assert figures["flops_per_sequence"] == flops.transformer(result.job.task.model.config)
    assert figures["tokens_per_second"] > 0
    assert {"kind", "axis", "count", "bytes", "inside"} == figures["collectives"][0].keys()


def test_the_compiled_update_gathers_and_reduces_along_its_mesh(result):
    kinds = {(c.kind, c.axis) for c in result.verdict.collectives}
    assert any(kind == "all-gather" and "fsdp" in axis for kind, axis in kinds)
    assert any(kind in ("all-reduce", "reduce-scatter") for kind, _ in kinds)


def test_report_says_the_verdict_and_the_change(result):
    text = report.table(result, None)
    assert text.splitlines()[-1].startswith("FITS") and "bound by" in text and "all-gather" in text
    too_large = search.Result(**{**vars(result), "verdict": compiled.Verdict(fits=False, total_bytes=10**11)})
    changed = search.Result(**{**vars(result), "changed": {"accumulate": 2}})
    text = report.table(too_large, changed)
    assert "DOES NOT FIT" in text and "--config.accumulate=2" in text and "by our model: the compiler gave" in text
    assert "does not fit" in report.sweep_table([changed, too_large])


def test_a_program_that_cannot_be_read_exchanges_what_its_mesh_needs(result, monkeypatch):
    """libtpu cannot print some programs; the table and the roofline have their network nevertheless."""
    unread = dataclasses.replace(result.verdict, collectives=None)
    monkeypatch.setattr(search, "compile_update", lambda job: unread)
    found = search.examine(result.job)
    assert found.collectives == [c for c in roofline.expected(result.job) if c.bytes] and found.collectives
    assert found.estimate.seconds["inside"] > 0
    figures = preflight._json(found)
    assert figures["collectives"] and not figures["collectives_compiled"]
    assert preflight._json(result)["collectives_compiled"]


def test_documented_tables_agree_with_the_byte_model():
    """Of every job that fits; of one that is far too large the compiler's schedule is not worth much."""
    text = (ROOT / "docs" / "pods_preflight.md").read_text()
    tables = re.findall(
        r"total +([\d.]+)   by our model\n +([\d.]+)   by the compiler.*?^(FITS|DOES NOT FIT)", text, re.M | re.S
    )
    assert len(tables) == 8 and [verdict for *_, verdict in tables].count("FITS") >= 5
    for ours, compilers, verdict in tables:
        if verdict == "FITS":
            assert float(ours) == pytest.approx(float(compilers), rel=0.15)


def test_the_smallest_change_is_one_that_was_compiled(result, monkeypatch, capsys):
    """The byte model proposes, the compiler decides: of all single changes only the one it accepts is reported."""
    asked = result.job.changed({"model.remat": "full"})
    size = memory.total(asked) - 1  # nearly fits: most single changes are enough for the byte model
    chip = hardware.Chip("tiny", "gpu", size, asked.topology.chip.peak_flops, 1e12, 1e11, 1e10)
    job = dataclasses.replace(asked, topology=topology.Topology(chip, (1, 8)))

    def only_16_bits(job):
        fits = job.settings.storage.params == "bf16"
        return compiled.Verdict(fits=fits, total_bytes=memory.total(job), collectives=[])

    monkeypatch.setattr(search, "compile_update", only_16_bits)
    first = search.examine(job)
    assert not first.verdict.fits
    found = search.smallest_change(first)
    assert dict(found.changed) == {"storage.params": "bf16"} and found.verdict.fits
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "trying --config.storage.params=bf16" and len(lines) > 1


def test_a_candidate_that_failed_says_how_far_to_trust_the_byte_model(result, monkeypatch, capsys):
    """The compiler wants twice the model's bytes: after the first, only what has room for that is compiled."""
    job = result.job

    def twice(job):
        total = 2 * memory.total(job)
        return compiled.Verdict(fits=total <= job.topology.usable_bytes, total_bytes=total, collectives=[])

    monkeypatch.setattr(search, "compile_update", twice)
    chip, size = dataclasses.replace(job.topology.chip, usable_share=1.0), memory.total(job)
    chips = [dataclasses.replace(chip, memory_bytes=int(share * size)) for share in (1.5, 1.9, 2.1)]
    pods = [topology.Topology(chip, (1, 8)) for chip in chips]
    candidates = [({"topology": str(i)}, dataclasses.replace(job, topology=pod)) for i, pod in enumerate(pods)]
    found = search._confirmed(candidates)
    assert capsys.readouterr().err == "trying --topology 0\ntrying --topology 2\n" and found.verdict.fits


def test_roofline_names_what_binds(result):
    job = result.job
    slow = collectives.Collective("all-reduce", "replica", inside=False, count=1, bytes=10**12)
    guess = roofline.estimate(job, [slow])
    assert guess.binding == "outside" and guess.step_seconds == pytest.approx(10**12 / (50e9 * roofline.LINK_SHARE))
    assert guess.tokens_per_second == pytest.approx(16 * job.task.model.config.layout.length / guess.step_seconds)
    assert guess.days == pytest.approx(100 * guess.step_seconds / 86_400)


def test_a_wrong_batch_or_dvae_is_the_users_error():
    with pytest.raises(UserError, match="multiple of 8"):
        _ = emulated().changed({"batch_size": 12}).mesh
    with pytest.raises(UserError, match="grid, vocabulary and pixels"):
        _ = emulated().changed({"model.grid": 4}).task


def test_a_clip_is_refused():
    with pytest.raises(UserError, match="knows dvae, vq and transformer configs, got a clip"):
        _ = Job(load_settings("configs/clip.py:b32"), topology.parse("gpu:h100:1x8"), ()).task


def test_a_process_with_jax_is_refused(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    with pytest.raises(UserError, match="has not imported JAX"):
        preflight.main(types.SimpleNamespace(topology="gpu:h100:1x8", config="", overrides=[], json=False, sweep=False))


def test_array_bytes():
    assert collectives.array_bytes("bf16[3,4]{1,0:T(8,128)(2,1)}") == 24
    assert collectives.array_bytes("(f32[], pred[8], s4[3])") == 4 + 8 + 2
    assert np.dtype("float32").itemsize == collectives.array_bytes("f32[1]")
