"""The loss in parts of the vocabulary: value and gradients of the whole, on every kind of mesh, and less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.mesh import make_mesh
from dalle_jax.models import transformer
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.train.objectives import transformer as transformer_task
from dalle_jax.train.optimizer import loss_scale

# As many ids and codes as make the logits most of the memory; 64 text ids and 256 codes.
SMALL = TransformerConfig(
    num_layers=1, width=16, heads=2, head_size=8, text_len=8, text_vocab=56, grid=4, image_vocab=256, pattern="full",
    remat="none", scan=False, precision="fp32",
)  # fmt: skip
BATCH = 8


@pytest.mark.parametrize("parts", [2, 4, 12])
def test_value_and_gradients_are_those_of_the_whole_in_float64(parts):
    """The sums of a dozen terms in another order. Twelve parts are one id each; targets lie in all of them."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x_BSD, head_DV = jnp.asarray(rng.normal(size=(3, 12, 5))), jnp.asarray(10 * rng.normal(size=(5, 12)))
        targets_BS = np.stack([rng.permutation(12) for _ in range(3)])
        weights_BS = jnp.asarray(rng.normal(size=(3, 12)))

        def whole(x_BSD, head_DV):
            return (weights_BS * transformer_task._cross_entropy(x_BSD @ head_DV, targets_BS)).sum()

        def in_parts(x_BSD, head_DV):
            found = transformer_task._cross_entropy_in_parts(
                x_BSD, head_DV, targets_BS, logits_of=jnp.matmul, parts=parts
            )
            return (weights_BS * found).sum()

        wanted, found = (jax.value_and_grad(f, (0, 1))(x_BSD, head_DV) for f in (whole, in_parts))
    assert found[0].dtype == jnp.float64
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), found, wanted)


def example():
    """Parameters, not the model's own, whose output heads are zero; and a batch."""
    rng, layout = np.random.default_rng(1), SMALL.layout
    leaves, tree = jax.tree.flatten(transformer.model(SMALL).abstract)
    params = tree.unflatten([rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])
    lengths = rng.integers(1, layout.caption_len, size=BATCH)
    text = np.stack([layout.text_slots(rng.integers(SMALL.text_vocab, size=n)) for n in lengths])
    return params, {"text": text, "codes": rng.integers(layout.image_vocab, size=(BATCH, layout.image_len))}


def compiled(precision, parts, mesh=None):
    """Bytes of the gradient's temporaries, and the loss with its metrics and gradients."""
    model = transformer.model(dataclasses.replace(SMALL, precision=precision, loss_parts=parts))
    params, batch = example()
    rule = loss_scale.of(model, replicas=1)
    own = {"scales": rule.init()["scale"]} if rule and rule.by_branch else {}

    def gradients(params, batch):
        loss = lambda p: transformer_task._loss(model, None, p, {}, batch, key=None, step=0, **own)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    def on_mesh(params, batch):
        with sharding.use(mesh):
            return gradients(params, batch)

    if mesh is None:
        program = jax.jit(gradients).lower(params, batch).compile()
    else:
        places = sharding.shardings(model.abstract, model.axes, mesh)
        params, batch = jax.device_put(params, places), sharding.shard_batch(batch, mesh)
        outs = (sharding.replicated(mesh), places)
        program = jax.jit(on_mesh, out_shardings=outs).lower(params, batch).compile()
    return program.memory_analysis().temp_size_in_bytes, program(params, batch)


@functools.cache
def whole(precision):
    return compiled(precision, 1)


# Of the largest gradient: rounding of the compute dtype, where parts and whole round the same products.
CLOSE = {"fp32": 1e-6, "bf16": 2**-8, "fp16-paper": 2**-11}


@pytest.mark.parametrize("precision", CLOSE)
def test_the_update_needs_less_memory_and_has_the_same_gradients(precision):
    size, wanted = whole(precision)
    smaller, found = compiled(precision, 8)
    logits = 4 * BATCH * (SMALL.layout.text_len * SMALL.layout.text_ids + SMALL.layout.image_len * SMALL.image_vocab)
    assert smaller < size - logits, (smaller, size, logits)
    check(found, wanted, CLOSE[precision])


def test_a_mesh_changes_nothing():
    mesh = make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    check(compiled("fp32", 8, mesh)[1], whole("fp32")[1], 1e-6)


def check(found, wanted, close):
    (loss, metrics), gradients = wanted
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    assert largest > 0.01 and set(metrics) == {"text_loss", "image_loss", "bits_per_image_token"}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found[0], (loss, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=close * largest), found[1], gradients)


@pytest.mark.parametrize("parts", [0, -2, 3, 128])
def test_parts_that_do_not_divide_both_vocabularies_are_refused(parts):
    with pytest.raises(ValueError, match=f"loss_parts must divide 64 text ids and 256 codes, got {parts}"):
        dataclasses.replace(SMALL, loss_parts=parts)
