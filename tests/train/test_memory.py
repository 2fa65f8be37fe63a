"""What saves memory: the remat ladder, 16-bit parameters and moments, the average in host memory."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from dalle_jax import config as configs
from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import transformer
from dalle_jax.models.blocks import REMAT
from dalle_jax.models.layers import Model, param
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.train import loop, run
from dalle_jax.train.ema import Ema
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer import formats, moments, schedule
from dalle_jax.train.optimizer.build import Optimizer, build_optimizer
from dalle_jax.train.step import Storage, TrainStep, ema_params
from tests.support import line_task

# The remat ladder.


def kept_units(remat, kind="row", attention="xla"):
    """What a bfloat16 layer of the paper's size keeps for the backward pass, in values of 2 bytes per token and width.

    Counted on abstract values: the residuals of `jax.vjp` but for the layer's own parameters.
    """
    config = TransformerConfig(num_layers=1, pattern="full", remat=remat, scan=False, attention=attention)
    config.__dict__["kinds"] = (kind,)  # a single layer is 'conv' by the pattern
    shapes = transformer.model(config).abstract["blocks"]
    block = {
        name: jax.ShapeDtypeStruct(s.shape, jnp.float32 if name.startswith("norm") else jnp.bfloat16)
        for name, s in shapes.items()
    }
    tokens = config.layout.text_len + config.layout.image_len
    x = jax.ShapeDtypeStruct((1, tokens, config.width), jnp.bfloat16)
    residuals = jax.eval_shape(
        lambda block, x: jax.vjp(lambda b, x: transformer.run_layers(b, x, config), block, x)[1], block, x
    )
    own = {s.shape for s in block.values()} | {s.shape[1:] for s in block.values()}
    total = sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(residuals) if r.shape not in own)
    return total / (2 * tokens * config.width)


@pytest.mark.parametrize("remat, units", [("none", 56), ("attention", 34), ("dots", 9), ("full", 2)])
def test_each_step_of_the_ladder_keeps_what_its_documentation_says(remat, units):
    assert round(kept_units(remat)) == units
    assert f"{remat:11}{units:5}" in transformer.run_layers.__doc__


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_a_fused_kernel_keeps_no_scores(kind):
    assert round(kept_units("none", kind, attention="pallas")) == 35
    assert round(kept_units("attention", kind, attention="pallas")) == 34
    assert "'none' is 35" in transformer.run_layers.__doc__


SMALL = TransformerConfig(
    num_layers=4,
    width=32,
    heads=8,
    head_size=4,
    text_len=16,
    text_vocab=8,
    grid=8,
    image_vocab=8,
    pattern="full",
    scan=True,
    precision="fp32",
)


def ids(config):
    """Text and codes of eight sequences."""
    rng = np.random.default_rng(1)
    return tuple(rng.integers(0, 8, (8, n)).astype(np.int32) for n in (config.text_len, config.layout.image_len))


@functools.cache
def compiled(remat):
    config = dataclasses.replace(SMALL, remat=remat)
    model = transformer.model(config)

    def loss(params, text, image):
        return sum(jnp.square(x).mean() for x in model.apply(params, text, image))

    text, image = ids(config)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(model.abstract)
    params = tree.unflatten([rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])
    program = jax.jit(jax.value_and_grad(loss)).lower(params, text, image).compile()
    return program.memory_analysis().temp_size_in_bytes, program(params, text, image)


def test_compiled_bytes_fall_along_the_ladder_and_values_and_gradients_do_not_change():
    assert list(REMAT) == ["none", "attention", "dots", "full"]
    size, wanted = compiled("none")
    for remat in list(REMAT)[1:]:
        smaller, found = compiled(remat)
        assert smaller < 0.95 * size, remat
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)
        size = smaller


def update_bytes(remat):
    """Temporaries of an update of layers that are not in a loop, as the paper's last one and those before it are."""
    model = transformer.model(dataclasses.replace(SMALL, num_layers=3, remat=remat, scan=False))

    def loss(params, frozen, batch, *, key, step):
        return sum(jnp.square(x).mean() for x in model.apply(params, *batch)), {}

    task, mesh = Task("transformer", model, loss), make_mesh({}, devices=jax.devices()[:1])
    opt = optax.with_extra_args_support(optax.sgd(0.1))
    step = TrainStep(task, opt, mesh)
    shapes = step.abstract, {}, ids(model.config), jax.random.key(0)
    found = step.update.lower(*shapes).compile().memory_analysis()
    assert found.alias_size_in_bytes >= 8 * model.num_params  # the donated state holds the new one, average included
    return found.temp_size_in_bytes


def test_layers_outside_a_loop_are_not_kept_either():
    """XLA's CPU backend does so unless it is told not to: then both are the same size."""
    assert update_bytes("full") < 0.7 * update_bytes("none")


# 16 bits.


def test_rounding_at_random_keeps_the_mean_and_what_is_exact():
    exact = jnp.array([0.0, -0.0, 1.0, -2.5, 2.0**127, -(2.0**-120), jnp.inf, -jnp.inf, jnp.nan])
    for seed in range(5):
        rounded = moments.round_at_random(exact, jax.random.key(seed))
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(rounded.astype(jnp.float32), exact)
    x = jnp.full(100_000, 1.0 + 2**-7 * 0.3)  # three tenths of the way from 1 to its neighbour
    rounded = moments.round_at_random(x, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1.0 + 2**-7}
    assert float((rounded > 1).mean()) == pytest.approx(0.3, abs=0.01)  # six standard deviations
    np.testing.assert_array_equal(moments.round_at_random(-x, jax.random.key(0)), -rounded)


AXES = {
    "table": ("vocab", "embed"),
    "gain": ("embed",),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
}
HIDDEN = {"up", "down"}


class Net(nnx.Module):
    """Looks up a row of a table and runs it through a gain and layers of two matrices."""

    def __init__(self, rngs, layers=2, width=64):
        self.table = param(rngs, (32, width), axes=AXES["table"], std=0.3)
        self.gain = param(rngs, (width,), axes=AXES["gain"], fill=1.0)
        self.up = param(rngs, (layers, width, 2 * width), axes=AXES["up"], std=width**-0.5)
        self.down = param(rngs, (layers, 2 * width, width), axes=AXES["down"], std=0.01)

    def __call__(self, ids):
        x = self.table[...][ids] * self.gain[...]
        for up, down in zip(self.up[...], self.down[...], strict=True):
            x = x + jnp.tanh(x @ up.astype(x.dtype)) @ down.astype(x.dtype)
        return x


MODEL = Model(types.SimpleNamespace(), Net)
TEACHER = np.random.default_rng(7).normal(size=(32, 64)).astype(np.float32)


def loss(params, frozen, batch, *, key, step):
    del frozen, key, step
    value = jnp.square(MODEL.apply(params, batch["ids"]) - jnp.asarray(TEACHER)[batch["ids"]]).mean()
    return value, {}


TASK, FLOAT32 = Task("net", MODEL, loss), Storage()


def built(**values):
    config = ml_collections.ConfigDict(configs.load("configs/dvae.py:paper").optimizer.to_dict())
    config.schedule.update(name="warmup_constant", warmup_steps=0)
    config.update({"learning_rate": 3e-3, **values})
    return build_optimizer(Optimizer(**config), steps=1000, axes=MODEL.axes)


def train(opt, *, updates, storage=FLOAT32, accumulate=1, mesh=None):
    mesh = mesh or make_mesh({}, devices=jax.devices()[:1])
    step = TrainStep(TASK, opt, mesh, ema=Ema(decay=0.9), storage=storage, accumulate=accumulate)
    state = step.init(jax.random.key(0))
    rng, losses = np.random.default_rng(0), []
    for _ in range(updates):
        batch = sharding.shard_batch({"ids": rng.integers(0, 32, 16).astype(np.int32)}, mesh)
        state, measured = step.update(state, {}, batch, jax.random.key(1))
        losses.append(float(measured["loss"]))
    return losses, state


def dtypes(tree):
    return {name: leaf.dtype.name for name, leaf in tree.items()}


def hidden_in(dtype):
    return {name: dtype if name in HIDDEN else "float32" for name in AXES}


@pytest.mark.parametrize(
    "name, kept, dtype", [("adamw", "bf16", "bfloat16"), ("muon", "bf16", "bfloat16"), ("adamw", "paper", "uint16")]
)
def test_only_hidden_matrices_and_their_moments_are_kept_in_16_bits(name, kept, dtype):
    opt = built(name=name, moments=kept)
    _, state = train(opt, updates=2, storage=Storage(params="bf16"), accumulate=2)
    assert dtypes(state["params"]) == hidden_in("bfloat16")
    assert dtypes(state["ema"]) == hidden_in("float32")
    kinds = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt_state"]):
        if isinstance(path[-1], jax.tree_util.DictKey) and leaf.ndim:
            kinds.setdefault(path[-1].key, set()).add(leaf.dtype.name)
    assert kinds == {key: {value} for key, value in hidden_in(dtype).items()}
    _, plain = train(built(name=name), updates=2, storage=Storage(params="bf16"))
    sizes = {leaf.dtype.name for leaf in jax.tree.leaves(plain["opt_state"]) if leaf.ndim}
    assert sizes == {"float32"}  # moments do not follow the parameters' dtype


SIXTEEN = {
    "bf16": ({"moments": "bf16"}, "fp32"),
    "paper": ({"moments": "paper"}, "fp32"),
    "all": ({"moments": "bf16"}, "bf16"),
}


@functools.cache
def fp32_losses():
    return train(built(), updates=300)[0]


@pytest.mark.parametrize("kept", SIXTEEN)
def test_16_bits_learn_like_float32(kept):
    """By four orders of magnitude in 300 updates, and to where float32 ends."""
    values, params = SIXTEEN[kept]
    losses, _ = train(built(**values), updates=300, storage=Storage(params=params))
    first, end, wanted = losses[0], np.mean(losses[-50:]), np.mean(fp32_losses()[-50:])
    assert wanted < 1e-4 * first
    assert end < 1.1 * wanted  # measured: 1.003, 0.999 and 0.69 of float32's 3.8e-5


@pytest.mark.parametrize("kept", ["bf16", "paper"])
def test_a_slow_second_moment_is_not_frozen_by_rounding(kept):
    """With b2 = 0.999 and no gradient left, nu must fall to e^-1 in 1000 updates."""
    weights = {"w": jnp.ones((64, 64))}
    opt = moments.stored(optax.scale_by_adam(b2=0.999), matrices={"w": True}, kept=kept)
    state = jax.jit(opt.update)({"w": jnp.ones((64, 64))}, opt.init(weights), weights)[1]
    value = lambda nu: nu.astype(jnp.float32) if kept == "bf16" else formats.decode(nu, formats.SECOND)  # noqa: E731
    start = float(value(state.inner.nu["w"]).mean())
    zero = {"w": jnp.zeros((64, 64))}
    state, _ = jax.lax.scan(lambda s, _: (opt.update(zero, s, weights)[1], None), state, length=1000)
    end = float(value(state.inner.nu["w"]).mean())
    assert end == pytest.approx(start * np.exp(-1.0), rel=0.02)
    if kept == "bf16":  # the nearest number to what an update makes of it is itself
        nearest = jnp.bfloat16(start)
        assert jnp.bfloat16(np.float32(nearest) * np.float32(0.999)) == nearest


def test_rounding_repeats_when_an_update_is_repeated():
    runs = [train(built(moments="paper"), updates=3, storage=Storage(params="bf16"))[1] for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, runs))


@pytest.mark.parametrize("kept", ["bf16", "paper"])
def test_16_bits_on_a_mesh_halve_the_bytes_of_matrices(kept):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    _, state = train(built(moments=kept), updates=1, storage=Storage(params="bf16"), mesh=mesh)
    for tree in (state["params"], optax.tree.get(state["opt_state"], "mu"), optax.tree.get(state["opt_state"], "nu")):
        assert {shard.data.nbytes for shard in tree["up"].addressable_shards} == {2 * 64 * 128 * 2 // 8}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Storage(params="fp8"), "config.storage.params must be one of fp32, bf16, got 'fp8'"),
        (lambda: built(moments="fp16"), "config.optimizer.moments must be one of fp32, bf16, paper, got 'fp16'"),
        (lambda: built(name="muon", moments="paper"), "made for Adam's two moments"),
    ],
)
def test_unknown_dtypes_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# The average in host memory.


def test_an_average_in_host_memory_is_the_same():
    """But for the rounding of sums of numbers up to 1, which the compiler may contract to other operations."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    run = functools.partial(train, built(), updates=3, mesh=mesh)
    (_, state), (_, wanted) = run(storage=Storage(offload_ema=True)), run()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, *map(jax.device_get, (state, wanted)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.sharding.memory_kind == ("pinned_host" if path[0].key == "ema" else "device"), path
    average = ema_params(state)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(average)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (average, state["ema"])))


def test_a_run_with_its_average_in_host_memory_and_halved_steps_goes_on_bit_for_bit(tmp_path):
    """Stopped between two moves of the average, which is the one that is kept on the device."""

    def trained(name, steps, **storage):
        config = line_task.config(steps=steps, ema={"decay": 0.9, "every": 3})
        config.storage.update(storage)
        config.optimizer.schedule.name = "plateau"
        config.optimizer.schedule.plateau.update(window=1, patience=2, min_improvement=0.5)  # halves again and again
        mesh = make_mesh({}, devices=jax.devices()[:1])
        step = run.step_for(config, line_task.LINE, mesh)
        return loop.run(step, config, tmp_path / name, batches=line_task.Numbers(), progress=False)

    straight = trained("straight", 8, offload_ema=True)
    trained("stopped", 4, offload_ema=True)
    resumed = trained("stopped", 8, offload_ema=True)
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r.state) for r in (straight, resumed)))
    assert 0.5**5 < float(schedule.measured(resumed.state["opt_state"])["plateau_scale"]) < 0.5
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, *(jax.device_get(r.state["ema"]) for r in (straight, trained("plain", 8))))
    average, params = (np.asarray(straight.state[name]["matrix"]) for name in ("ema", "params"))
    assert np.abs(average - params).max() > 1e-3
