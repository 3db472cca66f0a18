"""Barlow Twins' loss, equations 1 and 2 (arXiv 2103.03230)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def barlow_twins_loss(
    projection_1: jax.Array,
    projection_2: jax.Array,
    off_diagonal_weight: float,
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """The distance of the views' cross-correlation matrix from the identity.

    Each dimension is normalised over the global batch, as in the authors' batch norm without scale
    and offset. Devices exchange moments and the matrix, but no rows.

    Args:
        projection_1, projection_2: `[b, D]` float32, this device's rows of both views.
        off_diagonal_weight: lambda, the weight of the redundancy term.
        mean_over_devices: of a tree; the identity if one device has the whole batch.
        epsilon: added to the variances.

    Returns:
        Two float32 scalars, equal on every device: sum over i of (1 - C_ii)^2 + lambda sum over
        i != j of C_ij^2, and the mean of the diagonal.
    """

    def normalize(z: jax.Array) -> jax.Array:
        centred = z - mean_over_devices(z.mean(0))
        variance = mean_over_devices(jnp.square(centred).mean(0))
        return centred * lax.rsqrt(variance + epsilon)

    z_1, z_2 = normalize(projection_1), normalize(projection_2)
    # Full float32; accelerators default to lower precision.
    correlation = jnp.matmul(z_1.T, z_2, precision=lax.Precision.HIGHEST) / len(z_1)
    correlation = mean_over_devices(correlation)  # [D, D]
    diagonal = jnp.diagonal(correlation)
    off_diagonal = correlation - jnp.diag(diagonal)
    redundancy = jnp.sum(jnp.square(off_diagonal))
    invariance = jnp.sum(jnp.square(1.0 - diagonal))
    return invariance + off_diagonal_weight * redundancy, jnp.mean(diagonal)
