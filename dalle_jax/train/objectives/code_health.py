"""The health of a codebook: counts of its codes, what they say, and the warning of a collapse.

Every objective of an image tokenizer logs the same four metrics. Over one batch they depend on its size, as n vectors
cannot use more than n codes; over a fixed validation set (`health`) they do not.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

COLLAPSE_SHARE = 0.1  # fewer codes in use than this share of those that could be is called a collapse


def count_codes(tokens, vocab: int):
    """Occurrences of each code in tokens of any shape: int32 [V]."""
    return jnp.zeros(vocab, jnp.int32).at[tokens.reshape(-1)].add(1)


def usage(counts_V) -> dict[str, Any]:
    """Metrics of how codes are used. counts_V: whole numbers, of numpy (in float64 then) or JAX.

    Returns: `codes_used` and `codes_used_share`, codes that occur and their share of the codebook;
    `codes_within_reach`, the highest value that so many vectors can give `codes_used`; `code_perplexity`, exp of the
    entropy of how they are distributed, 1 .. V, and 1 where nothing was counted.
    """
    xp = np if isinstance(counts_V, np.ndarray) else jnp
    vocab, total = len(counts_V), counts_V.sum()
    share_V = counts_V / total.clip(1)
    entropy = -xp.where(counts_V > 0, share_V * xp.log(share_V.clip(1e-30)), 0.0).sum()
    used = (counts_V > 0).sum()
    return {
        "codes_used": used.astype(share_V.dtype),
        "codes_used_share": used / vocab,
        "codes_within_reach": total.clip(0, vocab).astype(share_V.dtype),
        "code_perplexity": xp.exp(entropy),
    }


def health(counts_V: np.ndarray) -> dict[str, float]:
    """`usage` of the counts of a whole validation, as floats."""
    return {name: float(value) for name, value in usage(counts_V).items()}


def collapse_warning(metrics: Mapping[str, float], *, remedies: str) -> str | None:
    """One sentence where these metrics show a collapsed codebook, else None. remedies: a sentence on settings."""
    used, perplexity = float(metrics["codes_used"]), float(metrics["code_perplexity"])
    if used >= COLLAPSE_SHARE * float(metrics["codes_within_reach"]):
        return None
    return (
        f"codebook collapse: {used:.0f} codes in use (perplexity {perplexity:.1f}) where "
        f"{float(metrics['codes_within_reach']):.0f} could be; the pictures' detail is lost unless this recovers. "
        f"{remedies}"
    )
