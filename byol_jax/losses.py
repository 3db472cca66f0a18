"""BYOL's loss, section 3.1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax


def regression_loss(prediction: jax.Array, projection: jax.Array) -> jax.Array:
    """Equation 2: the squared distance of the normalised vectors, 2 - 2 cos, in [0, 4].

    Args:
        prediction: `[B, D]` float32, the online branch's q(z).
        projection: `[B, D]` float32, the target branch's z'.

    Returns:
        `[B]` float32.
    """
    cosine = optax.cosine_similarity(prediction, projection, epsilon=1e-12)
    return 2.0 - 2.0 * cosine


def byol_loss(
    prediction_1: jax.Array,
    prediction_2: jax.Array,
    target_projection_1: jax.Array,
    target_projection_2: jax.Array,
) -> jax.Array:
    """The symmetrised loss, in [0, 8]: each view's prediction against the other's projection.

    The target branch is a constant here: no gradient passes through it (section 3.1's "sg").

    Args:
        prediction_1, prediction_2: `[B, D]` float32, online, of view 1 and view 2.
        target_projection_1, target_projection_2: `[B, D]` float32, of the target network.

    Returns:
        A float32 scalar, the mean over the batch.
    """
    target_1 = lax.stop_gradient(target_projection_1)
    target_2 = lax.stop_gradient(target_projection_2)
    return positive_loss(prediction_1, prediction_2, target_1, target_2)


def positive_loss(
    prediction_1: jax.Array, prediction_2: jax.Array, target_1: jax.Array, target_2: jax.Array
) -> jax.Array:
    """`byol_loss` without its stop-gradient: gradients also flow into the targets."""
    loss = regression_loss(prediction_1, target_2) + regression_loss(prediction_2, target_1)
    return jnp.mean(loss)
