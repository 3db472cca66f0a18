"""The negatives in BYOL's section 5: InfoNCE with a weight beta between BYOL and SimCLR."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp

from selfsup_jax.models.heads import l2_normalize


def negatives_loss(
    prediction: jax.Array,
    own_view: jax.Array,
    other_view: jax.Array,
    temperature: float,
    batch_offset: jax.Array | int = 0,
) -> jax.Array:
    """The term with weight beta in section 5's InfoNCE, for the images of one view.

    2 alpha ln(sum over j != i of exp(S(v_i, v_j) / alpha) + sum over j of exp(S(v_i, v'_j) /
    alpha)), mean over i, where S is the cosine. With beta = 1, the sum of `regression_loss`
    and this term is 2 + 2 alpha L, where L is SimCLR's NT-Xent.

    Args:
        prediction: `[b, D]` float32, phi of this device's images in view v.
        own_view, other_view: `[B, D]` float32, psi of the global batch's images in v and in v'.
        temperature: alpha.
        batch_offset: index of this device's first image in the global batch.

    Returns:
        A float32 scalar, the mean over this device's images.
    """
    phi = l2_normalize(prediction)
    # Full float32; accelerators default to lower precision.
    similarity = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    same = similarity(phi, l2_normalize(own_view).T) / temperature  # [b, B]
    other = similarity(phi, l2_normalize(other_view).T) / temperature
    itself = jnp.arange(same.shape[1]) == batch_offset + jnp.arange(same.shape[0])[:, None]
    same = jnp.where(itself, -jnp.inf, same)
    log_sum = logsumexp(jnp.concatenate([same, other], axis=1), axis=1)
    return jnp.mean(2.0 * temperature * log_sum)
