"""SimCLR's loss: NT-Xent, equation 1 (arXiv 2002.05709)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax


def nt_xent(
    projection: jax.Array,
    own_view: jax.Array,
    other_view: jax.Array,
    first_row: jax.Array | int,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of finding an image's other view among the 2B - 1 other views.

    Gradients flow into all three arrays. The paper's equation is the mean over both views of what
    this gives for each.

    Args:
        projection: `[b, D]` float32 unit vectors, this device's images in one view.
        own_view, other_view: `[B, D]` float32 unit vectors, the global batch's in that view and in
            the other one.
        first_row: where this device's images begin in the global batch.
        temperature: tau of equation 1.

    Returns:
        Two float32 scalars: the loss, and how often the other view is the most similar; means over
        this device's images.
    """
    rows = first_row + jnp.arange(len(projection))
    itself = jnp.arange(len(own_view)) == rows[:, None]
    # float32 in full, which accelerators don't give by themselves.
    similarity = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    same = jnp.where(itself, -jnp.inf, similarity(projection, own_view.T))  # [b, B]
    other = similarity(projection, other_view.T)
    logits = jnp.concatenate([other, same], axis=1) / temperature
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, rows)
    top1 = jnp.argmax(logits, axis=1) == rows
    return jnp.mean(loss), jnp.mean(top1.astype(jnp.float32))
