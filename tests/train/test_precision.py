"""float16 with one scale for all gradients, and with one a residual branch: what is in which format, what underflows
and what does not, how scales move, and that they are part of the state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build, transformer
from dalle_jax.train import run
from dalle_jax.train.monitor import metrics
from dalle_jax.train.optimizer import loss_scale
from tests.support import small_models
from tests.support.demo_settings import demo_settings
from tests.support.line_task import Numbers, train
from tests.support.precisions import TINY, equations, loss_of, plain_step, task_of, tokens

# A deep narrow model in which no single scale serves all gradients.

DEEP = dataclasses.replace(TINY, num_layers=12, remat="none", precision="fp32")


def deep_params():
    """Loud first layers read a stream of 2^-7 and write one of 2^11, which the others hardly change: their values and
    outputs are small, so the gradients of their queries and keys are 2^-40 of those of the first layers."""
    params = transformer.model(DEEP).init(jax.random.key(0))
    rng = np.random.default_rng(0)

    def normal(name, loud, quiet):
        shape = params["blocks"][name].shape
        sizes = np.where(np.arange(DEEP.num_layers) < 2, loud, quiet)
        return rng.normal(size=shape) * sizes.reshape(-1, *(1,) * (len(shape) - 1))

    blocks = dict(params["blocks"])
    blocks["up"], blocks["down"] = normal("up", 2.0**1, 2.0**-2), normal("down", 2.0**6, 2.0**-10)
    blocks["qkv"], blocks["out"] = normal("qkv", 2.0**-2, 2.0**-2), normal("out", 2.0**-2, 2.0**-14)
    blocks["qkv"][2:, :, 2] *= 2.0**-8  # values
    matrices = {n: np.float16(blocks[n]).astype(np.float32) for n in ("up", "down", "qkv", "out")}  # float16 holds them
    tables = {n: 2.0**-8 * rng.normal(size=params[n].shape) for n in params if "embedding" in n or "position" in n}
    heads = {n: 2.0**2 * rng.normal(size=params[n].shape) for n in ("text_head", "image_head")}
    wide = {n: np.float32(x) for n, x in (tables | heads).items()}
    return params | wide | {"blocks": params["blocks"] | matrices}


@functools.cache
def deep_gradients(precision):
    """gradients(scale) of the blocks in float32, undone of what one scale for all made of them."""
    model, params, batch = (
        transformer.model(dataclasses.replace(DEEP, precision=precision)),
        deep_params(),
        tokens(0, 2),
    )

    @jax.jit
    def gradients(scale):
        if precision == "fp16-paper":
            return jax.grad(lambda p: loss_of(model, p, batch, scale))(params)["blocks"]
        grads = jax.grad(lambda p: loss_of(model, p, batch) * scale)(params)["blocks"]
        return jax.tree.map(lambda g: g / scale, grads)

    return gradients


def errors(grads, wanted):
    """Relative error in norm of each layer's parameters, queries, keys and values apart: name -> [L]."""

    def parts(tree):
        apart = {f"{n} {i}": tree[n].take(i, -3) for n in ("qkv", "qkv_bias") for i in range(3)}
        return {n: x for n, x in tree.items() if n not in ("qkv", "qkv_bias")} | apart

    def norm(x):
        return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)

    return {
        n: norm(np.float64(g) - np.float64(w)) / norm(w)
        for (n, g), w in zip(parts(grads).items(), parts(wanted).values(), strict=True)
    }


def test_no_single_scale_serves_a_deep_model():
    """Whatever the scale, something overflows or the last layers' queries lose at least half of their gradient."""
    wanted = deep_gradients("fp32")(1.0)
    for power in range(-8, 48, 2):
        grads = deep_gradients("fp16-global")(2.0**power)
        if all(np.isfinite(g).all() for g in grads.values()):
            assert errors(grads, wanted)["qkv 0"][2:].max() > 0.5, power
    tried = deep_gradients("fp16-global")(2.0**0)
    assert all(np.isfinite(g).all() for g in tried.values())  # and one that does not overflow was among them


def test_a_scale_a_branch_serves_it():
    """Within float16's rounding, 2^-11 a number, which a few dozen products pile up to less than 1 %."""
    wanted, gradients, shape = deep_gradients("fp32")(1.0), deep_gradients("fp16-paper"), (DEEP.num_layers, 2)
    rule = loss_scale.for_model(transformer.model(dataclasses.replace(DEEP, precision="fp16-paper")), replicas=1)
    powers = np.full(shape, 24)
    assert 2.0 ** powers.max() == rule.max_scale
    while not (finite := np.asarray(rule.finite({"blocks": gradients(2.0**powers)}))).all():
        powers = np.where(finite, powers, powers - 1)  # each branch by itself
    assert powers.min() > 7 and np.ptp(powers) > 8  # what the rule allows, and not one scale for all
    found = errors(gradients(2.0 ** (powers - 1)), wanted)
    assert max(error.max() for name, error in found.items() if name != "qkv_bias 1") < 0.01, found
    # The gradient of the keys' bias is 0 but for rounding: a softmax does not notice what all scores have in common.


# Which tensor has which format.


@pytest.mark.parametrize("precision, half", [("fp16-paper", "float16"), ("bf16-paper", "bfloat16")])
def test_formats_of_all_tensors_are_the_papers(precision, half):
    """16 bits in the products of the blocks, float32 in stream, logits, and every gradient that leaves the model."""
    model, batch = task_of(precision).model, tokens(0)
    scales = jnp.ones((2, 2)) if precision == "fp16-paper" else None
    program = jax.make_jaxpr(jax.grad(lambda p, s: loss_of(model, p, batch, s)))(model.abstract, scales)
    assert {v.aval.dtype.name for v in program.jaxpr.outvars} == {"float32"}

    def of(eqn):
        return {v.aval.dtype.name for v in eqn.invars}

    vocabularies, stream, inside = {TINY.layout.text_ids, TINY.image_vocab}, (8, 20, 16), 0
    for eqn in equations(program.jaxpr):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "shape")]
        if eqn.primitive.name == "dot_general":
            if any(vocabularies & set(shape) for shape in shapes):  # logits and their gradients
                assert of(eqn) == {"float32"} and eqn.outvars[0].aval.dtype == jnp.float32
            else:
                inside += 1
                of_scores = any(eqn.params["dimension_numbers"][1])  # batched; their gradients are float32
                assert half in of(eqn) if of_scores else of(eqn) == {half}, eqn
        if eqn.primitive.name == "scan" and not eqn.params["reverse"]:
            assert [v.aval.dtype.name for v in eqn.outvars if v.aval.shape == stream] == ["float32"]  # what it carries
    assert inside > 3 * 6  # forward, computed again and backward: q, k, v; out; up; down; scores and sums


# Scales over updates.


def updates(precision, *, count, many=False, state=None):
    step = plain_step(precision, on_mesh=many)
    state, measured = state or step.init(jax.random.key(0)), []
    for index in range(count):
        state, values = step.update(state, {}, sharding.shard_batch(tokens(index), step.mesh), jax.random.key(1))
        measured.append(jax.device_get(values))
    return state, measured


@functools.cache
def in_float32():
    return updates("fp32", count=4)[1]


@pytest.mark.parametrize(
    "precision, many", [pytest.param("fp16-global", False, marks=pytest.mark.slow), ("fp16-paper", True)]
)
def test_float16_learns_like_float32(precision, many):
    state, measured = updates(precision, count=4, many=many)
    assert int(state["skipped"]) == 0
    for name in ("loss", "grad_norm"):  # a few roundings of 2^-11
        np.testing.assert_allclose([m[name] for m in measured], [m[name] for m in in_float32()], rtol=5e-3)


def test_the_dvae_learns_in_float16_with_one_scale_as_in_the_paper():
    """Appendix A.2. The same noise in every update, so the curves agree to a few roundings of 2^-11."""
    (wanted, _), (found, state) = (
        small_models.train("dvae", (1, 1, 1), values={"model.precision": p}) for p in ("fp32", "fp16-global")
    )
    assert int(state["skipped"]) == 0 and float(state["scales"]["scale"]) == 2.0**16
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=2e-3)
    np.testing.assert_allclose(found[:, 1], wanted[:, 1], rtol=2e-2)
    assert (found != wanted).any()  # it was float16


def test_an_overflow_moves_only_the_scale_of_its_branch():
    state = plain_step("fp16-paper", on_mesh=True).init(jax.random.key(0))
    head = 0.1 * jnp.arange(TINY.image_vocab)[None] * jnp.ones_like(state["params"]["image_head"])
    state["params"]["image_head"] = jax.device_put(head, state["params"]["image_head"].sharding)  # else it is zero
    start, before = np.asarray(state["scales"]["scale"]), jax.device_get(state["params"])
    assert (start == 8 * 2.0**13).all()
    scale = state["scales"]["scale"].at[1, 1].set(2.0**60)
    state["scales"]["scale"] = jax.device_put(scale, state["scales"]["scale"].sharding)
    state, (measured,) = updates("fp16-paper", count=1, many=True, state=state)
    grown, most = start[0, 0] * 2 ** (1 / 1000), 8 * 2.0**24
    np.testing.assert_allclose(state["scales"]["scale"], [[grown, grown], [grown, most]], rtol=1e-6)
    np.testing.assert_array_equal(state["scales"]["since"], [[126, 126], [126, 0]])
    assert int(state["skipped"]) == 1 and not np.isfinite(measured["grad_norm"]) and np.isfinite(measured["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), before)
    np.testing.assert_allclose(measured["log2_scale"], [[16, 16], [16, 60]], rtol=1e-6)


def test_scales_rise_fall_wait_and_stay_in_bounds():
    rule = loss_scale.for_model(transformer.model(TINY), replicas=4)
    state, ok = rule.init(), jnp.ones((2, 2), bool)
    assert float(state["scale"][0, 0]) == 4 * 2.0**13
    bad = ok.at[0, 1].set(False)
    history = []
    for index in range(127):
        state = rule.updated(state, bad if index in (0, 50, 124, 125) else ok)
        history.append(np.asarray(state["scale"]) / (4 * 2.0**13))
    up = 2.0 ** (1 / 1000)
    np.testing.assert_allclose(history[0], [[up, 2**-0.5], [up, up]], rtol=1e-6)
    np.testing.assert_allclose(history[50][0, 1], history[49][0, 1], rtol=1e-7)  # neither falls nor grows
    np.testing.assert_allclose(history[124][0, 1] / history[123][0, 1], 1.0, rtol=1e-7)  # 124 updates after it
    np.testing.assert_allclose(history[125][0, 1] / history[124][0, 1], 2**-0.5, rtol=1e-6)  # 125
    np.testing.assert_allclose(history[126][1, 1], up**127, rtol=1e-4)
    for value, wanted in [(2.0**40, rule.max_scale), (1.0, rule.min_scale)]:
        far = {**state, "scale": jnp.full((2, 2), value), "since": jnp.full((2, 2), 999)}
        assert set(np.ravel(rule.updated(far, ok)["scale"])) == {wanted}
    assert (rule.min_scale, rule.max_scale) == (4 * 2.0**7, 4 * 2.0**24)


def test_the_global_scale_doubles_after_2000_updates_and_halves_at_once():
    rule = loss_scale.for_model(build("dvae", {"precision": "fp16-global"}), replicas=4)
    state = jax.lax.fori_loop(0, 1999, lambda _, s: rule.updated(s, jnp.array(True)), rule.init())
    assert float(state["scale"]) == 2.0**16
    state = rule.updated(state, jnp.array(True))
    assert float(state["scale"]) == 2.0**17
    assert float(rule.updated(rule.updated(state, jnp.array(False)), jnp.array(False))["scale"]) == 2.0**15
    assert not loss_scale.for_model(build("dvae", {}), replicas=4).init()


class Tokens(Numbers):
    """Batches for the loop that depend on their number alone."""

    def batch(self, number):
        return tokens(number)


COMPRESSED = {"compression": {"rank": 4, "format": "paper"}}


@pytest.mark.usefixtures("compile_once")
@pytest.mark.parametrize(
    "sizes, compression", [({}, {}), pytest.param({"replica": 2, "fsdp": 2}, COMPRESSED, marks=pytest.mark.slow)]
)  # a minute, for a program of each of four devices
def test_a_run_goes_on_bit_for_bit_and_logs_every_scale(tmp_path, sizes, compression):
    """With the paper's moments; and with everything that the paper has, together."""
    mesh = make_mesh(sizes, devices=jax.devices()[: 4 if sizes else 1])
    run_in = functools.partial(
        train, task=task_of("fp16-paper"), mesh=mesh, optimizer={"moments": "paper"}, **compression
    )
    straight = run_in(tmp_path / "straight", Tokens(), steps=8)
    run_in(tmp_path / "stopped", Tokens(), steps=4)
    resumed = run_in(tmp_path / "stopped", Tokens(), steps=8)
    for part in ("opt_state", "error") if compression else ("opt_state",):
        assert "uint16" in {leaf.dtype.name for leaf in jax.tree.leaves(straight.state[part])}
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r.state) for r in (straight, resumed)))
    last = metrics.read(tmp_path / "stopped" / "metrics.jsonl")[-1]
    scales = {name: value for name, value in last.items() if "scale" in name}
    assert sorted(scales) == [f"train/log2_scale/{block:03d}" for block in range(4)]  # layer 0: attention, MLP; 1: ...
    # The mean over updates 5 to 8 of the exponent before each, which grows by 1/1000; where two devices of a replica
    # share its batch, of scales twice as large.
    start = 14 if compression else 13
    np.testing.assert_allclose(list(scales.values()), start + 0.0055, atol=1e-4)
    assert float(straight.state["scales"]["scale"][0, 0]) == pytest.approx(2 ** (start + 8 / 1000), rel=1e-6)
    assert (tmp_path / "stopped" / "curves.png").exists()


def test_a_scale_on_its_way_down_is_no_reason_to_go_back(tmp_path):
    """It may fall once in 125 updates and all of them are skipped until it has: more than `rollback_after`, and more
    than `log_every`, by which a run without a checkpoint ends."""
    rule = loss_scale.for_model(task_of("fp16-paper").model, replicas=1)
    assert rule.patience == 8 * rule.hold and loss_scale.for_model(build("dvae", {}), replicas=1).patience == 0

    def blow(n, state):
        if n == 2:  # far above the rule's bounds: an update later at the upper one, where this head overflows too
            place = state["scales"]["scale"].sharding
            state["scales"]["scale"] = jax.device_put(jnp.full((2, 2), 2.0**60), place)
            head = state["params"]["image_head"]
            loud = jnp.full(head.shape, 1e3).at[:, ::2].set(-1e3)
            state["params"]["image_head"] = jax.device_put(loud, head.sharding)

    mesh = make_mesh({}, devices=jax.devices()[:1])
    options = {"task": task_of("fp16-paper"), "mesh": mesh, "hooks": [(1, blow)], "rollback_after": 3}
    done = train(tmp_path, Tokens(), steps=20, checkpoint_every=None, **options)
    assert (done.step, int(done.state["skipped"])) == (20, 18)


# One way to say it, and combinations that make no sense.


def test_float16_is_refused_on_a_tpu(monkeypatch, tmp_path):
    settings = demo_settings("transformer", {"model.precision": "fp16-global"})
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="fp16-global, got a TPU, .* set --config.model.precision=bf16"):
        run.train(settings, tmp_path)


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("dvae", {"model.precision": "fp16-paper"}, "about the transformer's branches, got a dVAE: use fp16-global"),
        ("clip", {"model.precision": "bf16-paper"}, "got a CLIP: use bf16"),
        ("clip", {"model.precision": "fp16-paper"}, "got a CLIP: use fp16-global"),
        ("transformer", {"model.precision": "fp16"}, "precision must be one of .*fp16-global"),
        ("transformer", {"model.precision": "fp16-paper", "storage.params": "bf16"}, "config.storage.params = fp32"),
        ("transformer", {"optimizer.name": "muon", "optimizer.moments": "paper"}, "made for Adam's two moments"),
        ("transformer", {"run.offload_ema": True, "ema.decay": 0.0}, "average is the parameters"),
    ],
)
def test_what_makes_no_sense_is_refused(name, values, message):
    with pytest.raises(UserError, match=message):
        demo_settings(name, values)
