"""Batch normalisation over groups of the global batch, and the ReLU after it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import moments
from selfsup_jax.models.norm_fused import norm_of_maxima, norm_of_product


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
        by_row: see `batch_norm`.
        pool: with `relu`, a max-pooling follows; see `norm_of_maxima`. Evaluation pools too.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    zero_init_scale: bool = False
    use_scale: bool = True
    use_bias: bool = True
    unbiased_average: bool = False
    relu: bool = False
    by_row: bool = False
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
            y = moments.affine(x, factor, bias - running_mean.value * factor)
            y = jnp.maximum(y, 0) if self.relu else y
            return self.pool(y) if self.pool else y

        layout = dataclasses.replace(layout, noise=None)  # arrays, and not of the norms
        if kernel is not None:
            y, mean, var = norm_of_product(x, kernel, scale, bias, layout, self.epsilon)
        elif self.pool is not None:
            y, mean, var = norm_of_maxima(x, scale, bias, layout, self.epsilon, self.pool)
        else:
            y, mean, var = batch_norm(x, scale, bias, layout, self.epsilon, self.relu, self.by_row)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    layout: BatchLayout,
    epsilon: float,
    relu: bool,
    by_row: bool = False,
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
        by_row: the groups' coefficients are repeated for each row; otherwise the rows are divided
            into groups. A `norm_of_product` after it needs that on TPUs, where it takes rows apart;
            the CPU is slower with it.

    Returns:
        The result, with the shape and dtype of `x`, and the groups' mean and (biased) variance,
        `[V * G, C]` float32, which have no gradient.
    """
    sets = x if by_row else moments.grouped(x, layout)
    mean, var = moments.moments(sets, layout)
    y = moments.affine(sets, *moments.coefficients(sets, scale, bias, mean, var, epsilon))
    return (jnp.maximum(y, 0) if relu else y).reshape(x.shape), mean, var


def _batch_norm_forward(x, scale, bias, layout, epsilon, relu, by_row):
    y, mean, var = batch_norm(x, scale, bias, layout, epsilon, relu, by_row)
    return (y, mean, var), (x, scale, bias, mean, var)


def _batch_norm_backward(layout, epsilon, relu, by_row, saved, cotangents):
    (x, scale, bias, mean, var), g = saved, cotangents[0]
    x, g = (x, g) if by_row else (moments.grouped(a, layout) for a in (x, g))
    coefficients = moments.coefficients(x, scale, bias, mean, var, epsilon)

    def through_relu(g: jax.Array, x: jax.Array) -> jax.Array:
        g = jnp.where(moments.affine(x, *coefficients) > 0, g, 0) if relu else g
        return g.astype(jnp.float32)

    dy = through_relu(g, x)
    of_dy = moments.means(dy, layout), moments.means(dy * x, layout)
    # Otherwise the GPU compiler stores `dy` for the second pass, which is slower than computing it
    # again from `g` and `x`.
    g, x, of_dy = _barrier_on_gpu(g, x, of_dy)

    back = moments.through(x.size // mean.size, scale, mean, var, epsilon, layout, of_dy)
    factor, slope, offset = (moments.by_row(a, x) for a in back.coefficients)
    d_x = factor * through_relu(g, x) - slope * x + offset
    return d_x.astype(x.dtype).reshape(saved[0].shape), back.d_scale, back.d_bias


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
