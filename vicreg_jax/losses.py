"""VICReg's loss, equations 1 to 6 (arXiv 2105.04906)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Terms(NamedTuple):
    """The three terms (float32 scalars), or their weights."""

    invariance: Any  # mean over this device's rows
    variance: Any  # the sum of both views', equal on every device
    covariance: Any  # likewise


def vicreg_terms(
    projection_1: jax.Array,
    projection_2: jax.Array,
    global_batch: int,
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree,
    epsilon: float = 1e-4,
) -> Terms:
    """Invariance s, variance v and covariance c of the expander's outputs.

    s is the mean over rows *and* dimensions, as in the paper's pseudo-code and the authors' code
    (equation 5 sums over dimensions). Devices exchange moments, but no rows.

    Args:
        projection_1, projection_2: `[b, D]` float32, this device's rows of both views.
        global_batch: B, over all devices.
        mean_over_devices: of a tree; the identity if one device has the whole batch.
        epsilon: added to the variances.
    """
    variance, covariance = jnp.float32(0.0), jnp.float32(0.0)
    unbiased = global_batch / max(1, global_batch - 1)
    for z in (projection_1, projection_2):
        centred = z - mean_over_devices(z.mean(0))
        # Full float32; accelerators default to lower precision.
        moments = jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST) / len(z)
        moments = unbiased * mean_over_devices(moments)  # [D, D]: C(Z)
        variances = jnp.diagonal(moments)
        variance += jnp.mean(jnp.maximum(0.0, 1.0 - jnp.sqrt(variances + epsilon)))
        off_diagonal = moments - jnp.diag(variances)
        covariance += jnp.sum(jnp.square(off_diagonal)) / z.shape[1]
    return Terms(jnp.mean(jnp.square(projection_1 - projection_2)), variance, covariance)
