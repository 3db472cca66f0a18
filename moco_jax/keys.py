"""Encoding the keys: batch norm over shuffled groups (v1, section 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moco_jax import networks
from moco_jax.networks import Networks
from selfsup_jax import collectives
from selfsup_jax.collectives import BatchLayout


def encode_keys(
    rng: jax.Array,
    params: dict,
    stats: dict,
    views: jax.Array,
    index: jax.Array,
    *,
    networks_: Networks,
    layout: BatchLayout,
    bn_groups: int,
) -> tuple[jax.Array, dict]:
    """Keys of shuffled batches (section 3.3, "shuffling BN"), in the order of the views.

    Each view's images are dealt out to the batch-norm groups anew before they are encoded, so
    that a query and its key share their statistics with the same images no more often than a
    query and any other key do; afterwards the keys are put back.

    Args:
        rng: the key of this step.
        params, stats: of the key encoder.
        views: `[V, B, H, W, C]` float32.
        index: `[B]` int32, the images' places in the global batch.
        networks_: the modules.
        layout: of the V views.
        bn_groups: G, of the global batch; 1 leaves the order as it is.

    Returns:
        `[V, B, D]` unit vectors, and the new batch statistics.
    """
    num_views, rows = views.shape[:2]
    axis_name = layout.axis_name
    if bn_groups == 1:
        _, keys, stats = networks.apply(
            networks_, params, stats, views.reshape(-1, *views.shape[2:]), layout
        )
        return keys.reshape(num_views, rows, -1), stats

    images = views.astype(networks_.encoder.dtype)  # what the encoder makes of them anyway
    orders = [
        dealing_order(jax.random.fold_in(rng, view), index, bn_groups) for view in range(num_views)
    ]
    dealt = [collectives.deal(x, order, axis_name) for x, order in zip(images, orders, strict=True)]
    _, keys, stats = networks.apply(networks_, params, stats, jnp.concatenate(dealt), layout)
    keys = keys.reshape(num_views, rows, -1)
    restored = [
        collectives.collect(x, order, axis_name) for x, order in zip(keys, orders, strict=True)
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
