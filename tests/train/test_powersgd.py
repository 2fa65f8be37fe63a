"""PowerSGD: exact at full rank, what is left out comes later, what crosses the replica axis, and runs that go on."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import build
from dalle_jax.preflight import collectives
from dalle_jax.train import run
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer import powersgd
from dalle_jax.train.optimizer.powersgd import Compression, PowerSGD
from dalle_jax.train.settings import load_settings
from tests.support.demo_settings import demo_settings
from tests.support.line_task import LINE, train
from tests.support.precisions import equations, plain_step, step_of, task_of, tokens
from tests.support.trees import close

AXES = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed"), "gain": ("embed",)}
SHAPES = {"up": (2, 8, 32), "down": (2, 32, 8), "gain": (8,)}
ABSTRACT = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


@functools.cache
def made(replicas, fsdp, rank, form):
    mesh = make_mesh({"replica": replicas, "fsdp": fsdp, "tensor": 8 // (replicas * fsdp)})
    compressor = PowerSGD(ABSTRACT, AXES, compression=Compression(rank, form), mesh=mesh)
    return compressor, jax.jit(compressor.reduce)


def gradients(seed, replicas):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(replicas, *shape)), jnp.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("shape", [(3, 4, 12), (5, 16, 4), (2, 8, 8)])
def test_pieces_are_cut_and_joined_again(shape):
    """`_split` is in numpy what its docstring says, and `_join` undoes it."""
    abstract, mesh = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, make_mesh({"replica": 2, "fsdp": 4})
    compressor = PowerSGD(abstract, {"w": ("layers", "embed", "mlp")}, compression=Compression(4), mesh=mesh)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    split = jax.jit(lambda x: compressor._split("w", x))(x)
    wanted = np.stack(np.split(x, 4, axis=1 if shape[1] > shape[2] else 2), axis=1)
    np.testing.assert_array_equal(split, wanted if wanted.shape[2] <= wanted.shape[3] else wanted.swapaxes(2, 3))
    np.testing.assert_array_equal(jax.jit(lambda x: compressor._join("w", x))(split), x)


@pytest.mark.parametrize("replicas, fsdp", [(4, 2), (2, 2)])
def test_full_rank_is_the_exact_mean(replicas, fsdp):
    compressor, exchange = made(replicas, fsdp, 64, "fp32")
    grads = gradients(0, replicas)
    mean, norm, left_out = exchange(grads, compressor.init(), jax.random.key(0))
    wanted = jax.tree.map(lambda g: g.mean(0), grads)
    close(mean, wanted, atol=1e-5)  # numbers of size 1, two products in float32
    np.testing.assert_allclose(norm, np.sqrt(sum(np.square(g).sum() for g in wanted.values())), rtol=1e-5)
    replica_sum = {name: np.asarray(x).sum(0) for name, x in left_out.items()}
    close(replica_sum, jax.tree.map(np.zeros_like, replica_sum), atol=1e-4)  # each replica's own deviation stays


# Of what is sent and left out, the largest deviation from the identity: nothing but sums, or a rounding an update.
IDENTITY = {"fp32": 1e-5, "bf16": 2**-7, "paper": 2**-8}


@pytest.mark.parametrize("form", IDENTITY)
def test_what_was_applied_and_what_is_left_out_add_up_to_the_gradients(form):
    """Whatever the rank: after any number of updates, sum of updates + mean of what is left out = sum of gradients."""
    compressor, exchange = made(4, 2, 4, form)
    error, applied, wanted = compressor.init(), 0.0, 0.0
    for index in range(4):
        grads = gradients(index, 4)
        mean, norm, error = exchange(grads, error, jax.random.key(index))
        flat = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(mean)))
        np.testing.assert_allclose(norm, flat, rtol=1e-5 if form == "fp32" else 2**-7)  # of the factors
        applied = jax.tree.map(lambda a, b: a + np.asarray(b), applied, mean) if index else jax.device_get(mean)
        new = jax.tree.map(lambda g: np.asarray(g.mean(0)), grads)
        wanted = jax.tree.map(np.add, wanted, new) if index else new
    held = {name: x / 4 for name, x in compressor.pack(error).items()}
    assert np.linalg.norm(held["up"]) > 0.3 * np.linalg.norm(wanted["up"])  # much is left out at this rank
    close(applied["gain"], wanted["gain"], rtol=1e-5, atol=1e-6)
    for name in held:
        deviation = applied[name] + held[name] - wanted[name]
        assert np.sqrt(np.square(deviation).mean()) < 4 * IDENTITY[form], name


def test_what_a_gradient_is_compressed_by_is_drawn_once():
    """Another update, and so other random bits: the same gradients lead to the same mean."""
    compressor, exchange = made(4, 2, 4, "bf16")
    first, second = (exchange(gradients(0, 4), compressor.init(), jax.random.key(n)) for n in range(2))
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])
    assert all((np.asarray(first[2][n]) != np.asarray(second[2][n])).any() for n in first[2])  # rounded otherwise


def test_a_zero_gradient_stays_zero_and_the_largest_numbers_do_no_harm():
    compressor, exchange = made(4, 2, 4, "paper")
    zero = jax.tree.map(jnp.zeros_like, gradients(0, 4))
    mean, norm, left_out = exchange(zero, compressor.init(), jax.random.key(0))
    assert float(norm) == 0 and not any(np.asarray(x).any() for x in jax.tree.leaves((mean, left_out)))
    large = jax.tree.map(lambda g: 1e3 * g, gradients(0, 4))  # far beyond 16: sent and kept as the largest
    mean, norm, left_out = exchange(large, compressor.init(), jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((mean, compressor.pack(left_out), norm)))


def test_a_gradient_of_the_rank_that_is_kept_comes_through_whole():
    """Its columns span P but for the 1e-6 on P's diagonal (appendix E), which what is left out shows."""
    rng = np.random.default_rng(0)
    mesh, shape = make_mesh({"replica": 2}, devices=jax.devices()[:2]), (1, 64, 96)
    abstract, axes = {"up": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"up": AXES["up"]}
    compressor = PowerSGD(abstract, axes, compression=Compression(4, "fp32"), mesh=mesh)
    sides, _ = np.linalg.qr(rng.normal(size=(2, 96, 4)))
    matrix = (sides[0][:64] @ sides[1].T).astype(np.float32)
    grads = {"up": jnp.broadcast_to(matrix, (2, *shape))}
    mean, _, _ = jax.jit(compressor.reduce)(grads, compressor.init(), jax.random.key(0))
    assert np.linalg.norm(mean["up"][0] - matrix) < 1e-6 * np.linalg.norm(matrix)


def test_the_diagonal_of_p_has_1e_6():
    """A gradient of a single row comes back without that share of eps / sqrt(rows x rank), which the first rows get."""
    mesh, shape = make_mesh({"replica": 2}, devices=jax.devices()[:2]), (1, 4, 32)
    abstract, axes = {"up": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"up": AXES["up"]}
    compressor = PowerSGD(abstract, axes, compression=Compression(2, "fp32"), mesh=mesh)
    row = np.random.default_rng(0).normal(size=32).astype(np.float32)
    grads = {"up": jnp.zeros((2, *shape)).at[:, :, -1].set(row)}
    mean, _, _ = jax.jit(compressor.reduce)(grads, compressor.init(), jax.random.key(0))
    share = np.linalg.norm(mean["up"][0, :2]) / np.linalg.norm(row)
    assert share * np.sqrt(4 * 2) == pytest.approx(1e-6, rel=0.2)  # float32's rounding is a tenth of it


@pytest.mark.parametrize("variant, rank, saved", [("2b8", 512, 0.83), ("5b6", 640, 0.85), ("12b", 896, 0.86)])
def test_the_papers_ranks_save_what_its_table_says(variant, rank, saved):
    """Table 1: 1 - 5 rank / (8 width) on machines of eight GPUs."""
    model = build("transformer", load_settings(f"configs/transformer.py:{variant}").model)
    mesh = AbstractMesh((128, 8, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    found = powersgd.layouts(model.abstract, model.axes, compression=Compression(rank), mesh=mesh)
    assert set(found) == {"blocks-qkv", "blocks-out", "blocks-up", "blocks-down"}
    sent, instead = powersgd.sent_numbers(found)
    assert instead * 8 == sum(math.prod(model.abstract["blocks"][n].shape) for n in ("qkv", "out", "up", "down"))
    assert 1 - sent / instead == pytest.approx(1 - 5 * rank / (8 * model.config.width), abs=1e-12)
    assert round(1 - sent / instead, 2) == saved


# The update.


@functools.cache
def setting(replicas, fsdp, rank, form="bf16", precision="fp32"):
    mesh = make_mesh({"replica": replicas, "fsdp": fsdp})
    step = step_of(precision, mesh, compression=Compression(rank, form))
    state = step.init(jax.random.key(0))
    head = 0.1 * np.random.default_rng(0).normal(size=state["params"]["image_head"].shape).astype(np.float32)
    state["params"]["image_head"] = jax.device_put(head, state["params"]["image_head"].sharding)  # else it is zero
    batch = sharding.shard_batch(tokens(0), mesh)
    return state, step.update.lower(state, {}, batch, jax.random.key(1)).compile(), mesh, batch


def test_only_factors_and_uncompressed_tensors_cross_the_replica_axis():
    """From the compiled program: 16 bits for each number of P and Q, 32 for the rest, twice, as in a ring."""
    state, program, mesh, _ = setting(2, 4, 4)
    found = collectives.read(program.as_text(), mesh_shape=dict(mesh.shape), slices=[0] * 4 + [1] * 4)
    crossing = {c.kind: c.bytes for c in found if "replica" in c.axis}
    model = task_of("fp32").model
    layouts = powersgd.layouts(model.abstract, model.axes, compression=Compression(4), mesh=mesh)
    sent, _ = powersgd.sent_numbers(layouts)
    ring = 2 * (2 - 1) / 2  # of two replicas
    factors = crossing["all-to-all"] + crossing["all-gather"]
    assert factors == ring * 2 * sent
    rest = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])
        if powersgd.name(path) not in layouts
    ]
    uncompressed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in rest)
    assert set(crossing) == {"all-to-all", "all-gather", "all-reduce"}
    assert uncompressed * 4 * ring <= crossing["all-reduce"] < uncompressed * 4 * ring + 500  # and a few scalars


def test_what_is_kept_and_sent_has_the_papers_formats():
    """An update with all of it: of the hidden matrices' moments 16 bits are kept (1-6-9, 0-6-10) and of their gradients
    16 bits sent and left out (1-6-9), of all else 32; factors are multiplied in float32. `test_precision.py` sees what
    is inside the model."""
    mesh = make_mesh({"replica": 2, "fsdp": 4})
    step = step_of("fp16-paper", mesh, moments="paper", compression=Compression(4, "paper"))
    state = step.abstract

    def dtypes(tree):
        return {powersgd.name(path): leaf.dtype.name for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    wide = dict.fromkeys(dtypes(state["params"]), "float32")
    matrices = {f"blocks-{name}": "uint16" for name in ("qkv", "out", "up", "down")}
    for moment in ("mu", "nu"):
        assert dtypes(optax.tree.get(state["opt_state"], moment)) == wide | matrices
    assert dtypes(state["error"]) == matrices and dtypes(state["params"]) == dtypes(state["ema"]) == wide
    traced = step.update.trace(state, {}, tokens(0), jax.random.key(1))
    maps = [eqn.params["jaxpr"] for eqn in equations(traced.jaxpr.jaxpr) if eqn.primitive.name == "shard_map"]

    def named(eqns, *names):
        return [eqn for eqn in eqns if eqn.primitive.name in names]

    (exchange,) = (list(equations(inside)) for inside in maps if named(equations(inside), "all_to_all"))
    sent = named(exchange, "all_to_all", "all_gather")
    assert len(sent) == 2 * 2 * len(matrices)  # P and Q, there and back
    assert {v.aval.dtype.name for eqn in sent for v in (*eqn.invars, *eqn.outvars)} == {"uint16"}
    products = named(exchange, "dot_general")
    assert len(products) >= 3 * len(matrices)
    assert {v.aval.dtype.name for eqn in products for v in (*eqn.invars, *eqn.outvars)} == {"float32"}


def test_what_is_not_compressed_gets_the_ordinary_gradient():
    """And the loss is the ordinary one, on one device without replicas."""
    state, program, _, batch = setting(2, 4, 4)
    new, measured = program(jax.tree.map(jnp.copy, state), {}, batch, jax.random.key(1))
    step = plain_step("fp32")
    head = jnp.asarray(np.asarray(state["params"]["image_head"]))
    ordinary = step.init(jax.random.key(0))
    ordinary["params"]["image_head"] = jax.device_put(head, ordinary["params"]["image_head"].sharding)
    ordinary, wanted = step.update(ordinary, {}, tokens(0), jax.random.key(1))
    np.testing.assert_allclose(measured["loss"], wanted["loss"], rtol=1e-5)
    for name in ("image_head", "text_embedding", "norm_gain"):
        # Clipping by different norms leaves the direction.
        moments = [np.asarray(optax.tree.get(s["opt_state"], "mu")[name]) for s in (new, ordinary)]
        np.testing.assert_allclose(*(m / np.linalg.norm(m) for m in moments), atol=1e-5)


def test_at_full_rank_a_run_in_microbatches_is_the_ordinary_one(tmp_path):
    mesh = make_mesh({"replica": 2, "fsdp": 2}, devices=jax.devices()[:4])
    common = {"mesh": mesh, "steps": 6, "checkpoint_every": None, "accumulate": 2}
    runs = [train(tmp_path / str(rank), compression={"rank": rank, "format": "fp32"}, **common) for rank in (None, 16)]
    close(*(run.state["params"] for run in runs), rtol=1e-4, atol=1e-5)
    assert runs[0].metrics["train/loss"] == pytest.approx(runs[1].metrics["train/loss"], rel=1e-5)


def test_a_run_goes_on_bit_for_bit_and_on_another_number_of_replicas(tmp_path):
    meshes = [make_mesh({"replica": r, "fsdp": 8 // r}) for r in (4, 2)]
    run_in = functools.partial(train, compression={"rank": 4, "format": "paper"})
    straight = run_in(tmp_path / "straight", mesh=meshes[0], steps=8)
    run_in(tmp_path / "stopped", mesh=meshes[0], steps=4)
    resumed = run_in(tmp_path / "stopped", mesh=meshes[0], steps=8)
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(r.state) for r in (straight, resumed)))
    assert any(np.asarray(x).any() for x in resumed.state["error"].values())
    other = run_in(tmp_path / "stopped", mesh=meshes[1], steps=12)
    assert other.state["error"]["matrix"].shape == (2, 1, 4, 2, 8)
    assert other.step == 12 and np.isfinite(other.metrics["train/loss"])
    # The sum over the replicas survives the change of their number, but for one rounding to 1-6-9.
    sums = []
    for mesh, error in zip(meshes, (resumed.state["error"], None), strict=True):
        compressor = PowerSGD(LINE.model.abstract, LINE.model.axes, compression=Compression(4, "paper"), mesh=mesh)
        total = compressor.pack(error) if error else compressor.pack(compressor.unpack(sums[0]))
        sums.append(jax.device_get(total))
    for name, total in sums[0].items():
        np.testing.assert_allclose(sums[1][name], total, rtol=2**-9, atol=1e-12, err_msg=name)


def mesh_of(name, values):
    """The mesh that a run of a demo would take on two devices, as two replicas."""
    settings = demo_settings(name, {"run.mesh.replica": 2, "run.mesh.fsdp": 1} | values)
    model = build(name, settings.model)
    task = Task(name, model, loss=None, mean_over_examples=name != "dvae")
    return run.mesh_for(settings, task, devices=jax.devices()[:2])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: made(1, 8, 8, "bf16"), "expected several replicas .* set --config.run.mesh.replica"),
        (lambda: made(2, 4, 6, "bf16"), "multiple of 4, .* got 6: choose 4"),
        (lambda: mesh_of("dvae", {"compression.rank": 8}), "be no mean"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(UserError, match=re.compile(message)):
        make()


@pytest.mark.parametrize(
    "values, most",
    [
        # A matrix of the demo, on one device a replica, has 9/1024 of its numbers for each unit of rank.
        ({"model.precision": "bf16", "compression.rank": 96, "compression.format": "paper"}, 85),
        ({"model.precision": "fp32", "compression.rank": 96, "compression.format": "fp32"}, 85),
        ({"model.precision": "bf16", "compression.rank": 48, "compression.format": "fp32"}, 42),  # factors of 4 bytes
        ({"model.precision": "fp32", "compression.rank": 128, "compression.format": "paper"}, 127),  # the whole width
    ],
)
def test_a_rank_that_saves_nothing_is_refused(values, most):
    with pytest.raises(UserError, match=f"leaves something out, got .* choose at most {most}, or None"):
        mesh_of("transformer", values)
    assert mesh_of("transformer", values | {"compression.rank": most}).shape["replica"] == 2


def test_pieces_that_devices_cannot_share_are_refused():
    mesh = AbstractMesh((2, 3, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    model = task_of("fp32").model
    with pytest.raises(UserError, match="3 devices of a replica to share the 64 numbers .* choose another mesh"):
        powersgd.layouts(model.abstract, model.axes, compression=Compression(3), mesh=mesh)
