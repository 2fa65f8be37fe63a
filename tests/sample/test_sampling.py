"""Sampling: cached equals uncached, draws follow the filtered distribution, images do not disturb each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import decoding, transformer
from dalle_jax.models.attention.cached import _cache_view
from dalle_jax.sample.engine import Engine, image_keys
from dalle_jax.sample.logits import draw, filter_logits, guide, noise
from tests.support.abstract_engine import AbstractEngine, weight_bytes
from tests.support.tiny_transformer import TINY, apply, random_batch, random_params

ONE = make_mesh({}, devices=jax.devices()[:1])


def uncached(config, params, text_PT, image_PMI):
    """Image logits [C, M, I, V] of the whole forward pass."""
    captions, candidates = image_PMI.shape[:2]
    text = np.repeat(text_PT, candidates, axis=0)
    logits = apply(transformer.model(config), params, text, image_PMI.reshape(captions * candidates, -1))[1]
    return np.asarray(logits).reshape(captions, candidates, *logits.shape[1:])


def cached(config, params, text_PT, image_PMI, *, weights="model"):
    """The same, one position at a time from a cache."""
    captions, candidates = image_PMI.shape[:2]
    image_IB = image_PMI.reshape(captions * candidates, -1).T
    previous_IB = np.concatenate([np.full_like(image_IB[:1], config.layout.start_of_image), image_IB[:-1]])

    @jax.jit
    def run(params):
        blocks = [{name: a[i] for name, a in params["blocks"].items()} for i in range(config.num_layers)]
        layers = [decoding.layer_weights(config, block, weights=weights) for block in blocks]
        ends = decoding.end_weights(config, params)
        stores = decoding.prefill(config, layers, ends, text_PT)

        def one(store, inputs):
            position, previous_B = inputs
            logits_VB, store = decoding.decode(config, layers, ends, stores, store, previous_B, position)
            return store, logits_VB.T

        inputs = np.arange(config.layout.image_len), previous_IB
        return jax.lax.scan(one, decoding.empty_cache(config, captions * candidates), inputs)[1]

    logits_IBV = np.asarray(run(params))
    return logits_IBV.swapaxes(0, 1).reshape(captions, candidates, *logits_IBV.shape[::2])


@pytest.mark.parametrize(
    ("sizes", "atol"),
    [
        ({"pattern": "paper", "num_layers": 6}, 1e-4),
        ({"pattern": "full", "num_layers": 3}, 1e-4),
        ({"precision": "fp16-paper", "num_layers": 2}, 0.02),  # roundings of 2^-11 (measured: 0.006)
        ({"family": "mindalle", "pattern": "full", "text_pad": 1, "num_layers": 2}, 1e-4),
        ({"family": "malevich", "pattern": "malevich", "num_layers": 3}, 1e-4),
        ({"family": "malevich-v2", "pattern": "malevich-v2", "num_layers": 3}, 1e-4),
    ],
)
def test_cached_logits_equal_uncached_at_every_position(sizes, atol):
    """All kinds of layers in one stack, some more than once; two captions with two candidates each, logits of order
    10."""
    config = dataclasses.replace(TINY, **sizes)
    params = random_params(config)
    text_PT, image = random_batch(config, batch=2)[0], random_batch(config, batch=4, seed=1)[1].reshape(2, 2, -1)
    want = uncached(config, params, text_PT, image)
    np.testing.assert_allclose(cached(config, params, text_PT, image), want, rtol=atol if atol < 1e-3 else 0, atol=atol)


def draw_all(engine, *of_begin, **settings):
    """The image tokens of a batch, all rows at once."""
    return engine.tokens(engine.advance(engine.begin(*of_begin, **settings), 0, engine.config.grid))


def sample(config=TINY, captions=2, candidates=3, seed=0, params=None, text=None, **kwargs):
    params = random_params(config) if params is None else params
    text = random_batch(config, batch=captions)[0] if text is None else text
    seeds = seed + np.arange(captions * candidates).reshape(captions, candidates)
    return draw_all(Engine(transformer.model(config), params, mesh=ONE), text, image_keys(seeds), **kwargs)


def test_an_image_depends_on_its_own_seed_and_caption_only():
    together = sample(captions=2, candidates=3, seed=5)
    text = random_batch(TINY, batch=2)[0]
    for caption in range(2):
        for candidate in range(3):
            alone = sample(captions=1, candidates=1, seed=5 + 3 * caption + candidate, text=text[caption : caption + 1])
            np.testing.assert_array_equal(alone[0, 0], together[caption, candidate])
    assert len(np.unique(together.reshape(6, -1), axis=0)) == 6


def test_flags_of_jax_change_no_image():
    params, text = random_params(TINY), random_batch(TINY, batch=2)[0]
    drawn = sample(params=params, text=text)
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(sample(params=params, text=text), drawn)


def test_given_rows_are_kept_and_the_rest_continues_them():
    params, layout = random_params(TINY), TINY.layout
    given = np.random.default_rng(3).integers(TINY.image_vocab, size=(2, layout.image_len)).astype(np.int32)
    before = given.copy()
    ids = sample(params=params, given_PI=given, given_rows=2)
    np.testing.assert_array_equal(ids[..., :8], np.broadcast_to(given[:, None, :8], (2, 3, 8)))
    np.testing.assert_array_equal(given, before)
    assert len(np.unique(ids.reshape(6, -1), axis=0)) == 6
    # Completing a sampled picture from its own first rows draws the same picture again; each caption keeps its own.
    whole = sample(params=params, candidates=1)
    np.testing.assert_array_equal(sample(params=params, candidates=1, given_PI=whole[:, 0], given_rows=[2, 0]), whole)


def numpy_filter(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k, top-p, by sorting one vector."""
    probability = np.exp(logits / temperature - np.max(logits / temperature))
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    keep = np.zeros(len(logits), bool)
    kept_by_k = order[: top_k or len(logits)]
    renormalized = probability[kept_by_k] / probability[kept_by_k].sum()
    reached = 0.0
    for index, p in zip(kept_by_k, renormalized, strict=True):
        keep[index] = True
        reached += p
        if top_p is not None and reached >= top_p:
            break
    return np.where(keep, probability, 0) / probability[keep].sum()


def test_draws_follow_the_filtered_distribution():
    """Each row of a batch by its settings, traced as the engine traces them; of no setting as of settings that allow
    everything."""
    limits = [(20, 1.0), (5, 1.0), (20, 0.6), (8, 0.7), (1, 1.0), (20, 1e-6)]
    settings = [(temperature, *limit) for temperature in (0.5, 1.0, 1.7) for limit in limits]
    logits = np.random.default_rng(0).normal(size=(len(settings), 20), scale=2).astype(np.float32)
    temperature, top_k, top_p = (np.asarray(column) for column in zip(*settings, strict=True))
    filtered = jax.jit(filter_logits)(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    count = 20_000
    noise_XV = jax.vmap(lambda position: noise(jax.random.key(0), position, 20))(np.arange(count))
    for row, values in enumerate(settings):
        want = numpy_filter(logits[row].astype(np.float64), *values)
        np.testing.assert_allclose(jax.nn.softmax(filtered[row]), want, atol=1e-6)
        assert ((filtered[row] == -np.inf) == (want == 0)).all()
        share = np.bincount(draw(filtered[row][None], noise_XV), minlength=20) / count
        assert share[want == 0].sum() == 0
        np.testing.assert_allclose(share, want, atol=5 * 0.5 / np.sqrt(count))  # five standard errors of a share
    for one in ({}, {"top_k": 20}, {"top_p": 1.0}):
        np.testing.assert_array_equal(filter_logits(logits[6:7], temperature=1.0, **one), filtered[6:7])
    for k in (1, 2, 7):  # a number of tokens, not a share of them: of equal logits k are left
        equal = filter_logits(jnp.zeros((3, 20)), temperature=1.0, top_k=k)
        np.testing.assert_array_equal(np.isfinite(equal).sum(-1), k)


def test_the_engine_draws_from_the_filtered_distribution_at_the_end_of_a_picture():
    """The first token of the last row, drawn by 1,000 candidates of each of three captions after the same rows, against
    numpy on the logits of the whole forward pass; one caption is guided."""
    params, (text, image), count = random_params(TINY), random_batch(TINY, batch=3), 1000
    settings = [(3.0, None, None), (2.0, 4, None), (4.0, 6, 0.8)]
    temperature, top_k, top_p = zip(*settings, strict=True)
    engine, rows, guidance = Engine(transformer.model(TINY), params, mesh=ONE), TINY.grid - 1, [1.0, 1.0, 1.5]
    batch = engine.begin(
        text, image_keys(np.arange(3 * count).reshape(3, count)), temperature=temperature, top_k=top_k, top_p=top_p,
        guidance=guidance, given_PI=image, given_rows=rows,
    )  # fmt: skip
    place = rows * TINY.grid
    drawn_PM = engine.tokens(engine.advance(batch, 0, TINY.grid))[..., place]
    empty = np.stack([TINY.layout.caption_ids([])] * 3)
    logits = uncached(TINY, params, np.concatenate([text, empty]), np.tile(image, (2, 1))[:, None])[:, 0, place]
    c, u = np.split(logits.astype(float), 2)
    for caption, own in enumerate(settings):
        want = numpy_filter(u[caption] + guidance[caption] * (c[caption] - u[caption]), *own)
        assert (want > 0.02).sum() > 1  # a choice
        share = np.bincount(drawn_PM[caption], minlength=TINY.image_vocab) / count
        error = np.sqrt(want * (1 - want) / count)
        assert (np.abs(share - want) <= 5 * error + 1e-6).all(), (caption, share, want)


def test_a_temperature_of_zero_draws_the_likeliest_token_whatever_the_seed():
    params, text = random_params(TINY), random_batch(TINY, batch=2)[0]
    drawn = sample(params=params, text=text, candidates=2, temperature=[0.0, 1.0])
    np.testing.assert_array_equal(drawn[0], uncached(TINY, params, text, drawn)[0].argmax(-1))
    assert not np.array_equal(drawn[1, 0], drawn[1, 1])


def test_guidance_is_the_formula_with_and_without_a_cache():
    """Greedy guided pictures are the argmax of u + g (c - u), both uncached; the caller's arrays stay as they were."""
    params, layout = random_params(TINY), TINY.layout
    text = random_batch(TINY, batch=2)[0]
    before = text.copy()
    ids = sample(params=params, text=text, top_k=1, guidance=[3.0, 1.0])
    np.testing.assert_array_equal(text, before)
    c = uncached(TINY, params, text, ids)
    u = uncached(TINY, params, np.stack([layout.caption_ids([])] * 2), ids)
    np.testing.assert_array_equal(ids[0], (u + 3.0 * (c - u))[0].argmax(-1))
    np.testing.assert_array_equal(ids[1], c[1].argmax(-1))
    assert not np.array_equal(ids[0], c[0].argmax(-1))
    np.testing.assert_array_equal(guide(c, u, 0.0), u)
    # A guided neighbor changes nothing.
    np.testing.assert_array_equal(sample(params=params, text=text, guidance=[3.0, 1.0])[1], sample(params=params)[1])


@pytest.mark.parametrize(
    "sizes",
    [
        {"replica": 4, "tensor": 2},
        pytest.param({"replica": 8}, marks=pytest.mark.slow),
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_same_pictures_on_any_number_of_devices(sizes):
    """To the token in float32. Everything large is really cut: weights along tensor, images along replica."""
    params, text = random_params(TINY), random_batch(TINY, batch=2)[0]
    model, keys = transformer.model(TINY), image_keys(np.arange(8).reshape(2, 4))
    mesh = make_mesh(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    engine = Engine(model, params, mesh=mesh)
    batch = engine.begin(text, keys, guidance=2.0)
    batch = engine.advance(batch, 0, TINY.grid)
    alone = Engine(model, params, mesh=ONE)
    np.testing.assert_array_equal(engine.tokens(batch), draw_all(alone, text, keys, guidance=2.0))
    store = batch.arrays["cache"][0]["k"]
    assert store.addressable_shards[0].data.size * mesh.size == store.size
    with pytest.raises(ValueError, match="multiple of"):
        Engine(model, params, mesh=make_mesh({"replica": 4}, devices=jax.devices()[:4])).begin(
            text, image_keys(np.arange(2).reshape(2, 1))
        )


def test_bf16_and_8_bit_weights_stay_close_and_are_small():
    params, text = random_params(TINY), random_batch(TINY, batch=2)[0]
    image = random_batch(TINY, batch=4, seed=1)[1].reshape(2, 2, -1)
    exact = cached(TINY, params, text, image)
    assert 0 < np.linalg.norm(cached(TINY, params, text, image, weights="int8") - exact) < 0.03 * np.linalg.norm(exact)
    half = dataclasses.replace(TINY, precision="bf16")  # 7 bits of mantissa, of everything
    assert decoding.empty_cache(half, 1)[0]["k"].dtype == jnp.bfloat16
    assert 0 < np.linalg.norm(cached(half, params, text, image) - exact) < 0.03 * np.linalg.norm(exact)
    model = transformer.model(TINY)
    wide, small = Engine(model, params, mesh=ONE), Engine(model, params, mesh=ONE, weights="int8")
    matrix = small._weights[0][0]["up"]
    assert matrix["int8"].dtype == jnp.int8 and matrix["int8"].shape == wide._weights[0][0]["up"].shape
    assert draw_all(small, text, image_keys(np.arange(8).reshape(2, 4))).shape == (2, 4, 16)
    with pytest.raises(UserError, match="weights must be one of"):
        Engine(model, params, mesh=ONE, weights="int4")


def test_cache_holds_and_reads_what_the_window_needs():
    """Slots of keys and values a candidate: a ring of a row and one, every image position of column layers, of which a
    step reads one column, and the convolution's reach; counted from shapes, for the paper's model."""
    config = transformer.TransformerConfig(num_layers=8, width=128, heads=2)
    images = 3
    stores = jax.eval_shape(lambda: decoding.empty_cache(config, images))
    position = 2 * 2 * config.width  # bytes: k and v in bfloat16
    held = {"row": 33, "column": 1024, "conv": 166}
    for kind, store in zip(config.kinds, stores, strict=True):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(store))
        assert size == images * held[kind] * position
    read = {"row": 33, "column": 32, "conv": 166}
    for kind in read:
        assert _cache_view(kind, jnp.int32(0), config.grid)[2] == read[kind]
    text = jax.eval_shape(
        lambda p, t: decoding.prefill(
            config,
            [decoding.layer_weights(config, {name: a[i] for name, a in p["blocks"].items()}) for i in range(8)],
            decoding.end_weights(config, p),
            t,
        ),
        transformer.model(config).abstract,
        jax.ShapeDtypeStruct((1, config.text_len), jnp.int32),
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(text))
    assert size == 8 * 256 * 4 * config.width  # once a caption, whatever the number of candidates


def test_a_step_reads_the_cache_and_every_step_the_text():
    """A cache that is dropped, a text that is forgotten, would change nothing where they are damaged: here it does,
    at the last position as at the second, guided and not."""
    text, keys = random_batch(TINY, batch=2)[0], image_keys(np.arange(6).reshape(2, 3))
    engine = Engine(transformer.model(TINY), random_params(TINY), mesh=ONE)

    def last_row(damage, guidance):
        batch = engine.advance(engine.begin(text, keys, guidance=guidance), 0, TINY.grid - 1)
        batch.arrays.update({damage: jax.tree.map(jnp.zeros_like, batch.arrays[damage])} if damage else {})
        return engine.tokens(engine.advance(batch, TINY.grid - 1, TINY.grid))[..., -TINY.grid :]

    for guidance in (1.0, 2.0):
        intact = last_row(None, guidance)
        assert not np.array_equal(last_row("cache", guidance), intact)
        assert not np.array_equal(last_row("stores", guidance), intact)


def test_abstract_engine_compiles_what_the_real_one_runs():
    """Shapes alone give the same bytes and arrays; the compiler holds a batch once, donated, and not a second time."""
    model = transformer.model(TINY)
    shapes, real = AbstractEngine(model, mesh=ONE), Engine(model, random_params(TINY), mesh=ONE)
    assert weight_bytes(shapes) == weight_bytes(real)
    assert shapes.batch_bytes(1, 2, guided=True) == real.batch_bytes(1, 2, guided=True)
    programs = shapes.compile(2, 3)
    batch = real.begin(random_batch(TINY, batch=2)[0], image_keys(np.arange(6).reshape(2, 3)))

    def of(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert of(batch.arrays) == of(programs["begin"].out_info) == of(programs["advance"].out_info)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch.arrays["cache"]))
    assert programs["advance"].memory_analysis().alias_size_in_bytes >= held


def test_a_step_copies_no_store_and_adds_no_branch_twice():
    """What XLA's CPU backend would do to other ways of writing the same step: copy column layers' whole stores before
    it reads and writes a little of them, and add up all earlier branches for every reader of the stream, so that a
    layer costs more the later it comes."""

    def advance(**sizes):
        config = dataclasses.replace(TINY, **sizes)
        return AbstractEngine(transformer.model(config), mesh=ONE).compile(2, 3)["advance"]

    operations = [advance(num_layers=n, pattern="full").cost_analysis()["flops"] for n in (2, 3, 4)]
    assert operations[2] - operations[1] == operations[1] - operations[0] > 0
    program = advance(num_layers=3).as_text()
    assert "f32[6,2,16,8]" in program  # the store of the column layer
    assert not [line for line in program.splitlines() if " copy(" in line and "f32[6,2,16,8]" in line]
