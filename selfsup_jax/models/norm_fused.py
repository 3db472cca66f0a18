"""Batch norms that do without their input, together with what comes before or after them.

They give what the layers give one after the other, up to rounding, with less memory traffic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import moments

_exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def suits(layout: BatchLayout | None) -> bool:
    """Whether `norm_of_product` pays: in training, and its work grows with the groups."""
    return layout is not None and layout.num_views * layout.groups <= 2


def norm_of_maxima(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    layout: BatchLayout,
    epsilon: float,
    pool: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`pool(relu(batch_norm(x)))`, where `pool` takes the maxima of windows.

    A norm with a positive factor and a ReLU preserve order, so they come after the maximum, on a
    quarter of the elements, and the normalised `x` is never stored. Channels with a negative gamma
    are negated first. See `batch_norm` for the arguments and the results.
    """
    sign = jnp.where(scale < 0, -1.0, 1.0)
    x = x * sign.astype(x.dtype)
    y, mean, var = _norm_by(x, pool(x), scale * sign, bias, layout, epsilon)
    return y, mean * sign, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _norm_by(
    x: jax.Array,
    maxima: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    layout: BatchLayout,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises `maxima` by the statistics of `x`, and applies a ReLU."""
    mean, var = moments.moments(x, layout)
    y = moments.affine(maxima, *moments.coefficients(x, scale, bias, mean, var, epsilon))
    return jnp.maximum(y, 0), mean, var


def _norm_by_forward(x, maxima, scale, bias, layout, epsilon):
    y, mean, var = _norm_by(x, maxima, scale, bias, layout, epsilon)
    return (y, mean, var), (x, maxima, scale, bias, mean, var)


def _norm_by_backward(layout, epsilon, saved, cotangents):
    x, maxima, scale, bias, mean, var = saved
    coefficients = moments.coefficients(x, scale, bias, mean, var, epsilon)
    dy = jnp.where(moments.affine(maxima, *coefficients) > 0, cotangents[0], 0).astype(jnp.float32)
    share = maxima.size / x.size
    # Means over the pixels of `x`, most of which are no maxima.
    of_dy = tuple(moments.means(a, layout) * share for a in (dy, dy * maxima))
    back = moments.through(x.size // mean.size, scale, mean, var, epsilon, layout, of_dy)
    factor, slope, offset = (moments.by_row(a, x) for a in back.coefficients)
    d_x = (offset - slope * x).astype(x.dtype)
    d_maxima = (factor * dy).astype(maxima.dtype)
    return d_x, d_maxima, back.d_scale, back.d_bias


_norm_by.defvjp(_norm_by_forward, _norm_by_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def norm_of_product(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    layout: BatchLayout,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`batch_norm(x @ kernel)` that neither stores nor reads `x @ kernel`, forward and backward.

    For a kernel with more outputs than inputs. All sums over the rows that the norm and its
    gradient need follow from sums of products of the (few) inputs:

        mean(x W) = mean(x) W
        mean((x W)^2) = diag(W' mean(x' x) W)
        sum(dy (x W)) = diag(W' sum(x' dy))

    Args:
        x: `[rows, ..., K]`, any float dtype.
        kernel: `[K, C]`, of the same dtype.
        scale, bias, layout, epsilon: see `batch_norm`.

    Returns:
        See `batch_norm`; the result is `[rows, ..., C]`.
    """
    return _norm_of_product_forward(x, kernel, scale, bias, layout, epsilon)[0]


def _norm_of_product_forward(x, kernel, scale, bias, layout, epsilon):
    w = kernel.astype(jnp.float32)
    total = moments.sums(x, layout)  # [V * G, K]
    gram = _products(x, x, layout)  # [V * G, K, K]
    count = x.size // total.size
    squares = jnp.sum(w * _exact(gram, w), 1)
    mean, mean_of_squares = layout.mean((_exact(total, w) / count, squares / count))
    var = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)
    product = _times(x, kernel)
    y = moments.affine(product, *moments.coefficients(x, scale, bias, mean, var, epsilon))
    return (y.astype(x.dtype), mean, var), (x, kernel, scale, mean, var, total, gram)


def _norm_of_product_backward(layout, epsilon, saved, cotangents):
    x, kernel, scale, mean, var, total, gram = saved
    g, w = cotangents[0], kernel.astype(jnp.float32)
    count = x.size // total.size
    products = _products(x, g, layout)  # [V * G, K, C]
    of_dy = moments.sums(g, layout) / count, jnp.sum(w * products, 1) / count
    back = moments.through(count, scale, mean, var, epsilon, layout, of_dy)
    factor, slope, offset = back.coefficients  # d (x W) = factor g - slope (x W) + offset
    d_kernel = factor[:, None] * products - slope[:, None] * _exact(gram, w)
    d_kernel = (d_kernel + total[..., None] * offset[:, None]).sum(0).astype(kernel.dtype)
    scaled = (g * moments.by_row(factor, x)).astype(x.dtype)
    within = _exact(w * slope[:, None], w.T)  # [V * G, K, K]
    of_x = jnp.zeros((), x.dtype)  # x within, with the square of the row's group
    for i, square in enumerate(within.astype(x.dtype)):
        own = moments.by_row(jnp.arange(len(within))[:, None] == i, x)
        of_x = jnp.where(own, _times(x, square).astype(x.dtype), of_x)
    d_x = _times(scaled, kernel.T) - of_x + moments.by_row(_exact(offset, w.T), x)
    return d_x.astype(x.dtype), d_kernel, back.d_scale, back.d_bias


norm_of_product.defvjp(_norm_of_product_forward, _norm_of_product_backward)


def _products(x: jax.Array, y: jax.Array, layout: BatchLayout) -> jax.Array:
    """Sums over the rows of each group of x' y: `[V * G, K, C]` float32."""
    window = ("CHWN", "IHWO", "NHWC")  # the gradient of a 1x1 convolution's kernel
    sets = layout.num_views * layout.groups
    sums = [
        lax.conv_general_dilated(
            *(a, b, (1, 1), "VALID"), dimension_numbers=window, preferred_element_type=jnp.float32
        )
        for a, b in zip(jnp.split(x, sets), jnp.split(y, sets), strict=True)
    ]
    return jnp.stack([a[:, 0, 0] for a in sums])


def _times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution, to float32."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        *(x, kernel[None, None], (1, 1), "VALID"),
        dimension_numbers=layout,
        preferred_element_type=jnp.float32,
    )
