"""Batch normalisation over groups of the global batch, and the ReLU that follows it."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout


class BatchNorm(nn.Module):
    """Batch norm whose statistics are those of a group of the global batch, on any device count.

    The two views of a batch pass together but are normalised apart, and the running averages take
    one step for each, as if the views had passed one after the other. Statistics and the running
    averages are float32 whatever the input is. The averages start at 0 and 1 and are not debiased,
    as Haiku's are; after some twenty steps that is the same.

    Attributes:
        decay: of the running averages (0.9 in the authors' codes).
        epsilon: added to the variance.
        zero_init_scale: start gamma at 0 (the last norm of a residual branch).
        use_scale, use_bias: whether there is a gamma, and a beta.
        unbiased_average: the running average takes the variance times n / (n - 1), as PyTorch's
            does; what normalises the batch is the biased one all the same.
        relu: a ReLU follows; it is computed, and differentiated, in the same pass over the data.
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
        """Normalises `x` `[rows, ..., C]`; with `layout=None` by the running averages."""
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
            samples = x.size // mean.size * layout.sharing  # of one group
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

    It has a gradient of its own, the textbook's, since what bounds it is memory traffic: on its
    two passes over the data (sums, then result) it reads the input, what comes from behind, and
    nothing else. Derived automatically it kept and read the ReLU's gradient as well.

    Args:
        x: `[rows, ..., C]`, of any float type; the rows of a view, and of a group, lie together.
        scale, bias: gamma and beta, `[C]` float32.
        layout: how the rows are cut into V views of G groups, and what devices share a group.
        epsilon: added to the variance.
        relu: whether a ReLU follows.

    Returns:
        The result, in the shape and type of `x`, and the groups' mean and (biased) variance,
        `[V * G, C]` float32, through which no gradient passes.
    """
    grouped = _grouped(x, layout).astype(jnp.float32)
    # One pass over the activations, and one message between devices: both moments together.
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
    sums = _mean(dy), _mean(dy * x)  # as means over the rows of the group that are here
    # Else a GPU's compiler keeps `dy` for what follows, which costs more than making it anew from
    # `g` and `x` as they are read.
    g, x, sums = _apart_on_gpu(g, x, sums)

    inverse_std = lax.rsqrt(var + epsilon)
    count = x.size // mean.size
    d_scale = count * ((sums[1] - mean * sums[0]) * inverse_std).sum(0)
    d_bias = count * sums[0].sum(0)
    mean_dy, mean_dy_x = layout.mean(sums)
    # d x = factor (dy - mean(dy) - x^ mean(dy x^)) with x^ = (x - mean) / std, sorted by x.
    factor = scale * inverse_std
    slope = factor * (mean_dy_x - mean * mean_dy) * jnp.square(inverse_std)
    offset = slope * mean - factor * mean_dy
    factor, slope, offset = (_per_group(a, x.ndim) for a in (factor, slope, offset))
    d_x = factor * through_relu(g, x) - slope * x + offset
    return d_x.astype(x.dtype).reshape(saved[0].shape), d_scale, d_bias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0); its gradient looks at the result, which what follows keeps anyway."""
    return jnp.maximum(x, 0)


def _relu_backward(y: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    y, g = _apart_on_gpu(y, g)  # else "y > 0" is simplified to "x > 0", and x is kept too
    return (jnp.where(y > 0, g, 0),)


relu.defvjp(lambda x: (relu(x),) * 2, _relu_backward)


def _apart_on_gpu(*arrays: Any) -> Any:
    """The arrays, made and used in programs that a GPU's compiler does not simplify as one.

    A TPU's compiler does better without: it computes norms inside the convolutions beside them.
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
