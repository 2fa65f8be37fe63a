"""Sampling: cached equals uncached, draws follow the filtered distribution, images do not disturb each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_transformer import TINY, random_batch, random_params

from dalle_jax.models import transformer
from dalle_jax.sample import engine
from dalle_jax.sample.logits import draw, filter_logits


@pytest.mark.parametrize("pattern", ["paper", "full"])
def test_cached_logits_equal_uncached_at_every_position(pattern):
    """All kinds in one stack, two captions with two candidates of their own, 1e-4 absolute on logits of order 10."""
    config = dataclasses.replace(TINY, pattern=pattern)
    model, params, layout = transformer.model(config), random_params(config), config.layout
    text_CT, image = random_batch(config, batch=2)[0], random_batch(config, batch=4, seed=1)[1]
    want = model.apply(params, np.repeat(text_CT, 2, axis=0), image)[1].reshape(2, 2, layout.image_len, -1)
    layers = model.apply(params, method="layers")
    stores = model.apply(params, layers, text_CT, method="prefill")
    cache = model.apply(params, 2, 2, method="empty_cache")
    image_CMI = image.reshape(2, 2, -1)
    decode = jax.jit(lambda *args: model.apply(params, layers, stores, *args, method="decode"))
    previous = np.full((2, 2), layout.start_of_image, np.int32)
    for position in range(layout.image_len):
        got, cache = decode(cache, previous, position)
        np.testing.assert_allclose(got, want[:, :, position], rtol=1e-4, atol=1e-4, err_msg=f"position {position}")
        previous = image_CMI[:, :, position]


def sample(config=TINY, captions=2, candidates=3, seed=0, params=None, text=None, **kwargs):
    model = transformer.model(config)
    params = random_params(config) if params is None else params
    text = random_batch(config, batch=captions)[0] if text is None else text
    seeds = seed + np.arange(captions * candidates).reshape(captions, candidates)
    return np.asarray(engine.generate(model, params, text, engine.image_keys(seeds), **kwargs))


def test_greedy_sampling_takes_the_most_likely_token_of_the_uncached_model():
    """top_k = 1 leaves one choice, so the sampled picture must be its own argmax under the full forward pass."""
    ids = sample(top_k=1)
    text = np.repeat(random_batch(TINY, batch=2)[0], 3, axis=0)
    logits = transformer.model(TINY).apply(random_params(TINY), text, ids.reshape(6, -1))[1]
    np.testing.assert_array_equal(ids.reshape(6, -1), logits.argmax(-1))


def test_an_image_depends_on_its_own_seed_and_caption_only():
    together = sample(captions=2, candidates=3, seed=5)
    text = random_batch(TINY, batch=2)[0]
    for caption in range(2):
        for candidate in range(3):
            alone = sample(captions=1, candidates=1, seed=5 + 3 * caption + candidate, text=text[caption : caption + 1])
            np.testing.assert_array_equal(alone[0, 0], together[caption, candidate])
    assert len(np.unique(together.reshape(6, -1), axis=0)) == 6


def test_the_caption_still_matters_at_the_last_position():
    """Greedy pictures of one seed under two captions differ in the logits of the last position."""
    model, params = transformer.model(TINY), random_params(TINY)
    text = random_batch(TINY, batch=2)[0]
    image = sample(captions=1, candidates=1, text=text[:1])[0]
    first, second = (model.apply(params, text[i : i + 1], image)[1][0, -1] for i in range(2))
    assert np.abs(first - second).max() > 1e-2


def test_given_rows_are_kept_and_the_rest_continues_them():
    params, layout = random_params(TINY), TINY.layout
    given = np.random.default_rng(3).integers(TINY.image_vocab, size=(2, 3, layout.image_len)).astype(np.int32)
    before = given.copy()
    ids = sample(params=params, given_CMI=given, num_given=8)
    np.testing.assert_array_equal(ids[..., :8], given[..., :8])
    np.testing.assert_array_equal(given, before)
    # Completing a sampled picture from its own first rows draws the same picture again.
    whole = sample(params=params)
    np.testing.assert_array_equal(sample(params=params, given_CMI=whole, num_given=8), whole)


def numpy_filter(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k, top-p, by sorting one vector."""
    probability = np.exp(logits / temperature - np.max(logits / temperature))
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    keep = np.zeros(len(logits), bool)
    kept_by_k = order[: top_k or len(logits)]
    renormalised = probability[kept_by_k] / probability[kept_by_k].sum()
    reached = 0.0
    for index, p in zip(kept_by_k, renormalised, strict=True):
        keep[index] = True
        reached += p
        if top_p is not None and reached >= top_p:
            break
    return np.where(keep, probability, 0) / probability[keep].sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.6), (8, 0.7), (1, None), (None, 1e-6)])
def test_draws_follow_the_filtered_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=20, scale=2).astype(np.float32)
    want = numpy_filter(logits.astype(np.float64), temperature, top_k, top_p)
    filtered = filter_logits(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(jax.nn.softmax(filtered), want, atol=1e-6)
    count = 20_000
    ids = jax.vmap(lambda key: draw(key, filtered))(jax.random.split(jax.random.key(0), count))
    share = np.bincount(ids, minlength=20) / count
    assert share[want == 0].sum() == 0
    np.testing.assert_allclose(share, want, atol=5 * 0.5 / np.sqrt(count))  # five standard errors of a share


def test_top_p_of_one_and_top_k_of_the_vocabulary_change_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    np.testing.assert_array_equal(filter_logits(logits, temperature=1.0, top_k=9, top_p=1.0), logits)
