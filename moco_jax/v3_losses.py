"""MoCo v3's loss: InfoNCE within the batch, equation 1 of v3 (arXiv 2104.02057)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.models import contrast


def contrastive_loss(
    query: jax.Array, keys: jax.Array, temperature: float, batch_offset: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """`ctr` of algorithm 1: the cross-entropy of picking each query's own key, times 2 tau.

    Keys are constants here: no gradient flows into them.

    Args:
        query: `[b, D]` float32 unit vectors, of this device's images in one view.
        keys: `[B, D]` float32 unit vectors, of the global batch's images in the other view.
        temperature: tau of equation 1.
        batch_offset: index of this device's first image in the global batch.

    Returns:
        Two float32 scalars: the loss, and how often the own key is the most similar; means over b.
    """
    keys = lax.stop_gradient(keys)
    # Full float32; accelerators default to lower precision.
    logits = jnp.matmul(query, keys.T, precision=lax.Precision.HIGHEST) / temperature  # [b, B]
    own = jnp.arange(len(keys)) == batch_offset + jnp.arange(len(query))[:, None]
    positive = jnp.sum(jnp.where(own, logits, 0.0), axis=1)
    negatives = jnp.where(own, -1e9, logits)  # finite: a batch of one image has a gradient too
    loss = contrast.info_nce(positive, negatives)
    top1 = positive > negatives.max(axis=1)
    return 2.0 * temperature * jnp.mean(loss), jnp.mean(top1.astype(jnp.float32))
