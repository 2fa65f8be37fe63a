"""minDALL-E and Malevich give the numbers of the original code.

The numbers below are what the original codes made, in PyTorch, of weights that a formula gives; they may never change.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import attention_pattern
from dalle_jax.convert import decoders
from dalle_jax.errors import UserError
from dalle_jax.models.transformer import model
from tests.support import formula_weights
from tests.support.parameters import assert_every_weight_matters

WIDTH, TEXT, TEXT_VOCAB, HEADS = 32, 8, 64, 2
TOLERANCE = 1e-4  # the published numbers have five digits
NORMS = ("input_layernorm", "before_first_addition_layernorm", "post_attention_layernorm")


def pair(name, outputs, *inputs):
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def mindalle_shapes(*, layers=2, text_vocab=50, image=16, image_vocab=60, width=WIDTH):
    shapes = {
        "tok_emb_img.weight": (image_vocab, width), "tok_emb_txt.weight": (text_vocab, width),
        "pos_emb_img.weight": (image, width), "pos_emb_txt.weight": (TEXT, width),
        "head_img.weight": (image_vocab, width), "head_txt.weight": (text_vocab, width),
    } | pair("ln_f", width)  # fmt: skip
    for place in (f"blocks.{i}." for i in range(layers)):
        shapes |= pair(f"{place}ln1", width) | pair(f"{place}ln2", width)
        for name in ("key", "query", "value", "proj"):
            shapes |= pair(f"{place}attn.{name}", width, width)
        shapes |= pair(f"{place}mlp.0", 4 * width, width) | pair(f"{place}mlp.2", width, 4 * width)
    return shapes


def malevich_shapes(*, layers=6, grid=12, image_vocab=50, width=WIDTH):
    text_ids = TEXT_VOCAB + TEXT
    shapes = {
        "text_embeddings.weight": (text_ids, width), "image_embeddings.weight": (image_vocab, width),
        "text_pos_embeddings.weight": (TEXT + 1, width),
        "image_row_embeddings.weight": (grid, width), "image_col_embeddings.weight": (grid, width),
    } | pair("transformer.final_layernorm", width)  # fmt: skip
    shapes |= pair("to_logits.0", width) | pair("to_logits.1", text_ids + image_vocab, width)
    for place in (f"transformer.layers.{i}." for i in range(layers)):
        for name in (*NORMS, "before_second_addition_layernorm"):
            shapes |= pair(f"{place}{name}", width)
        shapes |= pair(f"{place}attention.query_key_value", 3 * width, width)
        shapes |= pair(f"{place}attention.dense", width, width)
        shapes |= pair(f"{place}mlp.dense_h_to_4h", 4 * width, width)
        shapes |= pair(f"{place}mlp.dense_4h_to_h", width, 4 * width)
    return shapes


def small(family):
    """Config in float32, parameters, text and image tokens of the published numbers."""
    if family == "mindalle":
        config, params = decoders.convert_mindalle(formula_weights.weights(mindalle_shapes()), text_pad=1, heads=HEADS)
        text, image = (5 * np.arange(8) + 1) % 50, (7 * np.arange(16) + 3) % 60
    else:
        state = formula_weights.weights(malevich_shapes())
        config, params = decoders.convert_malevich(state, release=family, heads=HEADS)
        text, image = config.layout.caption_ids([5, 6]), (7 * np.arange(144) + 3) % 50
    config = dataclasses.replace(config, precision="fp32", remat="none")
    return config, params, jnp.asarray(text[None], jnp.int32), jnp.asarray(image[None], jnp.int32)


FAMILIES = ("mindalle", "malevich", "malevich-v2")


def assert_is(array, shape, first_four, last, mean, std):
    assert array.shape == shape
    np.testing.assert_allclose(array.ravel()[:4], first_four, atol=TOLERANCE)
    np.testing.assert_allclose([array.ravel()[-1], array.mean(), array.std()], [last, mean, std], atol=TOLERANCE)


def test_mindalle_gives_the_original_logits():
    config, params, text_BT, image_BI = small("mindalle")
    text, image = jax.jit(model(config).apply)(params, text_BT, image_BI)
    assert_is(np.asarray(image), (1, 16, 60), [-0.99947, -0.15537, 1.46597, 0.61121], -0.58119, 0.050852, 1.010088)
    assert_is(
        np.asarray(text)[:, :-1], (1, 7, 50), [-0.24415, 1.02222, 0.39468, 0.13081], -0.57656, -0.001004, 0.990910
    )


@pytest.mark.parametrize(
    "family, ids, last, mean, std",
    [
        ("malevich", [2, 5, 6, 3, 68, 69, 70, 71], 0.11596, -0.054094, 0.925030),
        ("malevich-v2", [2, 2, 5, 6, 3, 68, 69, 70, 71], 0.06109, -0.056832, 0.916762),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_malevich_gives_the_original_logits(family, ids, last, mean, std, scan):
    config, params, text_BT, image_BI = small(family)
    assert text_BT[0].tolist() == ids
    config = dataclasses.replace(config, scan=scan)
    states = jax.jit(functools.partial(model(config).apply, method="states"))(params, text_BT, image_BI)
    logits = [np.asarray(states) @ params[head] + params[f"{head}_bias"] for head in ("text_head", "image_head")]
    first_four = [-1.72547, -0.21695, 1.24116, 1.35511]
    assert_is(np.concatenate(logits, axis=-1), (1, 152, 122), first_four, last, mean, std)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_matters(family):
    config, params, text_BT, image_BI = small(family)
    assert_every_weight_matters(
        jax.jit(lambda p: model(config).apply(p, text_BT, image_BI)), params, 1e-4, min_change=0.1
    )


def test_a_malevich_is_known_by_its_mask():
    state = formula_weights.weights(malevich_shapes())
    for family, kind in (("malevich", "window"), ("malevich-v2", "torus")):
        mask = attention_pattern.allowed(kind, text_len=TEXT, grid=12).astype(np.float32)
        config, _ = decoders.convert_malevich(state | {"transformer.conv_mask": mask}, heads=HEADS)
        assert (config.family, config.pattern) == (family, family)
        assert (config.text_len, config.text_vocab, config.grid, config.image_vocab) == (8, 64, 12, 50)
    with pytest.raises(UserError, match="expected weights of the release malevich, got those of malevich-v2"):
        decoders.convert_malevich(state | {"transformer.conv_mask": mask}, release="malevich", heads=HEADS)
    with pytest.raises(UserError, match="name it"):
        decoders.convert_malevich(state, heads=HEADS)
    with pytest.raises(UserError, match="got another"):
        decoders.convert_malevich(state | {"transformer.conv_mask": np.ones_like(mask)}, heads=HEADS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("ln_f.bias"), "but ln_f.bias is missing"),
        (lambda s: s.pop("blocks.1.mlp.0.weight"), "blocks.1.mlp.0.weight is missing"),
        (lambda s: s.update({"sos": s["ln_f.bias"]}), "sos is there too: remove"),
        (
            lambda s: s.update({"blocks.0.mlp.0.bias": s["ln_f.bias"]}),
            r"blocks.0.mlp.0.bias of shape \(128,\), got \(32,\)",
        ),
        (lambda s: s.update({"blocks.1.mlp.0.weight": s["blocks.1.mlp.0.weight"].T}), r"\(128, 32\), got \(32, 128\)"),
        (lambda s: s.update({"ln_f.bias": s["ln_f.bias"] * np.nan}), "finite weights"),
    ],
)
def test_another_file_is_one_sentence(change, message):
    state = formula_weights.weights(mindalle_shapes())
    change(state)
    with pytest.raises(UserError, match=message):
        decoders.convert_mindalle(state, text_pad=1, heads=HEADS)
