"""DALL-E mini gives the numbers of min-dalle, whole and from a cache, from the files of both its publishers.

The numbers below are what min-dalle made, in PyTorch, of weights that a formula gives; they may never change. Where
min-dalle is installed, a whole greedy loop of its own is compared too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.convert import dalle_mini
from dalle_jax.errors import UserError
from dalle_jax.models import seq2seq, seq2seq_decoding
from tests.support import formula_weights

TEXT = np.ones((2, 64), np.int32)
TEXT[0, :2], TEXT[1, :4] = (0, 2), (0, 7, 9, 2)
WIDTH, MLP, IDS = 32, 48, 51


def shapes(stack):
    ids, positions = (100, 64) if stack == "encoder" else (IDS, 256)
    found = {"embed_tokens.weight": (ids, WIDTH), "embed_positions.weight": (positions, WIDTH)}
    attentions = ["self_attn"] if stack == "encoder" else ["self_attn", "encoder_attn"]
    norms = {"layernorm_embedding": WIDTH, "final_ln": WIDTH}
    for i in range(2):
        for attention in attentions:
            found |= {f"layers.{i}.{attention}.{m}_proj.weight": (WIDTH, WIDTH) for m in "kvq"}
            found[f"layers.{i}.{attention}.out_proj.weight"] = (WIDTH, WIDTH)
            norms |= {f"layers.{i}.{name}{attention}_layer_norm": WIDTH for name in ("pre_", "")}
        norms |= {f"layers.{i}.glu.ln0": WIDTH, f"layers.{i}.glu.ln1": MLP}
        found |= {f"layers.{i}.glu.fc{k}.weight": (WIDTH, MLP) if k == 2 else (MLP, WIDTH) for k in range(3)}
    for name, size in norms.items():
        found |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return found | ({"lm_head.weight": (IDS, WIDTH)} if stack == "decoder" else {})


STATE = {
    f"{stack}.{name}": a
    for stack in ("encoder", "decoder")
    for name, a in formula_weights.weights(shapes(stack)).items()
}


@pytest.fixture(scope="module")
def made():
    config, params = dalle_mini.convert(STATE, "min-dalle", heads=4, start=50, image_vocab=IDS)
    return dataclasses.replace(config, precision="fp32"), jax.tree.map(jnp.asarray, params)


def check(got, first, last, mean, std):
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got.ravel()[:4], first, atol=1e-4)
    np.testing.assert_allclose([got.ravel()[-1], got.mean(), got.std()], [last, mean, std], atol=1e-4)


def test_it_gives_the_original_numbers(made):
    config, params = made
    assert (len(shapes("encoder")), len(shapes("decoder"))) == (36, 53)
    states = seq2seq.encoder(config).apply(params["encoder"], jnp.asarray(TEXT))
    check(states, [-0.46984, -0.53576, 1.04978, 0.89106], -1.05356, 0.010029, 0.999850)
    logits = seq2seq.model(config).apply(params, jnp.asarray(TEXT), jnp.asarray([[3, 10, 0]] * 2))
    check(logits[:, 0], [-0.62215, 0.72496, 0.00916, -0.40307], -0.11677, 0.102616, 0.853120)
    check(logits[:, 2], [-1.1991, 0.66867, -0.34185, -0.28448], -0.28473, 0.019018, 0.906954)


def test_drawing_from_a_cache_gives_the_same_logits(made):
    config, params = made
    image = np.random.default_rng(0).integers(0, IDS, (4, 256)).astype(np.int32)
    want = seq2seq.model(config).apply(params, jnp.asarray(TEXT.repeat(2, 0)), jnp.asarray(image))
    blocks = params["decoder"]["blocks"]
    layers = [seq2seq_decoding.layer_weights(config, {n: a[i] for n, a in blocks.items()}) for i in range(2)]
    ends = seq2seq_decoding.end_weights(config, params)
    stores = seq2seq_decoding.prefill(config, layers, ends, jnp.asarray(TEXT))
    previous = np.pad(image[:, :-1], [(0, 0), (1, 0)], constant_values=50).T

    def step(cache, at):
        logits, cache = seq2seq_decoding.decode(config, layers, ends, stores, cache, *at)
        return cache, logits.T

    start = seq2seq_decoding.empty_cache(config, 4)
    _, got = jax.lax.scan(step, start, (jnp.asarray(previous), jnp.arange(256)))
    np.testing.assert_allclose(got.swapaxes(0, 1), want, atol=2e-5)


def test_padding_changes_nothing(made):
    config, params = made
    apply = seq2seq.model(config).apply
    image = jnp.asarray([[3, 10, 0]])
    short = apply(params, jnp.asarray(TEXT[1:, :4]), image)
    np.testing.assert_allclose(apply(params, jnp.asarray(TEXT[1:]), image), short, atol=1e-5)


def as_flax(scan):
    """STATE as dalle-mini would store it, without the scales that it does not have."""
    inner = {"pre_self_attn_layer_norm": "LayerNorm_0", "self_attn_layer_norm": "LayerNorm_1"}
    inner |= {"pre_encoder_attn_layer_norm": "LayerNorm_2", "encoder_attn_layer_norm": "LayerNorm_3"}
    inner |= {"self_attn": "FlaxBartAttention_0", "encoder_attn": "FlaxBartAttention_1"}
    glu = {"ln0": "LayerNorm_0", "ln1": "LayerNorm_1", "fc0": "Dense_0", "fc1": "Dense_1", "fc2": "Dense_2"}
    tree, same = {}, {}
    for name, array in STATE.items():
        words = name.split(".")
        if len(array.shape) == 1 and words[-1] == "weight" and ("pre_" in name or ".ln" in name):
            same[name] = np.ones_like(array)
            continue
        same[name] = array
        kind = "embedding" if "embed_" in name else "kernel" if array.ndim == 2 else "scale"
        words[-1] = "bias" if words[-1] == "bias" else kind
        array = array.T if kind == "kernel" else array
        if words[1] != "layers":
            tree[".".join(words[1:] if words[1] == "lm_head" else ["model", *words])] = array
            continue
        stack, _, i, *rest = words
        rest = ["GLU_0", glu[rest[1]], rest[-1]] if rest[0] == "glu" else [inner[rest[0]], *rest[1:]]
        side = f"model.{stack}.layers.FlaxBart{stack.title()}Layer"
        if scan:
            tree.setdefault(".".join([f"{side}s", *rest]), []).append(array)
        else:
            tree[".".join([f"{side}_{i}", *rest])] = array
    return {name: np.stack(a) if isinstance(a, list) else a for name, a in tree.items()}, same


@pytest.mark.parametrize("scan", [True, False])
def test_files_of_flax_and_of_torch_give_equal_parameters(scan):
    tree, same = as_flax(scan)
    sizes = {"heads": 4, "start": 50, "image_vocab": IDS}
    from_torch, from_flax = (
        dalle_mini.convert(same, "min-dalle", **sizes),
        dalle_mini.convert(tree, "dalle-mini", **sizes),
    )
    assert from_torch[0] == from_flax[0]
    jax.tree.map(np.testing.assert_array_equal, from_torch[1], from_flax[1])


def test_sizes_come_from_the_arrays_and_another_file_is_one_sentence():
    config, _ = dalle_mini.convert(STATE, "min-dalle", heads=4, start=7)
    assert (config.image_vocab, config.image_ids, config.grid, config.mlp, config.text_vocab) == (32, 51, 16, 48, 100)
    assert dalle_mini.START == 16383
    for broken, words in (
        ({n: a for n, a in STATE.items() if n != "decoder.final_ln.bias"}, "decoder.final_ln.bias is missing"),
        (STATE | {"decoder.more": np.zeros(1)}, "decoder.more is there too"),
        (STATE | {"decoder.final_ln.bias": np.full(WIDTH, np.inf)}, "inf or nan in decoder.final_ln.bias"),
        (STATE | {"decoder.final_ln.bias": np.zeros(3)}, r"decoder.final_ln.bias of shape \(32,\), got \(3,\)"),
    ):
        with pytest.raises(UserError, match=words):
            dalle_mini.convert(broken, "min-dalle", heads=4, start=7)


def test_min_dalle_draws_the_same(made):
    """Logits and tokens of a whole greedy loop with guidance, whose first row reads the empty caption."""
    why = "compares with the original: pip install torch, and --no-deps min-dalle emoji"
    torch = pytest.importorskip("torch", reason=why)
    decoder_of = pytest.importorskip("min_dalle.models.dalle_bart_decoder", reason=why)
    encoder_of = pytest.importorskip("min_dalle.models.dalle_bart_encoder", reason=why)
    config, params = made
    encoder = encoder_of.DalleBartEncoder(2, WIDTH, 4, 100, 64, MLP, "cpu")
    decoder = decoder_of.DalleBartDecoder(IDS - 1, WIDTH, 4, MLP, 2, "cpu")
    for module, stack in ((encoder, "encoder"), (decoder, "decoder")):
        module.load_state_dict(
            {name: torch.from_numpy(a) for name, a in formula_weights.weights(shapes(stack)).items()}
        )
    text = torch.from_numpy(TEXT).long()
    tokens, logits = [50], []
    with torch.no_grad():
        states, mask = encoder(text), text.ne(1)
        mask = mask[:, None, None, :] if "attention_mask" in decoder.forward.__code__.co_varnames else mask
        cache = torch.zeros(2, 4, 256, WIDTH)
        for position in range(256):
            previous, at = torch.tensor([[tokens[-1]]]), torch.tensor([position])
            row, cache = decoder(mask, states, cache, previous, at)
            logits.append(row[:, -1].numpy())
            tokens.append(int((-15 * row[0, -1] + 16 * row[1, -1]).argmax()))
    np.testing.assert_allclose(seq2seq.encoder(config).apply(params["encoder"], jnp.asarray(TEXT)), states, atol=1e-5)
    image = jnp.asarray([tokens[1:]] * 2)
    got = np.asarray(seq2seq.model(config).apply(params, jnp.asarray(TEXT), image))
    np.testing.assert_allclose(got, np.stack(logits, 1), atol=2e-5)
    assert (-15 * got[0] + 16 * got[1]).argmax(-1).tolist() == tokens[1:]
