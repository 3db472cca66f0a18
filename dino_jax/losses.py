"""DINO's loss, equations 1 to 3 (arXiv 2104.14294), and the signs of its two collapses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Terms(NamedTuple):
    """What `dino_loss` returns: means over the batch, in nats; section 5.3 explains them.

    Attributes:
        loss: the cross-entropy H(P_t, P_s) = h(P_t) + KL(P_t, P_s).
        entropy: h(P_t); log K if the teacher's output is uniform.
        student_kl: KL(P_t, P_s); 0 if the outputs are constant.
        usage: `[K]`, the teacher's mean distribution.
    """

    loss: jax.Array
    entropy: jax.Array
    student_kl: jax.Array
    usage: jax.Array


def dino_loss(
    student: jax.Array,
    teacher: jax.Array,
    centre: jax.Array,
    student_temperature: float,
    teacher_temperature: jax.Array | float,
) -> Terms:
    """Equation 3: the cross-entropy over pairs of a teacher's and another view of the student.

    The teacher is a constant here: no gradient flows into it (algorithm 1's `detach`).

    Args:
        student: `[V, B, K]` float32, outputs of all views; the first T are the teacher's views.
        teacher: `[T, B, K]` float32, outputs of the global views.
        centre: `[K]` float32, subtracted from the teacher's outputs.
        student_temperature, teacher_temperature: the softmaxes' (equation 1).
    """
    log_t = jax.nn.log_softmax((lax.stop_gradient(teacher) - centre) / teacher_temperature)
    log_s = jax.nn.log_softmax(student / student_temperature)
    p = jnp.exp(log_t)
    # Full float32; accelerators default to lower precision.
    cross = -jnp.einsum("tbk,vbk->tv", p, log_s, precision=lax.Precision.HIGHEST) / p.shape[1]
    different = 1.0 - jnp.eye(len(p), len(student))
    loss = jnp.sum(cross * different) / jnp.sum(different)
    entropy = -jnp.mean(jnp.sum(p * log_t, axis=-1))
    return Terms(loss, entropy, loss - entropy, p.mean((0, 1)))


def uniform_kl(usage: jax.Array) -> jax.Array:
    """KL(usage, uniform), from 0 to log K: then one prototype has all images."""
    entropy = -jnp.sum(jax.scipy.special.xlogy(usage, usage))
    return jnp.log(len(usage)) - entropy
