"""The queue of keys: a fixed-size array whose oldest keys give way to the newest.

The array never moves: what rolls is the index of the oldest key. So a compiled step that is given
the queue for good (donated) writes the new keys where the oldest were, and copies nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.models.heads import l2_normalize


def init(rng: jax.Array, size: int, dimension: int) -> jax.Array:
    """`[size, dimension]` float32 unit vectors in random directions, as in the authors' code."""
    return l2_normalize(jax.random.normal(rng, (size, dimension), jnp.float32))


def enqueue(
    queue: jax.Array, index: jax.Array, keys: jax.Array, *, after: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts new keys in the place of the oldest.

    Args:
        queue: `[K, D]` float32.
        index: int32 scalar, where the oldest key is; a multiple of B.
        keys: `[B, D]` float32, in the order of the global batch; K is a multiple of B.
        after: float32 scalar that depends on everything that reads the queue as it was. Without it
            a compiler may write first, and must keep a copy of the queue for what reads it later.
            Where it is no finite number, neither are the keys.

    Returns:
        The queue, and where its oldest key is now.
    """
    keys = jnp.where(jnp.isfinite(after), keys, jnp.nan)
    queue = lax.dynamic_update_slice_in_dim(queue, keys, index, axis=0)
    return queue, (index + len(keys)) % len(queue)


def oldest_first(queue: jax.Array, index: jax.Array) -> jax.Array:
    """The keys in the order in which they came, `[K, D]`."""
    return jnp.roll(queue, -index, axis=0)
