"""BYOL's loss, section 3.1, and what lies between it and SimCLR's, section 5."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.special import logsumexp

from selfsup_jax.models.heads import l2_normalize


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
    """`byol_loss` as it is where no target network stops the gradient."""
    loss = regression_loss(prediction_1, target_2) + regression_loss(prediction_2, target_1)
    return jnp.mean(loss)


def negatives_loss(
    prediction: jax.Array,
    own_view: jax.Array,
    other_view: jax.Array,
    first_row: jax.Array | int,
    temperature: float,
) -> jax.Array:
    """What beta weighs in section 5's InfoNCE of one view: similarity to all but the image itself.

    2 alpha ln(sum over j != i of exp(S(v_i, v_j) / alpha) + sum over j of exp(S(v_i, v'_j) /
    alpha)), mean over i, where S is the cosine. With `regression_loss` and beta = 1 it makes
    2 + 2 alpha times SimCLR's NT-Xent.

    Args:
        prediction: `[b, D]` float32, phi of this device's images in view v.
        own_view, other_view: `[B, D]` float32, psi of the global batch's images in v and in v'.
        first_row: where this device's images begin in the global batch.
        temperature: alpha.

    Returns:
        A float32 scalar, the mean over this device's images.
    """
    phi = l2_normalize(prediction)
    # float32 in full, which accelerators don't give by themselves.
    similarity = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    same = similarity(phi, l2_normalize(own_view).T) / temperature  # [b, B]
    other = similarity(phi, l2_normalize(other_view).T) / temperature
    itself = jnp.arange(same.shape[1]) == first_row + jnp.arange(same.shape[0])[:, None]
    same = jnp.where(itself, -jnp.inf, same)
    log_sum = logsumexp(jnp.concatenate([same, other], axis=1), axis=1)
    return jnp.mean(2.0 * temperature * log_sum)
