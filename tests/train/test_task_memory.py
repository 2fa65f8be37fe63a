"""What a task observes and remembers beside its parameters: how the step carries it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.mesh import make_mesh
from dalle_jax.train.ema import Ema
from dalle_jax.train.evaluator import Evaluator
from dalle_jax.train.objectives import code_health
from dalle_jax.train.objectives.task import CODE_COUNTS, OBSERVED
from tests.support.toy_task import BATCH, LENGTH, NAN, TOY, VOCAB, make_updates, toy_batch, toy_loss, toy_step
from tests.support.trees import identical


def loss(params, frozen, batch, *, key, step, memory):
    value, metrics = toy_loss(params, frozen, batch, key=key, step=step)
    counts = code_health.count_codes(batch["text"], VOCAB)
    return value, metrics | {"seen": memory["seen"], OBSERVED: {CODE_COUNTS: counts, "text": batch["text"]}}


def remember(params, memory, observed, *, key, step):
    """The table becomes what was counted, so that the optimizer's part of it must come before."""
    del key
    counts = memory["counts"] + observed[CODE_COUNTS].sum(0)
    last = observed["text"].swapaxes(0, 1).reshape(BATCH, LENGTH)[-1]  # the batch in its own order
    table = jnp.broadcast_to(counts.astype(jnp.float32)[:, None], params["table"].shape)
    return params | {"table": table}, {"counts": counts, "last": last, "seen": step + 1.0}


def memory(key):
    del key
    return {"counts": jnp.zeros(VOCAB, jnp.int32), "last": jnp.zeros(LENGTH, jnp.int32), "seen": jnp.zeros([])}


TASK = dataclasses.replace(
    TOY, loss=loss, memory=memory, remember=remember, followed=(("table",),), health=code_health.health
)


@functools.cache
def step_of(devices=1, accumulate=1, **options):
    mesh = make_mesh({"fsdp": devices}, devices=jax.devices()[:devices])
    options = {"ema": Ema(decay=0.9, every=2), **options}
    return dataclasses.replace(toy_step(mesh, accumulate=accumulate, **options), task=TASK)


def counted(numbers):
    return np.bincount(np.concatenate([toy_batch(n)["text"] for n in numbers]).reshape(-1), minlength=VOCAB)


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (4, 2)])
def test_what_was_seen_is_remembered_whatever_the_microbatches_and_devices(devices, accumulate):
    step = step_of(devices, accumulate)
    state, measured = make_updates(step, step.init(jax.random.key(0)), [0, 1, 2])
    np.testing.assert_array_equal(state["memory"]["counts"], counted([0, 1, 2]))
    np.testing.assert_array_equal(state["memory"]["last"], toy_batch(2)["text"][-1])
    np.testing.assert_array_equal(state["params"]["table"], np.repeat(counted([0, 1, 2])[:, None], 8, 1))
    np.testing.assert_array_equal(state["ema"]["table"], state["params"]["table"])  # followed, not averaged
    assert (np.asarray(state["ema"]["head"]) != state["params"]["head"]).any()
    assert [values["seen"] for values in measured] == [0.0, 1.0, 2.0]  # the loss reads the memory before it changes
    assert OBSERVED not in measured[0] and CODE_COUNTS not in measured[0]
    assert state["memory"]["counts"].sharding.is_fully_replicated


def test_a_skipped_update_leaves_memory_and_parameters():
    step = step_of(1, 1)
    before, _ = make_updates(step, step.init(jax.random.key(0)), [0])
    kept = jax.device_get(before)
    after, (measured,) = make_updates(step, before, [1], frozen=NAN)
    assert not measured["finite"]
    identical(after["memory"], kept["memory"])
    identical(after["params"], kept["params"])


def test_the_memory_is_saved_and_goes_on(tmp_path):
    step = step_of(4, 2)
    straight, _ = make_updates(step, step.init(jax.random.key(0)), [0, 1])
    half, _ = make_updates(step, step.init(jax.random.key(0)), [0])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, step.to_saved(half), {})
    _, found, _ = checkpoints.restore_latest(step.saved)
    checkpoints.close()
    resumed, _ = make_updates(step, step.from_saved(found), [1])
    identical(resumed, straight)


def test_the_average_on_the_host_follows_too():
    step = step_of(offload_ema=True)
    state, _ = make_updates(step, step.init(jax.random.key(0)), [0])
    np.testing.assert_array_equal(state["ema"]["table"], state["params"]["table"])
    assert state["ema"]["table"].sharding.memory_kind == sharding.HOST


def test_health_is_of_the_whole_validation_and_not_of_its_batches(tmp_path):
    """Four vectors in batches of one and at once: 3 codes, where a mean over batches of one would say 1."""
    step = step_of(1, 1)
    state = step.init(jax.random.key(0))
    texts = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1], [5, 5, 5]], np.int32)

    def validate(size):
        batches = [{"text": texts[i : i + size]} for i in range(0, 4, size)]
        return Evaluator(step, tmp_path, TOY.frozen, jax.random.key(1), lambda: batches, max_batches=4).validate(state)

    single, whole = validate(1), validate(4)
    for name, value in (("codes_used", 3), ("codes_used_share", 3 / VOCAB), ("codes_within_reach", 12)):
        assert single[f"validation/{name}"] == whole[f"validation/{name}"] == pytest.approx(value)
    perplexity = 2 ** (0.25 * 2 + 0.5 * 1 + 0.25 * 2)  # of shares of a quarter, a half, a quarter
    assert single["validation/code_perplexity"] == pytest.approx(perplexity)


def test_usage_of_numpy_and_of_jax():
    for counts, expected in (
        ([4, 0, 4, 0], (2, 0.5, 4, 2.0)),
        ([0, 3, 0, 0, 0, 0, 0, 0], (1, 1 / 8, 3, 1.0)),
        ([0, 0], (0, 0.0, 0, 1.0)),
    ):
        for found in (code_health.health(np.array(counts)), code_health.usage(jnp.array(counts))):
            names = ("codes_used", "codes_used_share", "codes_within_reach", "code_perplexity")
            assert [float(found[name]) for name in names] == pytest.approx(list(expected))
