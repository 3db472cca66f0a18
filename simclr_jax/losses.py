"""SimCLR's loss: NT-Xent, equation 1 (arXiv 2002.05709)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.models import contrast


def nt_xent(
    projection_1: jax.Array,
    projection_2: jax.Array,
    temperature: float,
    gather: Callable[[Any], Any] = lambda rows: rows,
    batch_offset: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of picking an image's other view among the 2B - 1 other views.

    Gradients flow into both projections and into the gathered rows.

    Args:
        projection_1, projection_2: `[b, D]` float32 unit vectors, this device's images in both
            views.
        temperature: tau of equation 1.
        gather: gathers the rows of all devices, `[B, D]`; the identity if one device has them all.
        batch_offset: index of this device's first image in the gathered rows.

    Returns:
        Two float32 scalars: the loss, and how often the other view is the most similar; means over
        both views of this device's images.
    """
    all_1, all_2 = gather((projection_1, projection_2))
    loss_1, top1_1 = _of_view(projection_1, all_1, all_2, temperature, batch_offset)
    loss_2, top1_2 = _of_view(projection_2, all_2, all_1, temperature, batch_offset)
    return (loss_1 + loss_2) / 2, (top1_1 + top1_2) / 2


def _of_view(
    projection: jax.Array,
    own_view: jax.Array,
    other_view: jax.Array,
    temperature: float,
    batch_offset: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of one view's rows `[b, D]` among both views' of the batch, `[B, D]`."""
    rows = batch_offset + jnp.arange(len(projection))
    itself = jnp.arange(len(own_view)) == rows[:, None]
    # Full float32; accelerators default to lower precision.
    similarity = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    same = similarity(projection, own_view.T) / temperature  # [b, B]
    other = similarity(projection, other_view.T) / temperature
    positive = jnp.sum(jnp.where(itself, other, 0.0), axis=1)
    # Finite, as in the authors' code, so that a batch of one image has a gradient.
    negatives = jnp.where(jnp.tile(itself, 2), -1e9, jnp.concatenate([same, other], axis=1))
    loss = contrast.info_nce(positive, negatives)
    top1 = positive > negatives.max(axis=1)
    return jnp.mean(loss), jnp.mean(top1.astype(jnp.float32))
