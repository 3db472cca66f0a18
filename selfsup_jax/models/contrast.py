"""InfoNCE of given similarities, for the methods' losses."""

from __future__ import annotations

import jax
from jax.scipy.special import logsumexp


def info_nce(positive: jax.Array, negatives: jax.Array) -> jax.Array:
    """The cross-entropy of picking the positive among it and the negatives.

    ln(1 + sum of exp(negative - positive)), precise also near its minimum of 0, where the usual
    difference of a logarithm and the positive's logit leaves only rounding errors in float32.

    Args:
        positive: `[B]` float32 logits.
        negatives: `[B, N]` float32 logits.

    Returns:
        `[B]` float32.
    """
    return jax.nn.softplus(logsumexp(negatives, axis=1) - positive)
