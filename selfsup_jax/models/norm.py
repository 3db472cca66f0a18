"""Batch normalisation over groups of the global batch, and the ReLU after it."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout


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
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    zero_init_scale: bool = False
    use_scale: bool = True
    use_bias: bool = True
    unbiased_average: bool = False
    relu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None) -> jax.Array:
        """Normalises `x` `[rows, ..., C]`; `layout=None` uses the running averages."""
        shape = (x.shape[-1],)
        scale, bias = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        if self.use_scale:
            init_scale = nn.initializers.zeros if self.zero_init_scale else nn.initializers.ones
            scale = self.param("scale", init_scale, shape, jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        if layout is None:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            y = _affine(x, factor, bias - running_mean.value * factor)
            return jnp.maximum(y, 0) if self.relu else y

        y, mean, var = batch_norm(x, scale, bias, layout, self.epsilon, self.relu)
        if not self.is_initializing():
            samples = x.size // mean.size * layout.sharing  # in one group
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
    grouped = _grouped(x, layout).astype(jnp.float32)
    # Both moments together: one pass over the activations and one collective.
    mean, mean_of_squares = layout.mean((_mean(grouped), _mean(jnp.square(grouped))))
    var = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)
    y = _affine(_grouped(x, layout), *_coefficients(x.ndim, scale, bias, mean, var, epsilon))
    return (jnp.maximum(y, 0) if relu else y).reshape(x.shape), mean, var


def _batch_norm_forward(x, scale, bias, layout, epsilon, relu):
    y, mean, var = batch_norm(x, scale, bias, layout, epsilon, relu)
    return (y, mean, var), (x, scale, bias, mean, var)


def _batch_norm_backward(layout, epsilon, relu, saved, cotangents):
    x, scale, bias, mean, var = saved
    coefficients = _coefficients(x.ndim, scale, bias, mean, var, epsilon)

    def through_relu(g: jax.Array, x: jax.Array) -> jax.Array:
        g = jnp.where(_affine(x, *coefficients) > 0, g, 0) if relu else g
        return g.astype(jnp.float32)

    x, g = _grouped(x, layout), _grouped(cotangents[0], layout)
    dy = through_relu(g, x)
    sums = _mean(dy), _mean(dy * x)  # means over this device's rows of the group
    # Otherwise the GPU compiler stores `dy` for the second pass, which is slower than computing it
    # again from `g` and `x`.
    g, x, sums = _barrier_on_gpu(g, x, sums)

    inverse_std = lax.rsqrt(var + epsilon)
    count = x.size // mean.size
    d_scale = count * ((sums[1] - mean * sums[0]) * inverse_std).sum(0)
    d_bias = count * sums[0].sum(0)
    mean_dy, mean_dy_x = layout.mean(sums)
    # d x = factor (dy - mean(dy) - x^ mean(dy x^)) with x^ = (x - mean) / std, linear in x.
    factor = scale * inverse_std
    slope = factor * (mean_dy_x - mean * mean_dy) * jnp.square(inverse_std)
    offset = slope * mean - factor * mean_dy
    factor, slope, offset = (_per_group(a, x.ndim) for a in (factor, slope, offset))
    d_x = factor * through_relu(g, x) - slope * x + offset
    return d_x.astype(x.dtype).reshape(saved[0].shape), d_scale, d_bias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


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


def _mean(x: jax.Array) -> jax.Array:
    """`[V * G, n, ..., C]` to `[V * G, C]`."""
    return x.mean(tuple(range(1, x.ndim - 1)))


def _per_group(x: jax.Array, ndim: int) -> jax.Array:
    """`[V * G, C]` to `[V * G, 1, ..., C]` of `ndim` axes."""
    return x.reshape(len(x), *(1,) * (ndim - 2), -1)


def _coefficients(ndim, scale, bias, mean, var, epsilon) -> tuple[jax.Array, jax.Array]:
    factor = scale * lax.rsqrt(var + epsilon)
    return _per_group(factor, ndim + 1), _per_group(bias - mean * factor, ndim + 1)


def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * factor + offset).astype(x.dtype)
