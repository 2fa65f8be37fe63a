"""Fused attention kernels against dense attention in float64, run as array code; and where they refuse to run."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import attention_pattern, sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import transformer
from dalle_jax.models.attention import blockwise, kernels, pallas, splash
from dalle_jax.models.attention.block_lists import block_lists
from dalle_jax.train import run
from tests.support.demo_settings import demo_settings
from tests.support.dense_attention import assert_close, dense, output_and_gradients, random
from tests.support.parameters import random_parameters
from tests.support.tiny_transformer import TINY, random_batch

KINDS = ("row", "column", "conv", "full")  # kernels take any mask from `allowed`
TEXT, GRID = 16, 8  # with blocks of 16: one block of text, and four of two rows or two columns
LENGTH = TEXT + GRID * GRID
gpu_attend = functools.partial(pallas.attend, text_len=TEXT, grid=GRID, block=16, interpret=True)


# Block lists.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_block_lists_say_what_the_mask_says(kind, transposed):
    order = attention_pattern.compact_order(kind, text_len=TEXT, grid=GRID)
    mask = attention_pattern.allowed(kind, text_len=TEXT, grid=GRID)[order][:, order]
    mask = mask.T if transposed else mask
    lists = block_lists(mask, size=16)
    rebuilt = np.zeros_like(mask)
    for row, (plain, every) in enumerate(lists.counts):
        for step in range(every):
            column = lists.columns[row, step]
            block = rebuilt[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            assert not block.any()  # nothing twice
            block[:] = True if step < plain else lists.masks[lists.partial[row, step]]
    np.testing.assert_array_equal(rebuilt, mask)
    assert len({m.tobytes() for m in lists.masks}) == len(lists.masks)


@pytest.mark.parametrize(
    ("kind", "size", "visited"), [("row", 64, 105), ("column", 64, 90), ("row", 128, 34), ("column", 128, 27)]
)
def test_blocks_of_the_papers_sequence(kind, size, visited):
    """Of 210 causal blocks of 64, and 55 of 128; a column layer in raster order would visit all."""
    mask = attention_pattern.allowed(kind, text_len=256, grid=32)
    order = attention_pattern.compact_order(kind, text_len=256, grid=32)
    assert block_lists(mask[order][:, order], size=size).steps == visited
    if kind == "column":
        assert block_lists(mask, size=size).steps == {64: 210, 128: 55}[size]


def test_impossible_masks_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        block_lists(np.ones((24, 24), bool), size=16)
    with pytest.raises(ValueError, match="every row"):
        block_lists(np.zeros((16, 16), bool), size=16)


# The kernels for GPUs.


@functools.cache
def gpu_program(kind):
    """Output up to a position and its gradients: (q, k, v, w, until), compiled once for the tests of a kind."""

    def run(q, k, v, w, until):
        kept = (jnp.arange(LENGTH) <= until)[None, :, None, None]
        return output_and_gradients(lambda *qkv: jnp.where(kept, gpu_attend(*qkv, kind), 0), q, k, v, w)

    return jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Of the largest value. bfloat16 has 8 bits: inputs are exact, weights and their gradients are rounded once each.
    [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)],
)
def test_gpu_kernels_equal_dense_attention_and_its_gradients(kind, dtype, tolerance):
    q, k, v, w = (jnp.asarray(x, dtype) for x in random(4, 2, LENGTH, 2, 16))
    mask = attention_pattern.allowed(kind, text_len=TEXT, grid=GRID)
    found = gpu_program(kind)(q, k, v, w, LENGTH - 1)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))
    assert_close(found, dense(q, k, v, w, mask), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gpu_kernels_depend_on_exactly_the_allowed_positions(kind):
    """The gradient of every query's output with respect to all values, one backward pass each: no window that sees
    the future, no key that is left out."""
    q, k, v, _ = random(4, 1, LENGTH, 1, 16, scale=0.5)

    def gradient_of_query(query):
        summed = lambda v: gpu_attend(q, k, v, kind)[0, query].sum()  # noqa: E731
        return jax.grad(summed)(v)[0, :, 0].sum(-1)

    depends = np.asarray(jax.jit(jax.vmap(gradient_of_query))(jnp.arange(LENGTH))) != 0
    np.testing.assert_array_equal(depends, attention_pattern.allowed(kind, text_len=TEXT, grid=GRID))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_later_changes_no_bit(kind):
    """Output up to a position, and the gradients of what depends on it, when all later keys and values change."""
    q, k, v, w = random(4, 2, LENGTH, 2, 16)
    other_k, other_v = random(2, 2, LENGTH, 2, 16, seed=1, scale=50.0)
    run = lambda k, v, until: gpu_program(kind)(q, k, v, w, until)  # noqa: E731
    for until in (3, TEXT - 1, TEXT, TEXT + 13, LENGTH - 2):
        later = (np.arange(LENGTH) > until)[None, :, None, None]
        found = run(np.where(later, other_k, k), np.where(later, other_v, v), until)
        for a, b in zip(jax.tree.leaves(run(k, v, until)), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(a, b)
        for gradient in found[1]:
            assert not np.asarray(gradient)[:, until + 1 :].any()


@pytest.mark.parametrize("kind", ["row", "column"])
def test_no_gradient_is_dropped_on_a_residual_path(kind):
    """Queries, keys, values and the residual all come from one stream, and the output is used twice. As in training,
    the branch is computed again in the backward pass."""
    x, w, w2 = random(3, 1, LENGTH, 2, 16)
    mask = attention_pattern.allowed(kind, text_len=TEXT, grid=GRID)

    def loss(x):
        out = jax.checkpoint(lambda x: gpu_attend(x, 0.5 * x, 2.0 * x, kind))(x)
        return (w * (x + out)).sum() + (w2 * jnp.square(out)).sum()

    out, _ = dense(x, 0.5 * x, 2.0 * x, w, mask)
    _, (dq, dk, dv) = dense(x, 0.5 * x, 2.0 * x, w + 2 * w2 * out, mask)
    assert all(np.abs(part).max() > 0.1 for part in (dq, dk, dv))
    assert_close([jax.jit(jax.grad(loss))(x)], [w + dq + 0.5 * dk + 2.0 * dv], 4e-6)


def test_gpu_kernels_give_the_same_bits_on_a_mesh():
    """Batch cut along replica and fsdp, heads along tensor; and with a mapped replica axis, as PowerSGD has it."""
    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    q, k, v, w = random(4, 4, LENGTH, 2, 16)
    run = functools.partial(output_and_gradients, lambda *qkv: gpu_attend(*qkv, "column"))
    want = jax.jit(run)(q, k, v, w)

    def cut(*arrays):
        with sharding.use(mesh):
            return run(*arrays)

    place = sharding.shardings(q, pallas.STATES, mesh)
    arrays = [jax.device_put(x, place) for x in (q, k, v, w)]
    program = jax.jit(cut).lower(*arrays).compile()
    found = program(*arrays)
    assert found[0].sharding.shard_shape(found[0].shape) == (1, LENGTH, 1, 16)
    assert "all-gather" not in program.as_text() and "all-reduce" not in program.as_text()
    jax.tree.map(np.testing.assert_array_equal, found, want)

    def mapped(*arrays):
        with sharding.use(mesh), sharding.independent("replica"):
            return jax.vmap(run, spmd_axis_name="replica")(*(x.reshape(2, 2, *x.shape[1:]) for x in arrays))

    found = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), jax.jit(mapped)(*arrays))
    jax.tree.map(np.testing.assert_array_equal, found, want)


SMALL = dataclasses.replace(TINY, num_layers=5, width=32, head_size=16, text_len=64, grid=8, remat="full", scan=True)


@pytest.mark.slow
def test_a_model_with_gpu_kernels_equals_one_without(monkeypatch):
    """Loss and gradients of a scanned group and the convolution, computed again, on a mesh."""
    monkeypatch.setattr(pallas, "attend", functools.partial(pallas.attend, interpret=True))
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    batch, params = random_batch(SMALL), random_parameters(transformer.model(SMALL), deviation=0.2)
    params = jax.device_put(params, sharding.shardings(params, transformer.model(SMALL).axes, mesh))

    def loss_and_gradients(name):
        model = transformer.model(dataclasses.replace(SMALL, attention=name))

        def loss(params):
            with sharding.use(mesh):
                return sum(jnp.square(x).mean() for x in model.apply(params, *batch))

        return jax.jit(jax.value_and_grad(loss))(params)

    for a, b in zip(*(jax.tree.leaves(loss_and_gradients(n)) for n in ("pallas", "xla")), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()  # float32 sums in another order, through five layers


# The kernels for TPUs.


@pytest.mark.parametrize("kind", KINDS)
def test_tpu_kernels_equal_dense_attention_and_see_nothing_that_comes_later(kind):
    """Three blocks of 128, the last two of them image."""
    text_len, grid = 128, 16
    q, k, v, w = random(4, 1, text_len + grid * grid, 1, 8)
    attend = lambda *qkv: splash.attend(*qkv, kind, text_len=text_len, grid=grid, interpret=True)  # noqa: E731
    program = jax.jit(functools.partial(output_and_gradients, attend))
    mask = attention_pattern.allowed(kind, text_len=text_len, grid=grid)
    assert_close(program(q, k, v, w), dense(q, k, v, w, mask), 4e-6)

    until = text_len + 101
    later = (np.arange(text_len + grid * grid) > until)[None, :, None, None]
    other_k, other_v = random(2, *k.shape, seed=1, scale=50.0)
    w = np.where(later, 0, w)
    found = program(q, np.where(later, other_k, k), np.where(later, other_v, v), w)
    for a, b in zip(jax.tree.leaves(program(q, k, v, w)), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a[:, : until + 1], b[:, : until + 1])
    assert not any(np.asarray(gradient)[:, until + 1 :].any() for gradient in found[1])


# What the machines' own compilers read, without them.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "platform", "mark"), [("pallas", "cuda", "triton"), ("splash", "tpu", "tpu_custom")])
def test_kernels_lower_at_the_papers_size(kind, name, platform, mark):
    if platform == "cuda" and jax.__version_info__ > (0, 10, 2) and not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("later versions of JAX compile for the GPU when they lower, which needs the plugin")
    x = jax.ShapeDtypeStruct((1, 1280, 2, 64), jnp.bfloat16)
    attend = lambda *qkv: kernels.attend(name)(*qkv, kind, text_len=256, grid=32)  # noqa: E731
    lowered = jax.jit(functools.partial(output_and_gradients, attend)).trace(x, x, x, x)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(mark) >= 3  # forward, queries, keys and values


# Refusals.


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"attention": "flash"}, "attention must be one of"),
        ({"attention": "pallas", "grid": 7}, "multiple of 64, got 113"),
        ({"attention": "pallas", "head_size": 24}, "head_size, got 24"),
        ({"attention": "splash", "text_len": 128}, "multiple of 128, got 192"),
        ({"attention": "splash", "head_size": 4}, "multiple of 8, got 4"),
    ],
)
def test_shapes_that_a_kernel_does_not_know_are_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SMALL, **changed)


@pytest.mark.parametrize(
    ("name", "platform", "capability"),
    [("pallas", "cpu", None), ("pallas", "tpu", None), ("pallas", "gpu", (7, 0)), ("splash", "gpu", (9, 0))],
)
def test_machines_that_a_kernel_does_not_run_on_are_refused(name, platform, capability):
    with pytest.raises(UserError, match=f"attention = {name}, got this one: set --config.model.attention=xla"):
        kernels.check_machine(name, machine="this one", platform=platform, capability=capability)


def test_a_run_refuses_a_kernel_that_these_devices_do_not_run(tmp_path):
    settings = demo_settings("transformer", {"model.attention": "pallas", "model.text_len": 64})
    with pytest.raises(UserError, match="expected a GPU .* got cpu: set --config.model.attention=xla"):
        run.train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_machines_that_a_kernel_runs_on():
    for platform in ("cpu", "gpu", "tpu"):
        kernels.check_machine("xla", machine="", platform=platform)
    kernels.check_machine("pallas", machine="", platform="gpu", capability=(8, 0))
    kernels.check_machine("splash", machine="", platform="tpu")
    assert kernels.attend("xla") is blockwise.attend
