"""Heads on top of an encoder: projector, predictor, linear classifier."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.models.norm import BatchNorm
from selfsup_jax.parallel import BatchLayout

# Haiku's Linear: truncated normal with variance 1 / fan in; biases start at zero.
_KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class MLPHead(nn.Module):
    """Linear -> batch norm -> ReLU -> Linear: BYOL's projector g and predictor q (section 3.3).

    The hidden layer has a bias, the output neither bias nor norm, as in the authors' code.
    """

    hidden_size: int = 4096
    output_size: int = 256
    bn_decay: float = 0.9
    bn_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None = None) -> jax.Array:
        """`[B, D]` to `[B, output_size]` float32; `layout=None` evaluates."""
        dense = nn.Dense(
            self.hidden_size, dtype=self.dtype, kernel_init=_KERNEL_INIT, name="hidden"
        )
        x = BatchNorm(self.bn_decay, self.bn_epsilon, name="bn")(dense(x), layout)
        output = nn.Dense(
            self.output_size,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_KERNEL_INIT,
            name="output",
        )
        return output(nn.relu(x)).astype(jnp.float32)


class LinearClassifier(nn.Module):
    """The online probe: a linear layer on features that pass no gradient back."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, D]` float32 to logits `[B, num_classes]` float32."""
        return nn.Dense(self.num_classes, kernel_init=_KERNEL_INIT, name="output")(x)
