"""The keys: encoded over shuffled batch-norm groups (v1, section 3.3), and kept in a queue.

The queue is an array of fixed size; only the index of its oldest key moves. The queue is donated to
the compiled step, which overwrites the oldest keys with the new ones and copies nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.devices.collectives import batch_shuffle, batch_unshuffle
from selfsup_jax.method import Context, apply, split_views, stack_views
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.state import PyTree


def encode_keys(
    net: Any, variables: PyTree, views: jax.Array, context: Context
) -> tuple[jax.Array, PyTree]:
    """Keys of shuffled batches ("shuffling BN"), in the order of the views.

    Each view's images are shuffled over the batch-norm groups before they are encoded, so that a
    query shares its statistics with its own key no more often than with any other key; afterwards
    the keys are put back in order. With a single group nothing is shuffled.

    Args:
        net, variables: the module, and the key encoder's variables.
        views: `[V, b, H, W, C]`.
        context: the step's.

    Returns:
        `[V, b, D]` unit vectors, and the new batch statistics.
    """
    num_views, axis = len(views), context.axis_name
    layout = context.layout(num_views)
    if context.groups == 1:
        (_, keys), stats = apply(net, variables, stack_views(views), layout)
        return split_views(keys, num_views), stats

    rng = jax.random.fold_in(context.rng, 0)
    orders = [
        shuffle_order(jax.random.fold_in(rng, view), context.index, context.groups)
        for view in range(num_views)
    ]
    shuffled = [batch_shuffle(x, order, axis) for x, order in zip(views, orders, strict=True)]
    (_, keys), stats = apply(net, variables, jnp.concatenate(shuffled), layout)
    keys = split_views(keys, num_views)
    restored = [batch_unshuffle(x, order, axis) for x, order in zip(keys, orders, strict=True)]
    return jnp.stack(restored), stats


def shuffle_order(rng: jax.Array, index: jax.Array, groups: int) -> jax.Array:
    """Which image goes to which group: one permutation per block of G images of the global batch.

    Args:
        rng: the key of a view of a step.
        index: `[B]` int32, the images' positions in the global batch, which key their draws.
        groups: G.

    Returns:
        `[B / G, G]` int32; image `order[i, g]` of block i goes to group g.
    """
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(rng, i)))(index)
    return jnp.argsort(draws.reshape(-1, groups), axis=1)


def init_queue(rng: jax.Array, size: int, dimension: int) -> jax.Array:
    """`[size, dimension]` float32 unit vectors in random directions, as in the authors' code."""
    return l2_normalize(jax.random.normal(rng, (size, dimension), jnp.float32))


def enqueue(
    queue: jax.Array, index: jax.Array, keys: jax.Array, *, after: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Overwrites the oldest keys with new ones.

    Args:
        queue: `[K, D]` float32.
        index: int32 scalar, of the oldest key; a multiple of B.
        keys: `[B, D]` float32, in the order of the global batch; K is a multiple of B.
        after: float32 scalar that depends on everything that reads the old queue. Without it, the
            compiler may write first and must keep a copy of the queue for later reads. If it is
            not finite, the keys become NaN.

    Returns:
        The queue, and the new index of its oldest key.
    """
    keys = jnp.where(jnp.isfinite(after), keys, jnp.nan)
    queue = lax.dynamic_update_slice_in_dim(queue, keys, index, axis=0)
    return queue, (index + len(keys)) % len(queue)
