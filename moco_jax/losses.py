"""MoCo's loss: InfoNCE against the keys of a queue, equation 1 of v1 (arXiv 1911.05722)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.models import contrast


def contrastive_logits(
    query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float
) -> jax.Array:
    """Similarities of each query to its own key, which comes first, and to the queue's keys.

    Keys and queue are constants here: no gradient flows into them (algorithm 1's `detach`).

    Args:
        query: `[B, D]` float32 unit vectors.
        key: `[B, D]` float32 unit vectors, of the same images.
        queue: `[K, D]` float32 unit vectors, of other images.
        temperature: tau of equation 1.

    Returns:
        `[B, 1 + K]` float32.
    """
    key, queue = lax.stop_gradient(key), lax.stop_gradient(queue)
    positive = jnp.sum(query * key, axis=-1, keepdims=True)  # [B, 1]
    # Full float32; accelerators default to lower precision.
    negative = jnp.matmul(query, queue.T, precision=lax.Precision.HIGHEST)  # [B, K]
    return jnp.concatenate([positive, negative], axis=1) / temperature


def info_nce(
    query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of picking each query's own key among all 1 + K.

    Args:
        query, key, queue, temperature: see `contrastive_logits`.

    Returns:
        Two float32 scalars: the loss, and how often the own key is the most similar; means over B.
    """
    logits = contrastive_logits(query, key, queue, temperature)
    loss = contrast.info_nce(logits[:, 0], logits[:, 1:])
    top1 = logits[:, 0] > logits[:, 1:].max(axis=1)
    return jnp.mean(loss), jnp.mean(top1.astype(jnp.float32))
