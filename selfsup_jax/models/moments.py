"""What the norms share: moments of a layout's groups, and the gradient through them.

"The groups" are the V * G batch-norm groups (or parts of groups) of a device's rows, view after
view; see `BatchLayout`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout


def moments(x: jax.Array, layout: BatchLayout) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each group, `[V * G, C]` float32."""
    x = x.astype(jnp.float32)
    # Both moments together: one pass over the activations and one collective.
    mean, mean_of_squares = layout.mean((means(x, layout), means(jnp.square(x), layout)))
    return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)


def coefficients(x, scale, bias, mean, var, epsilon) -> tuple[jax.Array, jax.Array]:
    """(factor, offset) of the norm for each row of `x`, see `by_row`."""
    factor = scale * lax.rsqrt(var + epsilon)
    return by_row(factor, x), by_row(bias - mean * factor, x)


def affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """`x * factor + offset`, computed in float32, in the dtype of `x`."""
    return (x.astype(jnp.float32) * factor + offset).astype(x.dtype)


class Back(NamedTuple):
    """d x = factor dy - slope x + offset, `[V * G, C]` each, and the parameters' gradients."""

    coefficients: tuple[jax.Array, jax.Array, jax.Array]
    d_scale: jax.Array
    d_bias: jax.Array


def through(count, scale, mean, var, epsilon, layout, of_dy) -> Back:
    """The norm's gradient from `of_dy`: means of dy and dy x over a device's `count` pixels."""
    inverse_std = lax.rsqrt(var + epsilon)
    d_scale = count * ((of_dy[1] - mean * of_dy[0]) * inverse_std).sum(0)
    d_bias = count * of_dy[0].sum(0)
    mean_dy, mean_dy_x = layout.mean(of_dy)
    # d x = factor (dy - mean(dy) - x^ mean(dy x^)) with x^ = (x - mean) / std, linear in x.
    factor = scale * inverse_std
    slope = factor * (mean_dy_x - mean * mean_dy) * jnp.square(inverse_std)
    return Back((factor, slope, slope * mean - factor * mean_dy), d_scale, d_bias)


def by_row(a: jax.Array, x: jax.Array) -> jax.Array:
    """The groups' `[V * G, C]` for each row of `x`: `[rows, 1, ..., C]`."""
    rows = jnp.repeat(a, len(x) // len(a), axis=0)
    return rows.reshape(len(x), *(1,) * (x.ndim - 2), -1)


def means(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """Each group's mean: `[rows, ..., C]` to `[V * G, C]`."""
    x = grouped(x, layout)
    return x.mean(tuple(range(1, x.ndim - 1)))


def sums(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """Each group's sum, float32: `[rows, ..., C]` to `[V * G, C]`."""
    x = grouped(x, layout)
    return x.sum(tuple(range(1, x.ndim - 1)), dtype=jnp.float32)


def grouped(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """`[rows, ..., C]` to `[V * G, rows / (V * G), ..., C]`; grouped rows stay so."""
    sets = layout.num_views * layout.groups
    return x if len(x) == sets else x.reshape(sets, -1, *x.shape[1:])
