"""SimSiam's loss, equations 1 to 4 (arXiv 2011.10566)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax


def simsiam_loss(
    prediction_1: jax.Array,
    prediction_2: jax.Array,
    projection_1: jax.Array,
    projection_2: jax.Array,
) -> jax.Array:
    """The symmetrised negative cosine, in [-1, 1]: D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2.

    The projections are constants here: without the stop-gradient it collapses (section 4.1).

    Args:
        prediction_1, prediction_2: `[B, D]` float32, p of view 1 and view 2.
        projection_1, projection_2: `[B, D]` float32, z of view 1 and view 2.

    Returns:
        A float32 scalar, the mean over the batch.
    """
    z_1, z_2 = lax.stop_gradient(projection_1), lax.stop_gradient(projection_2)
    cosines = optax.cosine_similarity(prediction_1, z_2, epsilon=1e-12)
    cosines += optax.cosine_similarity(prediction_2, z_1, epsilon=1e-12)
    return -jnp.mean(cosines) / 2.0
