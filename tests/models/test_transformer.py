"""The transformer: parameter counts, causality, and equality of its ways of computing."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import build, transformer
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.train.optimizer import powersgd
from tests.support.tiny_transformer import TINY, apply, random_batch, random_params


def test_parameter_count_of_the_paper():
    """12 billion: blocks, embeddings, positions and heads by hand; nothing is allocated."""
    config = TransformerConfig()
    layers, width, text, image = 64, 3968, 16_384 + 256, 8192
    matrices = layers * 12 * width**2
    norms_and_biases = layers * (4 * width + 3 * width + width + 4 * width + width)
    embeddings = (text + image + 1 + 256 + 32 + 32) * width
    heads = (text + image) * width
    assert transformer.model(config).num_params == matrices + norms_and_biases + embeddings + heads + 2 * width
    assert transformer.model(config).num_params == 12_293_828_224


def test_every_parameter_dimension_is_named():
    model = transformer.model(TransformerConfig())
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    for names, array in zip(
        jax.tree.leaves(model.axes, is_leaf=is_names), jax.tree.leaves(model.abstract), strict=True
    ):
        assert len(names) == array.ndim and None not in names


def test_initial_values_are_those_of_child_et_al():
    """Their section 6: normal of deviation 0.125 / sqrt(fan-in), the two matrices that write to the stream divided by
    sqrt(2 N) besides; tokens 0.125 / sqrt(d), positions 0.125 / sqrt(d n_emb); the output matrices are zero."""
    layers, width, inner = 8, 64, 6 * 8
    config = dataclasses.replace(
        TINY, num_layers=layers, width=width, heads=6, text_len=40, text_vocab=100, grid=30, image_vocab=200
    )
    params = jax.device_get(jax.jit(transformer.model(config).init)(jax.random.key(0)))
    branch = (2 * layers) ** -0.5
    wanted = {"text_embedding": width**-0.5, "image_embedding": width**-0.5, "text_position": width**-0.5}
    wanted |= {"row_position": (2 * width) ** -0.5, "column_position": (2 * width) ** -0.5}  # two embeddings
    wanted |= {"blocks-qkv": width**-0.5, "blocks-up": width**-0.5}
    wanted |= {"blocks-out": inner**-0.5 * branch, "blocks-down": (4 * width) ** -0.5 * branch}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = powersgd.name(path)
        if name in wanted:
            errors = 5 / (2 * x.size) ** 0.5  # standard errors of a deviation
            assert x.std() == pytest.approx(0.125 * wanted[name], rel=errors) and errors < 0.1, name
        else:
            assert set(x.ravel()) == {1.0 if name.endswith("gain") else 0.0}, name


@pytest.mark.parametrize("pattern", ["paper", "full"])
def test_no_logits_depend_on_a_later_token(pattern):
    """By gradient with respect to one-hot inputs: prediction p depends on tokens before p and on no other."""
    config = dataclasses.replace(TINY, pattern=pattern)
    model, params, layout = transformer.model(config), random_params(config), config.layout
    text, image = random_batch(config, batch=1)

    def logits(text_vectors, image_vectors):
        """The model with its embedding lookups replaced by given vectors."""
        unit = dict(params)
        unit["text_embedding"] = jnp.concatenate([params["text_embedding"], text_vectors])
        unit["image_embedding"] = jnp.concatenate([params["image_embedding"], image_vectors])
        text_ids = layout.text_ids + jnp.arange(layout.text_len)[None]
        # Image position p reads row p of image_vectors as the token before it, hence the shift by one.
        image_ids = layout.image_ids + jnp.arange(1, layout.image_len + 1)[None]
        out_text, out_image = model.apply(unit, text_ids, image_ids)
        return jnp.concatenate([out_text[0].sum(-1), out_image[0].sum(-1)])

    text_vectors = params["text_embedding"][text[0]]
    image_vectors = params["image_embedding"][np.concatenate([image[0], [0]])]
    by_text, by_image = jax.jit(jax.jacrev(logits, (0, 1)))(text_vectors, image_vectors)
    by_text, by_image = (np.abs(x).max(-1) for x in (by_text, by_image))
    text_len, image_len = layout.text_len, layout.image_len
    prediction = np.arange(text_len + image_len)
    reads_text = np.arange(text_len)[None] <= prediction[:, None]
    np.testing.assert_array_equal(by_text > 0, reads_text)  # text positions, and every image position sees all text
    # image vector j stands for the token at position j - 1, read by image position j; vector 0 is never read
    later = np.arange(image_len + 1)[None] > (prediction - text_len)[:, None]
    assert not by_image[later].any()
    assert by_image[text_len + 1 :].any(axis=1).all()


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_scan_equals_loop_and_remat_equals_none(remat):
    """Values and gradients to rounding. 10 layers: two scanned groups, one row layer more, the convolution.

    A scan without remat is compared with the loop by `test_meshes.py`.
    """
    config = dataclasses.replace(TINY, num_layers=10)
    params, batch = random_params(config), random_batch(config)

    def value_and_gradient(**changes):
        model = transformer.model(dataclasses.replace(config, **changes))

        def loss(params):
            return sum(jnp.square(x).mean() for x in model.apply(params, *batch))

        return jax.jit(jax.value_and_grad(loss))(params)

    found, wanted = value_and_gradient(scan=True, remat=remat), value_and_gradient()
    chex.assert_trees_all_close(found, wanted, rtol=2e-4, atol=1e-5)


def test_scanned_program_does_not_grow_with_depth():
    def lines(num_layers):
        config = dataclasses.replace(TINY, num_layers=num_layers, scan=True)
        model = transformer.model(config)
        lowered = jax.jit(model.apply).lower(model.abstract, *random_batch(config))
        return len(lowered.as_text().splitlines())

    assert lines(33) == lines(9)


# Errors of the logits in percent, in bf16 and bf16-paper; those of 64 layers stand in docs/numerics.md.
ROUNDING = {8: (0.72, 0.25), 64: (1.7, 0.20)}


@pytest.mark.parametrize("layers", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_rounding_to_bfloat16_piles_up_in_a_stream_that_is_not_float32(layers):
    """Of a fresh model but for its heads. bf16-paper rounds inside the branches alone."""
    config = dataclasses.replace(TINY, num_layers=layers, width=128, heads=4, head_size=32, pattern="full", scan=True)
    batch, rng = random_batch(config), np.random.default_rng(0)
    params = jax.jit(transformer.model(config).init)(jax.random.key(0))
    params |= {n: jnp.float32(rng.normal(0, 0.1, params[n].shape)) for n in ("text_head", "image_head")}
    exact, *rounded = (
        np.concatenate([x.ravel() for x in apply(transformer.model(changed), params, *batch)])
        for changed in (dataclasses.replace(config, precision=p) for p in ("fp32", "bf16", "bf16-paper"))
    )
    found = [100 * np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in rounded]
    assert found == pytest.approx(ROUNDING[layers], rel=0.2) and {x.dtype.name for x in rounded} == {"float32"}


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="remat must be one of"):
        TransformerConfig(remat="some")
    with pytest.raises(ValueError, match="precision must be one of"):
        TransformerConfig(precision="fp8")
    with pytest.raises(ValueError, match="heads must be at least 1"):
        TransformerConfig(heads=0)
    with pytest.raises(TypeError):
        TransformerConfig(depth=3)


def test_options_of_version_0_1_that_are_gone_change_nothing():
    """They stand in the `config.json` of its model folders; any other unknown option is an error."""
    config = dataclasses.asdict(TINY)
    assert build("transformer", config | {"loss_parts": 8, "matmuls": "model"}) is build("transformer", config)
    with pytest.raises(TypeError, match="widht"):
        build("transformer", config | {"widht": 16})
