"""Properties of one update that hold for every optimizer, way of keeping its state, and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dalle_jax import sharding
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.mesh import make_mesh
from dalle_jax.train.ema import Ema
from dalle_jax.train.optimizer.powersgd import Compression
from dalle_jax.train.optimizer.schedule import Plateau, Schedule, measured
from dalle_jax.train.settings import Storage
from dalle_jax.train.step import ema_params
from tests.support.toy_task import NAN, make_updates, one_device, toy_batch, toy_step
from tests.support.trees import close, identical

HALVING = Plateau(window=1, patience=1, min_improvement=0.5)  # again and again
# Name -> values of the optimizer, options of the step.
STEPS = {
    "adamw": ({}, {}),
    "adamw, moments bf16": ({"moments": "bf16"}, {}),
    "adamw, moments paper": ({"moments": "paper"}, {}),
    "adamw, parameters bf16": ({}, {"storage": Storage(params="bf16")}),
    "adamw, average on the host": ({}, {"offload_ema": True, "ema": Ema(decay=0.9, every=3)}),
    "adamw, halving": ({"schedule": Schedule("plateau", plateau=HALVING)}, {}),
    "muon": ({"name": "muon"}, {}),
    "muon, all bf16": ({"name": "muon", "moments": "bf16"}, {"storage": Storage(params="bf16")}),
    "adamw, compressed": ({}, {"compression": Compression(4, "paper")}),
    "paper": (
        {"moments": "paper"},
        {"storage": Storage(params="bf16"), "offload_ema": True, "compression": Compression(4, "paper")},
    ),
}
EVERY_STEP = pytest.mark.parametrize("name", STEPS)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "paper": "uint16"}


@functools.cache
def step_of(name, *, on_mesh=True):
    """On a mesh of all axes in two microbatches, or whole on one device."""
    optimizer, options = STEPS[name]
    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2}) if on_mesh else one_device()
    return toy_step(mesh, optimizer, accumulate=2 if on_mesh else 1, **options)


@functools.cache
def _first(name):
    step = step_of(name)
    return make_updates(step, step.init(jax.random.key(0)), [0])[0]


def after_one(name):
    """A state that may be donated."""
    return jax.tree.map(lambda x: jax.device_put(jnp.copy(x), x.sharding), _first(name))


@functools.cache
def single(name, updates=6):
    step = step_of(name, on_mesh=False)
    return make_updates(step, step.init(jax.random.key(0)), range(updates))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name in ("adamw", "adamw, moments bf16", "adamw, moments paper"))
        )
        for name, (_, options) in STEPS.items()
        if "compression" not in options
    ],
)
def test_sharded_and_in_microbatches_it_is_the_update_of_one_device(name):
    """float32 sums in another order differ by about 1e-7 of their size, which six updates may multiply; where 16 bits
    are kept, rounding to the other neighbor now and then is 2^-8."""
    state, found = make_updates(step_of(name), after_one(name), range(1, 6))
    wanted_state, (_, *wanted) = single(name)
    exact = "bf16" not in name and "moments" not in name
    close([m["loss"] for m in found], [m["loss"] for m in wanted], rtol=1e-5 if exact else 5e-3)
    close([m["grad_norm"] for m in found], [m["grad_norm"] for m in wanted], rtol=1e-4 if exact else 5e-2)
    if exact:
        close(state["ema"], wanted_state["ema"], rtol=1e-3, atol=1e-4)


@EVERY_STEP
def test_saved_and_restored_it_goes_on_bit_for_bit(name, tmp_path):
    step, checkpoints = step_of(name), Checkpoints(tmp_path, keep=1)
    saved = step.to_saved(make_updates(step, after_one(name), [1])[0])
    checkpoints.save(2, saved, {})
    _, restored, _ = checkpoints.restore_latest(step.saved)
    checkpoints.close()
    straight, _ = make_updates(step, step.from_saved(saved), [2, 3])
    resumed, _ = make_updates(step, step.from_saved(restored), [2, 3])
    identical(resumed, straight)


@EVERY_STEP
def test_a_skipped_update_changes_nothing_but_the_counts(name):
    step, state = step_of(name), after_one(name)
    before = jax.device_get(state)
    state, (values,) = make_updates(step, state, [1], frozen=NAN)
    kept = [part for part in before if part not in ("step", "skipped", "ema")]
    identical([state[part] for part in kept], [before[part] for part in kept])
    assert (int(state["step"]), int(values["skipped"])) == (2, 1) and not np.isfinite(values["grad_norm"])
    state, (values,) = make_updates(step, state, [1])
    assert int(values["skipped"]) == 1 and np.isfinite(values["loss"])
    assert np.abs(np.asarray(state["params"]["head"]) - before["params"]["head"]).max() > 0


@EVERY_STEP
def test_an_update_that_is_repeated_gives_the_same_bits(name):
    identical(*(make_updates(step_of(name), after_one(name), [1]) for _ in range(2)))


@EVERY_STEP
def test_the_state_lies_and_is_kept_as_its_abstract_says(name):
    """Only hidden matrices and what belongs to them in 16 bits, only the average on the host."""
    step, (optimizer, options) = step_of(name), STEPS[name]
    jax.tree.map(
        lambda x, a: np.testing.assert_equal((x.shape, x.dtype, x.sharding), (a.shape, a.dtype, a.sharding)),
        after_one(name),
        step.abstract,
    )
    storage, moments = options.get("storage", Storage()), DTYPES[optimizer.get("moments", "fp32")]
    trees = {"params": DTYPES[storage.params], "ema": "float32", "opt_state": moments}
    for part, dtype in trees.items():
        leaves = jax.tree_util.tree_leaves_with_path(step.abstract[part])
        copies = [(path[-1].key, leaf) for path, leaf in leaves if leaf.ndim and hasattr(path[-1], "key")]
        found = {(name, leaf.dtype.name) for name, leaf in copies}
        assert found == {(name, dtype if name == "matrix" else "float32") for name in step.abstract["params"]}
        specs = {leaf.sharding.spec for name, leaf in copies if name == "matrix"}
        assert specs == {jax.sharding.PartitionSpec(None, "fsdp", "tensor")}  # all copies are cut
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.abstract):
        on_host = step.offload_ema and path[0].key == "ema"
        assert leaf.sharding.memory_kind == (sharding.HOST if on_host else "device"), path
    assert ("error" in step.abstract) == ("compression" in options)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (1, 4, 2)])
def test_every_mesh_gives_the_curve_of_one_device(sizes):
    step = toy_step(make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=True))))
    state, found = make_updates(step, step.init(jax.random.key(0)), range(6))
    wanted_state, wanted = single("adamw")
    close([m["loss"] for m in found], [m["loss"] for m in wanted], rtol=1e-5)
    close([m["grad_norm"] for m in found], [m["grad_norm"] for m in wanted], rtol=1e-4)
    close(state["ema"], wanted_state["ema"], rtol=1e-3, atol=1e-5)
    for tree in (state["params"], optax.tree.get(state["opt_state"], "mu")):
        assert tree["matrix"].addressable_shards[0].data.size == tree["matrix"].size // (sizes[1] * sizes[2])


def test_training_learns_and_the_average_follows():
    step = step_of("adamw", on_mesh=False)
    state, found = make_updates(step, step.init(jax.random.key(0)), range(40), batch=lambda _: toy_batch(0))
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert int(state["step"]) == 40 and int(state["skipped"]) == 0
    np.testing.assert_allclose(found[3]["twice"], 2 * found[3]["loss"], rtol=1e-6)
    ema, params = (jax.device_get(state[name]["head"]) for name in ("ema", "params"))
    assert 0 < np.abs(ema - params).max()


def test_the_average_moves_every_nth_update_only_and_holds_nothing_of_the_initial_parameters():
    """Of n parameters the k-th weighs decay^(n - k), over the sum of these weights."""
    step, seen = toy_step(ema=Ema(decay=0.75, every=2)), []
    state = step.init(jax.random.key(0))
    for number in range(8):
        before = jax.device_get(state["ema"])
        state, _ = make_updates(step, state, [number])
        if number % 2 == 0:
            identical(state["ema"], before)
            continue
        seen.append(jax.device_get(state["params"]))
        weights = [0.75 ** (len(seen) - k) for k in range(1, len(seen) + 1)]
        wanted = jax.tree.map(lambda *x, w=weights: np.average(np.float64(x), axis=0, weights=w), *seen)
        close(state["ema"], wanted, rtol=1e-5, atol=1e-6)


def test_the_decay_rises_from_nothing_to_what_is_asked_for():
    slow = Ema(decay=0.999)
    assert float(slow.decay_at(jnp.int32(1))) == 0.0
    for n in (2, 10, 1_000, 100_000):
        wanted = 0.999 * (1 - 0.999 ** (n - 1)) / (1 - 0.999**n)
        assert float(slow.decay_at(jnp.int32(n))) == pytest.approx(wanted, rel=1e-6), n
    assert float(slow.decay_at(jnp.int32(10**5))) == np.float32(0.999)


def test_an_average_in_host_memory_is_the_same():
    """But for the rounding of sums of numbers up to 1, which the compiler may contract to other operations."""
    states = []
    for offload_ema in (False, True):
        step = toy_step(offload_ema=offload_ema)
        states.append(make_updates(step, step.init(jax.random.key(0)), range(3))[0])
    close(*states, rtol=1e-6, atol=1e-7)
    average = ema_params(states[1])
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(average)} == {"device"}
    identical(average, states[1]["ema"])


def test_without_decay_the_average_is_the_parameters():
    step = toy_step(ema=Ema())
    state, _ = make_updates(step, step.init(jax.random.key(0)), range(2))
    identical(state["ema"], state["params"])


def test_steps_halve_where_the_loss_stands_still():
    state, found = single("adamw, halving")
    assert 0.5**5 <= float(measured(state["opt_state"])["plateau_scale"]) == found[-1]["plateau_scale"] < 1
