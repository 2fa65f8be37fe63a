"""Dense attention under a mask and its gradients, written out in float64: what every faster way must equal."""

import jax
import numpy as np


def random(*shape, seed=0, scale=1.5, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape, scale=scale).astype(dtype)


def dense(q, k, v, w, mask):
    """In float64: output and the gradients of (w * output).sum(), written out. [B, S, N, H] each."""
    q, k, v, w = (np.asarray(x).astype(np.float64) for x in (q, k, v, w))
    scale = q.shape[-1] ** -0.5
    scores = np.where(mask, np.einsum("bqnh,bknh->bnqk", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnqk,bknh->bqnh", weights, v)
    d_weights = np.einsum("bqnh,bknh->bnqk", w, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    dq, dk = np.einsum("bnqk,bknh->bqnh", d_scores, k), np.einsum("bnqk,bqnh->bknh", d_scores, q)
    return out, (dq, dk, np.einsum("bnqk,bqnh->bknh", weights, w))


def output_and_gradients(attend, q, k, v, w):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(w)


def assert_close(found, wanted, tolerance):
    """The largest error against the largest value: errors of sums do not shrink with what is left of them."""
    for i, (a, b) in enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)):
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error <= tolerance * np.abs(b).max(), (i, error, np.abs(b).max())
