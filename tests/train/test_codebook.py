"""How codebooks learn: against DeepMind's quantizers in dm-haiku, and the properties of each remedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import sharding
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.train.codebook import Codebook, Learner, kmeans, replace, sum_by_code
from tests.support.trees import identical

K, D, SHAPE = 12, 4, (4, 3, 2)  # codes of D numbers; batch, rows and columns
VECTORS = 24


def learner_of(codebook, *, unit_codes=False, vocab=K, vectors=VECTORS):
    sizes = VQConfig(
        image_size=8, vocab=vocab, code_dim=D, network="patches", multipliers=(1,), patch=4, unit_codes=unit_codes
    )
    return Learner(codebook, sizes, vectors=vectors)


def vectors_of(number, shape=SHAPE):
    return np.random.default_rng(number).normal(size=(*shape, D)).astype(np.float32)


def params_of(number=99, codes=K):
    return {"quantizer": {"codebook": jnp.asarray(np.random.default_rng(number).normal(size=(codes, D)), jnp.float32)}}


def observed_of(learner, params, memory, z, *, accumulate=1):
    """What the loss observes of a batch, microbatch i with every accumulate-th example."""
    _, tokens, _, vectors = learner.quantize(params, memory, jnp.asarray(z), key=jax.random.key(0))
    parts = {"vectors": vectors, "tokens": tokens}
    return jax.tree.map(lambda x: jnp.stack([x[i::accumulate] for i in range(accumulate)]), parts)


def learn(learner, params, memory, numbers, *, first=0, accumulate=1):
    """Params and memory after updates on the vectors of these numbers."""
    remember = jax.jit(learner.remember)
    for step, number in enumerate(numbers, first):
        observed = observed_of(learner, params, memory, vectors_of(number), accumulate=accumulate)
        params, memory = remember(params, memory, observed, key=jax.random.key(step), step=step)
    return params, memory


# Against dm-haiku


def haiku_quantizer(update):
    hk = pytest.importorskip("haiku")
    kind, more = {"loss": (hk.nets.VectorQuantizer, {}), "ema": (hk.nets.VectorQuantizerEMA, {"decay": 0.9})}[update]

    def quantize(z):
        return kind(embedding_dim=D, num_embeddings=K, commitment_cost=0.3, name="vq", **more)(z, is_training=True)

    return hk.transform_with_state(quantize)


def gradients(quantize, codes, z, weights):
    """Of a loss that depends on the quantized vectors and the quantizer's own loss, by vectors and codes."""

    def loss(codes, z):
        quantized, own = quantize(codes, z)
        return (quantized * weights).sum() + own

    return jax.grad(loss, argnums=(0, 1))(codes, z)


def test_the_loss_update_is_haikus_forward_and_backward():
    z, weights, codes = vectors_of(0), vectors_of(1), params_of()["quantizer"]["codebook"]
    learner, theirs = learner_of(Codebook(rule="loss", commitment=0.3)), haiku_quantizer("loss")

    def ours(codes, z):
        quantized, _, terms, _ = learner.quantize({"quantizer": {"codebook": codes}}, {}, z, key=jax.random.key(0))
        return quantized, sum(terms.values())

    def haikus(codes, z):
        found = theirs.apply({"vq": {"embeddings": codes.T}}, {}, None, z)[0]
        return found["quantize"], found["loss"]

    for found, wanted in zip(ours(codes, z), haikus(codes, z), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    for found, wanted in zip(gradients(ours, codes, z, weights), gradients(haikus, codes, z, weights), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_running_means_are_haikus_over_updates():
    """Vectors, loss and gradient of each update, and the codebook and both means after it. Rounding: 1e-5."""
    learner, theirs = learner_of(Codebook(commitment=0.3, decay=0.9)), haiku_quantizer("ema")
    params, memory = params_of(), learner.memory(jax.random.key(0))
    _, state = theirs.init(jax.random.key(0), vectors_of(0))
    state["vq"]["embeddings"] = params["quantizer"]["codebook"].T
    weights = vectors_of(50)
    remember = jax.jit(learner.remember)
    for number in range(6):
        z = jnp.asarray(vectors_of(number)) + (2.0 if number > 3 else 0.0)  # some codes fall out of use

        def ours(z, params=params, memory=memory):
            quantized, _, terms, _ = learner.quantize(params, memory, z, key=jax.random.key(0))
            return (quantized * weights).sum() + sum(terms.values())

        def haikus(z, state=state):
            found, state = theirs.apply({}, state, None, z)
            return (found["quantize"] * weights).sum() + found["loss"], state

        wanted, state = haikus(z)
        np.testing.assert_allclose(ours(z), wanted, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(ours)(z), jax.grad(lambda z: haikus(z)[0])(z), rtol=1e-5, atol=1e-6)
        observed = observed_of(learner, params, memory, z)
        params, memory = remember(params, memory, observed, key=jax.random.key(0), step=number)
        counts, sums = (state[f"vq/~/ema_{name}"]["average"] for name in ("cluster_size", "dw"))
        np.testing.assert_allclose(memory["counts"], counts, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(memory["sums"], sums.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(params["quantizer"]["codebook"], state["vq"]["embeddings"].T, rtol=1e-4, atol=1e-5)


# Terms and their weights


@pytest.mark.parametrize("rule", ["ema", "loss"])
def test_each_weight_is_of_its_own_term(rule):
    """Without commitment the encoder gets no gradient from the quantizer, and the codebook still its own."""
    learner = learner_of(Codebook(rule=rule, commitment=0.0, codebook_weight=0.7))
    params, z = params_of(), jnp.asarray(vectors_of(0))
    memory = learner.memory(jax.random.key(0))

    def own(learner, params, z):
        return sum(learner.quantize(params, memory, z, key=jax.random.key(0))[2].values())

    by_codes, by_vectors = jax.grad(functools.partial(own, learner), argnums=(0, 1))(params, z)
    assert not np.any(by_vectors)
    assert np.any(by_codes["quantizer"]["codebook"]) == (rule == "loss")
    committed = learner_of(Codebook(rule=rule, commitment=0.5, codebook_weight=0.0))
    by_codes, by_vectors = jax.grad(functools.partial(own, committed), argnums=(0, 1))(params, z)
    assert not np.any(by_codes["quantizer"]["codebook"])
    codes = np.asarray(params["quantizer"]["codebook"], np.float64)
    flat = np.asarray(z, np.float64).reshape(-1, D)
    near = codes[np.argmin(((flat[:, None] - codes[None]) ** 2).sum(-1), axis=1)]
    np.testing.assert_allclose(by_vectors.reshape(-1, D), 0.5 * 2 * (flat - near) / flat.size, rtol=1e-4, atol=1e-6)


# Sums in any order


def test_sums_are_exact_and_of_any_order():
    rng = np.random.default_rng(0)
    z, tokens = (rng.normal(size=(5_000, D)) * 10.0 ** rng.integers(-4, 3, (5_000, 1))), rng.integers(0, K, 5_000)
    z = z.astype(np.float32)
    counts, sums = sum_by_code(z, tokens, codes=K)
    wanted = np.zeros((K, D))
    np.add.at(wanted, tokens, z.astype(np.float64))
    np.testing.assert_array_equal(counts, np.bincount(tokens, minlength=K))
    # Each of 5,000 / 12 vectors is off by at most 2^-24 of the power of two above the largest number.
    assert np.abs(sums - wanted).max() < 2.0**-24 * 2 * np.abs(z).max() * np.bincount(tokens).max()
    order = rng.permutation(5_000)
    np.testing.assert_array_equal(sums, sum_by_code(z[order], tokens[order], codes=K)[1])
    assert not np.any(sum_by_code(np.zeros((3, D), np.float32), tokens[:3], codes=K)[1])


@pytest.mark.parametrize("devices", [2, 8])
def test_codebooks_have_equal_bits_on_any_number_of_devices(devices):
    """Dead codes and the start included, in two microbatches on many devices and in one on one."""
    codebook = Codebook(decay=0.9, start=2, noise=0.1, kmeans=True, dead_below=1.5, dead_every=2)
    learner, shape = learner_of(codebook, vectors=16 * 6), (16, 3, 2)
    remember = jax.jit(learner.remember)

    def after_five(devices, accumulate):
        mesh = make_mesh({"fsdp": devices}, devices=jax.devices()[:devices])
        params, memory = params_of(), learner.memory(jax.random.key(0))
        rows = jax.NamedSharding(mesh, jax.P(None, sharding.TABLE["batch"]))
        for step in range(5):
            observed = observed_of(learner, params, memory, vectors_of(step, shape), accumulate=accumulate)
            observed = jax.tree.map(lambda x: jax.device_put(np.asarray(x), rows), observed)
            with sharding.use(mesh):
                given = jax.device_put((params, memory), sharding.replicated(mesh))
                params, memory = jax.device_get(remember(*given, observed, key=jax.random.key(step), step=step))
        return params, memory

    (params, memory), one = after_five(devices, 2), after_five(1, 1)
    identical((params, memory), one)
    assert memory["started"] and (memory["counts"] > 0).all()


# Remedies


def test_a_revived_code_stays_where_it_was_put():
    """Code, sum and count together: an update in which nothing is assigned to it leaves it there."""
    learner = learner_of(Codebook(decay=0.9, dead_below=0.5, dead_every=2))
    params = params_of()
    params["quantizer"]["codebook"] = params["quantizer"]["codebook"].at[3].set(1e3)  # no vector is near
    first, memory = learn(learner, params, learner.memory(jax.random.key(0)), [0], first=1)
    code = np.asarray(first["quantizer"]["codebook"][3])
    z = vectors_of(0).reshape(-1, D)
    assert np.abs(z - code).sum(1).min() == 0  # one of the batch
    assert memory["counts"][3] == 1.0
    far = dict(observed_of(learner, first, memory, vectors_of(1)))
    far["tokens"] = jnp.where(far["tokens"] == 3, 4, far["tokens"])
    second, memory = learner.remember(first, memory, far, key=jax.random.key(1), step=2)
    np.testing.assert_allclose(second["quantizer"]["codebook"][3], code, rtol=1e-4)
    assert memory["counts"][3] == pytest.approx(0.9 * (1 - 0.9) / (1 - 0.9**2))  # it fades as any other does


def test_dead_codes_go_to_the_worst_matched_vectors_and_the_others_stay():
    codes, z = params_of()["quantizer"]["codebook"], vectors_of(0).reshape(-1, D)
    dead = np.isin(np.arange(K), (1, 4, 7))
    distances = np.random.default_rng(3).random(len(z)).astype(np.float32)
    moved, found = replace(codes, dead, z, distances)
    np.testing.assert_array_equal(found[dead], z[np.argsort(-distances)[:3]])
    np.testing.assert_array_equal(found[~dead], codes[~dead])
    np.testing.assert_array_equal(moved, dead)
    moved, found = replace(codes, np.ones(K, bool), z[:2], distances[:2])  # more dead codes than vectors
    assert moved.sum() == 2 and (np.asarray(found[2:]) == codes[2:]).all()


@pytest.mark.parametrize("unit_codes", [False, True])
def test_codes_start_at_the_centers_of_what_was_seen(unit_codes):
    """Vectors in as many tight clusters as codes; until the start the codebook is as it was, and nothing is lost."""
    learner = learner_of(Codebook(start=3, kmeans=True, decay=0.9), unit_codes=unit_codes)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(K, D)).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True) if unit_codes else 1.0
    params, memory = params_of(), learner.memory(jax.random.key(0))
    for step in range(3):
        assert not memory["started"]
        z = centers[rng.permutation(np.arange(VECTORS) % K)] + rng.normal(size=(VECTORS, D)).astype(np.float32) * 1e-4
        observed = {"vectors": jnp.asarray(z.reshape(1, *SHAPE, D)), "tokens": jnp.zeros((1, *SHAPE), jnp.int32)}
        before, (params, memory) = (
            params,
            learner.remember(params, memory, observed, key=jax.random.key(step), step=step),
        )
        assert step == 2 or (params["quantizer"]["codebook"] == before["quantizer"]["codebook"]).all()
    assert memory["started"]
    found = np.asarray(params["quantizer"]["codebook"])
    distances = np.linalg.norm(found[:, None] - centers[None], axis=-1)
    assert (distances.min(0) < 0.01).sum() >= K - 2  # two random ones may begin in a cluster and share it for ever
    assert memory["counts"].sum() == pytest.approx(VECTORS) and memory["counts"].min() > 0
    smooth = (memory["counts"] + 1e-5) / (VECTORS + K * 1e-5) * VECTORS
    np.testing.assert_allclose(memory["sums"], found * np.asarray(smooth)[:, None], rtol=1e-4, atol=1e-6)


def test_before_the_start_the_decoder_gets_the_vectors_with_noise_of_the_given_length():
    learner = learner_of(Codebook(start=2, noise=0.3), vectors=6_000)
    z = jnp.asarray(vectors_of(0, (1_000, 3, 2)))
    memory, params = learner.memory(jax.random.key(0)), params_of()
    q, _, terms, _ = learner.quantize(params, memory, z, key=jax.random.key(1))
    assert np.sqrt(np.square(q - z).sum(-1).mean()) == pytest.approx(0.3, rel=0.02)
    assert terms["commitment"] == 0.0
    q, tokens, terms, _ = learner.quantize(params, memory | {"started": jnp.array(True)}, z, key=jax.random.key(1))
    np.testing.assert_allclose(q, params["quantizer"]["codebook"][tokens], atol=1e-6)
    assert terms["commitment"] > 0.0


def test_unit_codes_have_length_one_wherever_they_are():
    learner = learner_of(Codebook(start=2, noise=0.5), unit_codes=True)
    memory = learner.memory(jax.random.key(0))
    for started in (False, True):
        memory["started"] = jnp.array(started)
        q, _, _, seen = learner.quantize(params_of(), memory, 5.0 * vectors_of(0), key=jax.random.key(1))
        for vectors in (q, seen):
            np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1.0, rtol=1e-5)


def test_kmeans_finds_no_worse_centers_than_it_began_with():
    z = vectors_of(0, (40, 5, 2)).reshape(-1, D)

    def error(rounds):
        codes, counts = kmeans(jnp.asarray(z), K, key=jax.random.key(0), rounds=rounds, on_sphere=False)
        assert counts.sum() == len(z)
        return np.square(z[:, None] - np.asarray(codes)[None]).sum(-1).min(1).mean()

    assert error(10) < error(1) < error(0)


@pytest.mark.parametrize(("start", "vocab", "numbers"), [(1, 25, "25 codes.*got 24"), (3, 100, "100 codes.*got 72")])
def test_too_few_vectors_for_the_codes_are_refused_with_both_numbers(start, vocab, numbers):
    learner = learner_of(Codebook(start=start, kmeans=True), vocab=vocab)
    with pytest.raises(UserError, match=numbers):
        _ = learner.collected
    enough = learner_of(Codebook(start=start + 2, kmeans=True), vocab=vocab)
    assert enough.collected[0] * enough.collected[1] >= vocab


@pytest.mark.parametrize("wrong", [{"kmeans": True}, {"noise": 0.1}, {"rule": "both"}, {"decay": 1.0}, {"start": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match="config.objective.codebook"):
        Codebook(**wrong)
