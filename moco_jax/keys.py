"""Encoding the keys: batch norm over shuffled groups (v1, section 3.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from selfsup_jax.devices import collectives
from selfsup_jax.method import Context
from selfsup_jax.models.network import apply, split_views, stack_views
from selfsup_jax.state import PyTree


def encode_keys(
    variables: PyTree, views: jax.Array, context: Context, *, net: Any
) -> tuple[jax.Array, PyTree]:
    """Keys of shuffled batches (section 3.3, "shuffling BN"), in the order of the views.

    Each view's images are dealt out to the batch-norm groups anew before they are encoded, so
    that a query and its key share their statistics with the same images no more often than a
    query and any other key do; afterwards the keys are put back. One group leaves the order as it
    is.

    Args:
        variables: of the key encoder.
        views: `[V, b, H, W, C]` float32.
        context: the step's.
        net: the module.

    Returns:
        `[V, b, D]` unit vectors, and the new batch statistics.
    """
    layout, axis_name = context.layout(len(views)), context.axis_name
    if context.groups == 1:
        (_, keys), stats = apply(net, variables, stack_views(views), layout)
        return split_views(keys, len(views)), stats

    rng = jax.random.fold_in(context.rng, 0)
    orders = [
        dealing_order(jax.random.fold_in(rng, view), context.index, context.groups)
        for view in range(len(views))
    ]
    images = views.astype(net.encoder.dtype)  # what the encoder makes of them anyway
    dealt = [collectives.deal(x, order, axis_name) for x, order in zip(images, orders, strict=True)]
    (_, keys), stats = apply(net, variables, jnp.concatenate(dealt), layout)
    restored = [
        collectives.collect(x, order, axis_name)
        for x, order in zip(split_views(keys, len(views)), orders, strict=True)
    ]
    return jnp.stack(restored), stats


def dealing_order(rng: jax.Array, index: jax.Array, groups: int) -> jax.Array:
    """Who goes where: for each run of G images of the global batch, a permutation of them.

    Args:
        rng: the key of a view of a step.
        index: `[B]` int32, the images' places in the global batch, which their draws depend on.
        groups: G.

    Returns:
        `[B / G, G]` int32; image `order[i, g]` of run i goes to group g.
    """
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(rng, i)))(index)
    return jnp.argsort(draws.reshape(-1, groups), axis=1)
