"""Batch normalisation over groups of the global batch, and the ReLU after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from selfsup_jax.devices.collectives import BatchLayout

MOMENTS = "moments"  # the name of the groups' moments for policies of rematerialisation


class BatchNorm(nn.Module):
    """Batch norm with the statistics of a group of the global batch, on any number of devices.

    The views of a batch are stacked but normalised separately, and the running averages are updated
    once per view, as if the views came one after the other. Statistics and running averages are
    float32 for any input dtype. The averages start at 0 and 1. Unlike Haiku's, they are not
    debiased; after about twenty steps the difference is negligible.

    Attributes:
        decay: of the running averages (0.9 in the authors' code).
        epsilon: added to the variance.
        zero_init_scale: initialise gamma at 0 (for the last norm of a residual branch).
        use_scale, use_bias: whether there is a gamma, and a beta.
        unbiased_average: the running average uses the variance times n / (n - 1), as in PyTorch;
            the batch itself is still normalised with the biased variance.
        relu: a ReLU follows, computed in the same pass over the data, forward and backward.
        pool: with `relu`, a max-pooling follows; see `norm_of_maxima`. Evaluation pools too.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    zero_init_scale: bool = False
    use_scale: bool = True
    use_bias: bool = True
    unbiased_average: bool = False
    relu: bool = False
    pool: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, layout: BatchLayout | None, kernel: jax.Array | None = None
    ) -> jax.Array:
        """Normalises `x` `[rows, ..., C]`; `layout=None` uses the running averages.

        With a `kernel` `[K, C]` it is `x @ kernel` that is normalised; see `norm_of_product`.
        """
        shape = (x.shape[-1] if kernel is None else kernel.shape[-1],)
        scale, bias = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        if self.use_scale:
            init_scale = nn.initializers.zeros if self.zero_init_scale else nn.initializers.ones
            scale = self.param("scale", init_scale, shape, jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        if layout is None:
            x = x if kernel is None else jnp.dot(x, kernel)
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = _affine(x, factor, bias - running_mean.value * factor)
            y = jnp.maximum(y, 0) if self.relu else y
            return self.pool(y) if self.pool else y

        if kernel is not None:
            y, mean, var = norm_of_product(x, kernel, scale, bias, layout, self.epsilon)
        elif self.pool is not None:
            y, mean, var = norm_of_maxima(x, scale, bias, layout, self.epsilon, self.pool)
        else:
            y, mean, var = batch_norm(x, scale, bias, layout, self.epsilon, self.relu)
        if not self.is_initializing():
            samples = x.size // x.shape[-1] // len(mean) * layout.sharing  # in one group
            correction = samples / max(1, samples - 1) if self.unbiased_average else 1.0
            for view in range(layout.num_views):
                groups = slice(view * layout.groups, (view + 1) * layout.groups)
                self._update(running_mean, mean[groups].mean(0))
                self._update(running_var, var[groups].mean(0) * correction)
        return y

    def _update(self, average: Any, value: jax.Array) -> None:
        average.value = self.decay * average.value + (1.0 - self.decay) * value


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    layout: BatchLayout,
    epsilon: float,
    relu: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each view and group by its own statistics (Ioffe and Szegedy, algorithm 1).

    The gradient is written by hand (the textbook's), because memory traffic limits the speed: its
    two passes over the data (sums, then result) read only the input and the incoming gradient. The
    automatic gradient also stored and read the ReLU's gradient.

    Args:
        x: `[rows, ..., C]`, any float dtype; the rows of a view, and of a group, are contiguous.
        scale, bias: gamma and beta, `[C]` float32.
        layout: divides the rows into V views of G groups; has the devices that share a group.
        epsilon: added to the variance.
        relu: whether a ReLU follows.

    Returns:
        The result, with the shape and dtype of `x`, and the groups' mean and (biased) variance,
        `[V * G, C]` float32, which have no gradient.
    """
    mean, var = _moments(x, layout)
    y = _affine(x, *_coefficients(x, scale, bias, mean, var, epsilon))
    return (jnp.maximum(y, 0) if relu else y), mean, var


def _batch_norm_forward(x, scale, bias, layout, epsilon, relu):
    y, mean, var = batch_norm(x, scale, bias, layout, epsilon, relu)
    return (y, mean, var), (x, scale, bias, mean, var)


def _batch_norm_backward(layout, epsilon, relu, saved, cotangents):
    x, scale, bias, mean, var = saved
    coefficients = _coefficients(x, scale, bias, mean, var, epsilon)

    def through_relu(g: jax.Array, x: jax.Array) -> jax.Array:
        g = jnp.where(_affine(x, *coefficients) > 0, g, 0) if relu else g
        return g.astype(jnp.float32)

    g = cotangents[0]
    dy = through_relu(g, x)
    sums = _mean(dy, layout), _mean(dy * x, layout)  # means over this device's rows of the group
    # Otherwise the GPU compiler stores `dy` for the second pass, which is slower than computing it
    # again from `g` and `x`.
    g, x, sums = _barrier_on_gpu(g, x, sums)

    back = _through_moments(x.size // mean.size, scale, mean, var, epsilon, layout, sums)
    factor, slope, offset = (_by_row(a, x) for a in back.coefficients)
    d_x = factor * through_relu(g, x) - slope * x + offset
    return d_x.astype(x.dtype), back.d_scale, back.d_bias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


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
    mean, var = _moments(x, layout)
    y = _affine(maxima, *_coefficients(x, scale, bias, mean, var, epsilon))
    return jnp.maximum(y, 0), mean, var


def _norm_by_forward(x, maxima, scale, bias, layout, epsilon):
    y, mean, var = _norm_by(x, maxima, scale, bias, layout, epsilon)
    return (y, mean, var), (x, maxima, scale, bias, mean, var)


def _norm_by_backward(layout, epsilon, saved, cotangents):
    x, maxima, scale, bias, mean, var = saved
    coefficients = _coefficients(x, scale, bias, mean, var, epsilon)
    dy = jnp.where(_affine(maxima, *coefficients) > 0, cotangents[0], 0).astype(jnp.float32)
    share = maxima.size / x.size
    sums = _mean(dy, layout) * share, _mean(dy * maxima, layout) * share  # over the pixels of `x`
    back = _through_moments(x.size // mean.size, scale, mean, var, epsilon, layout, sums)
    factor, slope, offset = (_by_row(a, x) for a in back.coefficients)
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

        mean(x W) = mean(x) W,  mean((x W)^2) = diag(W' mean(x x') W),  sum(dy (x W)) = diag(W' sum(x' dy))

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
    total = _sum(x, layout)  # [V * G, K]
    gram = _products(x, x, layout)  # [V * G, K, K]
    count = x.size // total.size
    squares = jnp.sum(w * _exact(gram, w), 1)
    mean, mean_of_squares = _shared((_exact(total, w) / count, squares / count), layout)
    var = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)
    product = _times(x, kernel)
    y = _affine(product, *_coefficients(x, scale, bias, mean, var, epsilon)).astype(x.dtype)
    return (y, mean, var), (x, kernel, scale, mean, var, total, gram)


def _norm_of_product_backward(layout, epsilon, saved, cotangents):
    x, kernel, scale, mean, var, total, gram = saved
    g, w = cotangents[0], kernel.astype(jnp.float32)
    count = x.size // total.size
    products = _products(x, g, layout)  # [V * G, K, C]
    sums = _sum(g, layout) / count, jnp.sum(w * products, 1) / count
    back = _through_moments(count, scale, mean, var, epsilon, layout, sums)
    factor, slope, offset = back.coefficients  # d (x W) = factor g - slope (x W) + offset
    d_kernel = factor[:, None] * products - slope[:, None] * _exact(gram, w)
    d_kernel = (d_kernel + total[..., None] * offset[:, None]).sum(0).astype(kernel.dtype)
    scaled = (g * _by_row(factor, x)).astype(x.dtype)
    within = _exact(w * slope[:, None], w.T)  # [V * G, K, K]
    of_x = jnp.zeros((), x.dtype)
    for i, square in enumerate(within.astype(x.dtype)):
        own = _by_row(jnp.arange(len(within))[:, None] == i, x)
        of_x = jnp.where(own, _times(x, square).astype(x.dtype), of_x)
    d_x = _times(scaled, kernel.T) - of_x + _by_row(_exact(offset, w.T), x)
    return d_x.astype(x.dtype), d_kernel, back.d_scale, back.d_bias


norm_of_product.defvjp(_norm_of_product_forward, _norm_of_product_backward)


class _Back(NamedTuple):
    """d x = factor dy - slope x + offset, `[V * G, C]` each, and the parameters' gradients."""

    coefficients: tuple[jax.Array, jax.Array, jax.Array]
    d_scale: jax.Array
    d_bias: jax.Array


def _through_moments(count, scale, mean, var, epsilon, layout, sums) -> _Back:
    """The norm's gradient from `sums`: means of dy and dy x over a device's `count` rows."""
    inverse_std = lax.rsqrt(var + epsilon)
    d_scale = count * ((sums[1] - mean * sums[0]) * inverse_std).sum(0)
    d_bias = count * sums[0].sum(0)
    mean_dy, mean_dy_x = layout.mean(sums)
    # d x = factor (dy - mean(dy) - x^ mean(dy x^)) with x^ = (x - mean) / std, linear in x.
    factor = scale * inverse_std
    slope = factor * (mean_dy_x - mean * mean_dy) * jnp.square(inverse_std)
    return _Back((factor, slope, slope * mean - factor * mean_dy), d_scale, d_bias)


def _moments(x: jax.Array, layout: BatchLayout) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each group, `[V * G, C]` float32."""
    x = x.astype(jnp.float32)
    # Both moments together: one pass over the activations and one collective.
    mean, mean_of_squares = _shared((_mean(x, layout), _mean(jnp.square(x), layout)), layout)
    return mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)


def _shared(moments: Any, layout: BatchLayout) -> Any:
    return checkpoint_name(layout.mean(moments), MOMENTS)


def _sum(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """`[rows, ..., C]` to `[V * G, C]`."""
    x = _grouped(x, layout)
    return x.sum(tuple(range(1, x.ndim - 1)), dtype=jnp.float32)


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


def _apart(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """`[rows, ..., K]` to `[rows, ..., V * G * K]`: each group has channels of its own, else 0."""
    sets = layout.num_views * layout.groups
    own = jnp.repeat(jnp.eye(sets, dtype=x.dtype), len(x) // sets, axis=0)
    parts = [x * own[:, i].reshape(-1, *(1,) * (x.ndim - 1)) for i in range(sets)]
    return jnp.concatenate(parts, -1)


def _times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution, to float32."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        *(x, kernel[None, None], (1, 1), "VALID"),
        dimension_numbers=layout,
        preferred_element_type=jnp.float32,
    )


_exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0); its gradient uses the result, which the next layer stores anyway."""
    return jnp.maximum(x, 0)


def _relu_backward(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    y, g = _barrier_on_gpu(y, g)  # otherwise XLA simplifies "y > 0" to "x > 0" and stores x too
    return (jnp.where(y > 0, g, 0),)


relu.defvjp(lambda x: (relu(x),) * 2, _relu_backward)


def _barrier_on_gpu(*arrays: Any) -> Any:
    """The arrays after an optimization barrier on GPUs: XLA does not simplify across it.

    A TPU is faster without it: its compiler fuses norms into neighbouring convolutions.
    """
    return lax.platform_dependent(
        *arrays, cuda=lambda *a: lax.optimization_barrier(a), default=lambda *a: a
    )


def _grouped(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """`[V * G, n, ..., C]`"""
    return x.reshape(layout.num_views * layout.groups, -1, *x.shape[1:])


def _mean(x: jax.Array, layout: BatchLayout) -> jax.Array:
    """`[rows, ..., C]` to `[V * G, C]`."""
    x = _grouped(x, layout)
    return x.mean(tuple(range(1, x.ndim - 1)))


def _by_row(a: jax.Array, x: jax.Array) -> jax.Array:
    """The groups' `[V * G, C]` for each row of `x`: `[rows, 1, ..., C]`."""
    rows = jnp.repeat(a, len(x) // len(a), axis=0)
    return rows.reshape(len(x), *(1,) * (x.ndim - 2), -1)


def _coefficients(x, scale, bias, mean, var, epsilon) -> tuple[jax.Array, jax.Array]:
    factor = scale * lax.rsqrt(var + epsilon)
    return _by_row(factor, x), _by_row(bias - mean * factor, x)


def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * factor + offset).astype(x.dtype)
