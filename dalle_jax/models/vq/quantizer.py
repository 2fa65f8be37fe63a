"""The codebook: which code is nearest to a vector, and the gradient through that choice (van den Oord et al. 2017,
section 3.1). All in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from dalle_jax.models.convolutions import Conv
from dalle_jax.models.layers import param
from dalle_jax.models.vq.config import VQConfig
from dalle_jax.sharding import constrain

MAX_DISTANCES = 1 << 24  # held at once by `nearest`: 64 MiB
MIN_LENGTH = 1e-12  # of a vector that `unit` divides by (torch.nn.functional.normalize)


def distances(z_ND, codes_KD):
    """Squared distances [N, K] of vectors [N, D] to codes [K, D]: |z|^2 - 2 z.e + |e|^2."""
    products_NK = jnp.matmul(z_ND, codes_KD.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(z_ND).sum(1)[:, None] - 2.0 * products_NK + jnp.square(codes_KD).sum(1)[None]


def nearest(z, codes_KD):
    """Index of the nearest code, the first of equals: vectors [..., D] -> int32 [...]; has no gradient.

    MAX_DISTANCES are held at once at most, or those of one position per example where even they are more: of three
    dimensions or more the first is the batch, which stays whole, because a mesh cuts it.
    """
    z, codes_KD = jax.lax.stop_gradient((z, codes_KD))
    shape, (K, D) = z.shape[:-1], codes_KD.shape
    z_BSD = z.reshape(1 if z.ndim == 2 else z.shape[0], -1, D)
    B, S, _ = z_BSD.shape
    positions = max(1, min(S, MAX_DISTANCES // max(B * K, 1)))

    def search(z_BSD):
        return jnp.argmin(distances(z_BSD.reshape(-1, D), codes_KD), axis=1).astype(jnp.int32).reshape(B, -1)

    if positions >= S:
        return search(z_BSD).reshape(shape)
    parts = -(-S // positions)
    z_BSD = jnp.pad(z_BSD, ((0, 0), (0, parts * positions - S), (0, 0)))
    found = jax.lax.map(search, z_BSD.reshape(B, parts, positions, D).swapaxes(0, 1))
    return found.swapaxes(0, 1).reshape(B, -1)[:, :S].reshape(shape)


def straight_through(z, q):
    """q, with the gradient of z: what decodes q teaches the encoder that gave z."""
    return z + jax.lax.stop_gradient(q - z)


def unit(x):
    """Vectors [..., D] of length 1 in the same directions; zeros stay zeros."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, MIN_LENGTH**2))


class Quantizer(nnx.Module):
    """Parameters: {'codebook': [K, D]}, and for 'gumbel' {'projection': ...}, from a vector to logits over the codes.

    Codes begin as where each kind comes from: for 'gumbel' normal, as PyTorch's embeddings; for codes that are used so
    of length 1 on average; for a VQGAN uniform within 1 / K (taming-transformers); else uniform of variance 1 / D
    (DeepMind's example).
    """

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        start = {"bound": (3.0 / config.code_dim) ** 0.5}
        if config.quantizer == "gumbel":
            start = {"std": 1.0}
        elif config.unit_codes:
            start = {"std": config.code_dim**-0.5}
        elif config.network == "vqgan":
            start = {"bound": 1.0 / config.vocab}
        self.codebook = param(rngs, (config.vocab, config.code_dim), axes=("vocab", "embed"), **start)
        channels = (config.code_dim, config.vocab)
        self.projection = (
            Conv(1, channels, rngs, axes=("in", "vocab"), uniform=True) if config.quantizer == "gumbel" else None
        )
        self.unit_codes = config.unit_codes

    def __call__(self, z_BRCD):
        """The encoder's vectors [B, R, C, D] themselves, or for 'gumbel' logits over the codes [B, R, C, K]."""
        return z_BRCD if self.projection is None else self.projection(z_BRCD)

    def tokens(self, encoded):
        """Image tokens int32 [B, R, C] of what `__call__` gave: the nearest codes, or the largest logits; no noise."""
        if self.projection is not None:
            return jnp.argmax(encoded, axis=-1).astype(jnp.int32)
        return nearest(unit(encoded) if self.unit_codes else encoded, self.codes())

    def codes(self):
        """The codebook [K, D] as the decoder gets it."""
        codes_KD = constrain(self.codebook[...], (None, None))
        return unit(codes_KD) if self.unit_codes else codes_KD
