"""Batch normalisation over groups of the global batch."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.collectives import BatchLayout


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
        use_bias: whether there is a beta.
        unbiased_average: the running average takes the variance times n / (n - 1), as PyTorch's
            does; what normalises the batch is the biased one all the same.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    zero_init_scale: bool = False
    use_bias: bool = True
    unbiased_average: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None) -> jax.Array:
        """Normalises `x` `[rows, ..., C]`; with `layout=None` by the running averages."""
        channels = x.shape[-1]
        init_scale = nn.initializers.zeros if self.zero_init_scale else nn.initializers.ones
        scale = self.param("scale", init_scale, (channels,), jnp.float32)
        bias: jax.Array | float = 0.0
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        if layout is None:
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            y = x.astype(jnp.float32) * factor + (bias - running_mean.value * factor)
            return y.astype(x.dtype)

        sets = layout.num_views * layout.groups
        grouped = x.astype(jnp.float32).reshape(sets, -1, *x.shape[1:])  # [V * G, n, ..., C]
        axes = tuple(range(1, grouped.ndim - 1))
        # One pass over the activations and one message: both moments travel together.
        moments = jnp.stack([grouped.mean(axes), jnp.square(grouped).mean(axes)])
        mean, mean_of_squares = layout.mean(moments)  # [V * G, C] each
        var = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)  # biased

        if not self.is_initializing():
            samples = grouped.size // (sets * channels) * layout.sharing  # of one group
            correction = samples / max(1, samples - 1) if self.unbiased_average else 1.0
            for view in range(layout.num_views):
                rows = slice(view * layout.groups, (view + 1) * layout.groups)
                self._update(running_mean, mean[rows].mean(0))
                self._update(running_var, var[rows].mean(0) * correction)

        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        offset = bias - mean * factor
        shape = (sets,) + (1,) * len(axes) + (channels,)
        y = grouped * factor.reshape(shape) + offset.reshape(shape)
        return y.reshape(x.shape).astype(x.dtype)

    def _update(self, average: Any, value: jax.Array) -> None:
        average.value = self.decay * average.value + (1.0 - self.decay) * value
