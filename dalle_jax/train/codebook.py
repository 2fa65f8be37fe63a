"""The training of a codebook: what moves its codes, and the remedies for codes that nothing is assigned to.

A codebook learns in one of two ways (van den Oord et al. 2017, section 3.2 and appendix A.1):

    loss    |sg(z) - e|^2 is part of the loss, and the optimizer moves e
    ema     e_k = m_k / N_k': running means, over updates, of the sum m_k of the vectors that are assigned to a code and
            of their number N_k, of which N_k' = (N_k + epsilon) / (n + K epsilon) n, n = sum of N_k, is never 0.
            The old codebook quantizes a batch; what the batch adds enters afterwards

Running means begin without a bias, as `ema.py` has it, which is Adam's correction. So they are those of DeepMind's
VectorQuantizerEMA, up to rounding.

Sums over vectors are sums of whole numbers (`sum_by_code`), which no order changes: equal vectors give a codebook of
equal bits on any number of devices, and in any number of microbatches.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.errors import UserError, check_choice, check_number
from dalle_jax.models import Params
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.models.vq.quantizer import nearest, straight_through, unit
from dalle_jax.sharding import constrain
from dalle_jax.train.ema import Ema

Memory = dict[str, Any]  # `Task.memory`
RULES = ("ema", "loss")
PER_CODE = 8  # vectors that are collected for each code before it starts,
MAX_COLLECTED = 1 << 17  # but not more than this in all,
COLLECTING = 8  # in so many updates, or more if these have too few
KMEANS_ROUNDS = 10
HALF = 12  # bits of the low part of a whole number, and of the high one with its sign


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The learning of the codes of a quantizer 'nearest'.

    rule: 'ema' or 'loss'. commitment: weight of mean |z - sg(e)|^2, the paper's beta. codebook_weight: weight of mean
    |sg(z) - e|^2, with 'loss' alone. (The models that taming-transformers published had 1.0 and 0.25 here, beta on the
    other term.) decay, epsilon: of the running means.

    start: updates without codes, in which the decoder gets the encoder's own vectors with noise of root mean square
    length `noise`; after them every code begins at a vector that was seen. kmeans: these are the centers of k-means
    over vectors of the last updates, else random ones of them.
    dead_below: a code with a running mean of fewer vectors an update is given the place of one of the worst matched
    vectors of the batch; it is looked for every `dead_every` updates. None: never.
    """

    rule: str = "ema"
    commitment: float = 0.25
    codebook_weight: float = 1.0
    decay: float = 0.99
    epsilon: float = 1e-5
    start: int | None = None
    noise: float = 0.0
    kmeans: bool = False
    dead_below: float | None = None
    dead_every: int = 100

    def __post_init__(self):
        key = "config.objective.codebook"
        check_choice(f"{key}.rule", self.rule, RULES)
        for name in ("commitment", "codebook_weight", "noise"):
            check_number(f"{key}.{name}", getattr(self, name), min=0, max=1e6)
        check_number(f"{key}.decay", self.decay, min=0, below=1)
        check_number(f"{key}.epsilon", self.epsilon, above=0, max=1)
        check_number(f"{key}.start", self.start, min=1, max=2**31 - 1, whole=True, optional=True)
        check_number(f"{key}.dead_below", self.dead_below, above=0, max=1e6, optional=True)
        check_number(f"{key}.dead_every", self.dead_every, min=1, max=2**31 - 1, whole=True)
        if self.start is None and (self.kmeans or self.noise):
            raise UserError(
                f"expected {key}.start with {key}.{'kmeans' if self.kmeans else 'noise'}, got None: give the number of "
                "updates without codes, 1 to start from the vectors of the first"
            )


@dataclasses.dataclass(frozen=True)
class Learner:
    """A codebook that learns. sizes: of the model. vectors: how many an update gives, all devices and parts together.

    Vectors are those that codes are compared with, of length 1 with `sizes.unit_codes`.
    """

    codebook: Codebook
    sizes: VQConfig
    vectors: int

    @functools.cached_property
    def collected(self) -> tuple[int, int]:
        """Updates before the start whose vectors are collected, and vectors of each.

        Raises:
          UserError: fewer vectors than codes.
        """
        assert self.codebook.start is not None
        wanted = min(PER_CODE * self.sizes.vocab, MAX_COLLECTED)
        updates = min(self.codebook.start, max(COLLECTING, -(-wanted // self.vectors)))
        each = min(self.vectors, -(-wanted // updates))
        if updates * each < self.sizes.vocab:
            raise UserError(
                f"expected at least {self.sizes.vocab} vectors for the {self.sizes.vocab} codes to start from, got "
                f"{updates * each}: {self.vectors} in each of {updates} updates; raise config.objective.codebook.start "
                "or config.batch_size, or lower config.model.vocab"
            )
        return updates, each

    def memory(self, key: jax.Array) -> Memory:
        """The memory before the first update. counts [K] and sums [K, D]: running means over `updates`. started: there
        are codes. collected [vectors, D]: the last ones before the start, of which `filled` are there."""
        del key
        K, D = self.sizes.vocab, self.sizes.code_dim
        memory: Memory = {}
        if self.codebook.rule == "ema" or self.codebook.dead_below is not None:
            memory |= {"updates": jnp.zeros([], jnp.int32), "counts": jnp.zeros(K, jnp.float32)}
        if self.codebook.rule == "ema":
            memory["sums"] = jnp.zeros((K, D), jnp.float32)
        if self.codebook.start is not None:
            updates, each = self.collected
            memory |= {"started": jnp.zeros([], bool), "filled": jnp.zeros([], jnp.int32)}
            memory["collected"] = jnp.zeros((updates * each, D), jnp.float32)
        return memory

    def codes(self, params: Params) -> jax.Array:
        """The codebook [K, D] that vectors are compared with."""
        return self._comparable(constrain(params["quantizer"]["codebook"], (None, None)))

    def _comparable(self, vectors):
        return unit(vectors) if self.sizes.unit_codes else vectors

    def quantize(self, params: Params, memory: Memory, z_BRCD, *, key: jax.Array) -> tuple[Any, Any, Any, Any]:
        """The encoder's vectors [B, R, C, D] as the decoder gets them, tokens, the loss of them, and the vectors seen.

        Before the start there are no codes: the vectors get noise, and nothing but the decoder teaches the encoder.

        Returns: (q [B, R, C, D], tokens int32 [B, R, C], {term: weighted scalar}, vectors [B, R, C, D]).
        """
        z_BRCD = self._comparable(z_BRCD)
        codes_KD = self.codes(params)
        tokens_BRC = nearest(z_BRCD, codes_KD)
        code_BRCD = codes_KD[tokens_BRC]
        q_BRCD = straight_through(z_BRCD, code_BRCD)
        terms = {"commitment": self.codebook.commitment * _mean_square(z_BRCD, jax.lax.stop_gradient(code_BRCD))}
        if self.codebook.rule == "loss":
            error = _mean_square(code_BRCD, jax.lax.stop_gradient(z_BRCD))
            terms["codebook"] = self.codebook.codebook_weight * error
        if self.codebook.start is not None:
            noise = jax.random.normal(key, z_BRCD.shape, jnp.float32) * self.sizes.code_dim**-0.5
            noisy_BRCD = self._comparable(z_BRCD + self.codebook.noise * noise)
            q_BRCD = jnp.where(memory["started"], q_BRCD, noisy_BRCD)
            terms = {name: jnp.where(memory["started"], value, 0.0) for name, value in terms.items()}
        return q_BRCD, tokens_BRC, terms, jax.lax.stop_gradient(z_BRCD)

    def remember(self, params: Params, memory: Memory, observed, *, key: jax.Array, step) -> tuple[Params, Memory]:
        """`Task.remember`. observed: 'vectors' [accumulate, B, R, C, D] and 'tokens' int32 [accumulate, B, R, C]."""
        z_ND = _in_order(observed["vectors"]).reshape(-1, self.sizes.code_dim)
        tokens_N = _in_order(observed["tokens"]).reshape(-1)
        codes_KD = constrain(params["quantizer"]["codebook"], (None, None))
        if self.codebook.start is None:
            codes_KD, memory = self._learned(codes_KD, memory, z_ND, tokens_N, step=step)
        else:
            codes_KD, memory = jax.lax.cond(
                memory["started"],
                lambda: self._learned(codes_KD, memory, z_ND, tokens_N, step=step),
                lambda: self._collected(codes_KD, memory, z_ND, key=key, step=step),
            )
        return params | {"quantizer": params["quantizer"] | {"codebook": codes_KD}}, memory

    def _learned(self, codes_KD, memory: Memory, z_ND, tokens_N, *, step) -> tuple[jax.Array, Memory]:
        """Codes and memory after a batch that these codes quantized."""
        if "counts" not in memory:
            return codes_KD, memory
        old_KD, memory = self._comparable(codes_KD), dict(memory)
        counts_K, sums_KD = sum_by_code(z_ND, tokens_N, codes=self.sizes.vocab)
        memory["updates"] += 1
        decay = Ema(decay=self.codebook.decay).decay_at(memory["updates"])
        memory["counts"] = decay * memory["counts"] + (1.0 - decay) * counts_K
        if "sums" in memory:
            memory["sums"] = decay * memory["sums"] + (1.0 - decay) * sums_KD
            codes_KD = memory["sums"] / self._smooth(memory["counts"])[:, None]
        if self.codebook.dead_below is None:
            return codes_KD, memory
        return jax.lax.cond(
            (step + 1) % self.codebook.dead_every == 0,
            lambda: self._revived(codes_KD, memory, z_ND, jnp.square(z_ND - old_KD[tokens_N]).sum(1)),
            lambda: (codes_KD, memory),
        )

    def _smooth(self, counts_K):
        """Counts that are never 0 and have the same sum (Laplace)."""
        total, epsilon = counts_K.sum(), self.codebook.epsilon
        return (counts_K + epsilon) / (total + len(counts_K) * epsilon) * total

    def _revived(self, codes_KD, memory: Memory, z_ND, distance_N) -> tuple[jax.Array, Memory]:
        """Dead codes in the places of the worst matched vectors: code, sum and count together, else the next update
        would undo it."""
        assert self.codebook.dead_below is not None
        is_dead_K = memory["counts"] < self.codebook.dead_below
        is_moved_K, codes_KD = replace(codes_KD, is_dead_K, z_ND, distance_N)
        count = max(self.codebook.dead_below, 1.0)
        memory = memory | {"counts": jnp.where(is_moved_K, count, memory["counts"])}
        if "sums" in memory:
            smooth_K1 = self._smooth(memory["counts"])[:, None]
            memory["sums"] = jnp.where(is_moved_K[:, None], smooth_K1 * codes_KD, memory["sums"])
        return codes_KD, memory

    def _collected(self, codes_KD, memory: Memory, z_ND, *, key, step) -> tuple[jax.Array, Memory]:
        """Codes and memory after an update without codes."""
        assert self.codebook.start is not None
        choosing, starting = jax.random.split(key)
        size, each = len(memory["collected"]), self.collected[1]
        chosen = jax.random.permutation(choosing, len(z_ND))[:each]
        collected = jnp.concatenate([memory["collected"], z_ND[chosen]])[-size:]
        memory = memory | {"collected": collected, "filled": jnp.minimum(memory["filled"] + each, size)}
        # Skipped updates leave nothing, so it may fill up later than planned.
        due = (step + 1 >= self.codebook.start) & (memory["filled"] == size)
        return jax.lax.cond(due, lambda: self._started(memory, starting), lambda: (codes_KD, memory))

    def _started(self, memory: Memory, key) -> tuple[jax.Array, Memory]:
        """The first codes, of the vectors that were collected."""
        z_XD = memory["collected"]
        rounds = KMEANS_ROUNDS if self.codebook.kmeans else 0
        codes_KD, counts_K = kmeans(z_XD, self.sizes.vocab, key=key, rounds=rounds, on_sphere=self.sizes.unit_codes)
        memory = memory | {"started": jnp.ones([], bool)}
        if "counts" in memory:
            counts_K = counts_K * (self.vectors / len(z_XD))  # of one update
            memory |= {"updates": jnp.int32(self.collected[0]), "counts": counts_K}
        if "sums" in memory:
            memory["sums"] = codes_KD * self._smooth(counts_K)[:, None]
        return codes_KD, memory


def sum_by_code(z_ND, tokens_N, *, codes: int) -> tuple[jax.Array, jax.Array]:
    """Number and sum of the vectors of each code: float32 [K] and [K, D], the same bits in any order of the vectors.

    Vectors are rounded to 24 bits, sign included, of the largest number among them (fewer beyond half a million
    vectors), and summed as whole numbers in two halves, which cannot overflow.
    """
    half = min(HALF, 31 - (len(z_ND) - 1).bit_length())
    _, exponent = jnp.frexp(jnp.abs(z_ND).max())
    whole_ND = jnp.round(jnp.ldexp(z_ND, 2 * half - 1 - exponent)).astype(jnp.int32)
    counts_K = jnp.zeros(codes, jnp.int32).at[tokens_N].add(1)
    nothing_KD = jnp.zeros((codes, z_ND.shape[1]), jnp.int32)
    low_KD = nothing_KD.at[tokens_N].add(whole_ND & (2**half - 1))
    high_KD = nothing_KD.at[tokens_N].add(whole_ND >> half) + (low_KD >> half)
    sums_KD = high_KD.astype(jnp.float32) * 2.0**half + (low_KD & (2**half - 1)).astype(jnp.float32)
    return counts_K.astype(jnp.float32), jnp.ldexp(sums_KD, exponent - (2 * half - 1))


def replace(codes_KD, is_dead_K, z_ND, distance_N) -> tuple[jax.Array, jax.Array]:
    """Codes of which the dead ones, the first before the second, have become the vectors with the largest distances.

    Returns: bool [K], which codes were moved, and the codes [K, D]. With fewer vectors than dead codes some stay.
    """
    count = min(codes_KD.shape[0], len(z_ND))
    _, worst = jax.lax.top_k(distance_N, count)
    place_K = jnp.cumsum(is_dead_K) - 1
    is_moved_K = is_dead_K & (place_K < count)
    moved_KD = z_ND[worst[place_K.clip(0, count - 1)]]
    return is_moved_K, jnp.where(is_moved_K[:, None], moved_KD, codes_KD)


def kmeans(z_XD, codes: int, *, key, rounds: int, on_sphere: bool) -> tuple[jax.Array, jax.Array]:
    """Lloyd's k-means from random vectors: centers [K, D], and float32 [K], the vectors of each, at least 1.

    z_XD: at least K vectors. A center without vectors goes to one of the worst matched. on_sphere: centers have
    length 1.
    """
    chosen = jax.random.permutation(key, len(z_XD))[:codes]

    def assigned(codes_KD):
        tokens_X = nearest(z_XD, codes_KD)
        return tokens_X, *sum_by_code(z_XD, tokens_X, codes=codes)

    def move(_, codes_KD):
        tokens_X, counts_K, sums_KD = assigned(codes_KD)
        means_KD = sums_KD / counts_K.clip(1.0)[:, None]
        means_KD = unit(means_KD) if on_sphere else means_KD
        return replace(means_KD, counts_K == 0, z_XD, jnp.square(z_XD - codes_KD[tokens_X]).sum(1))[1]

    codes_KD = jax.lax.fori_loop(0, rounds, move, z_XD[chosen])
    return codes_KD, assigned(codes_KD)[1].clip(1.0)


def _mean_square(a, b):
    return jnp.square(a - b).mean()


def _in_order(x):
    """[accumulate, B / accumulate, ...] -> [B, ...]: microbatch i has every accumulate-th example, beginning with i."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
